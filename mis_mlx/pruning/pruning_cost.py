"""What choosing tokens, calibrating, cutting and repairing a model take: bytes, memory, operations.

Arithmetic on sizes, beside the modules that allocate them.
"""

import math
from dataclasses import replace

import numpy as np

from mis_mlx.hardware.ledger import headroom_bytes
from mis_mlx.hardware.memory import TRAINED_BYTES
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths.reconstruction import HELD_OUT, RIDGES, precision, solver_flops
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import (
    DENSE_ITEM,
    SMALL_BYTES,
    block_matrix,
    forward_flops,
    parallel_windows,
    pass_workspace,
    streamed_pass,
    table_part,
    tensor_bytes,
)
from mis_mlx.models.passing.stream import HEAD_PART
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.settings.workloads import ROUTER_BYTES, VOCABULARY_LOGITS, VOCABULARY_WINDOWS


def vocabulary_cost(t: ModelSize, length: int) -> StageCost:
    """Ask a teacher with all of its tokens which it expects.

    Final states of all windows, then logits of all tokens at some positions, with two parts of the
    head and the temporaries of one.
    """
    tokens = VOCABULARY_WINDOWS * length
    vocab = t.shape.vocab
    rows = min(HEAD_PART // t.shape.hidden, vocab)
    final_states = streamed_pass(
        "vocabulary", t, tokens=tokens, micro_tokens=length, length=length, head=False, spool=False
    )
    positions = min(length, VOCABULARY_LOGITS // vocab)
    head = tokens * t.shape.hidden * t.item
    head += 4 * positions * (vocab + 2 * rows)
    head += 3 * rows * t.head_work // vocab
    head_reads = VOCABULARY_WINDOWS * math.ceil(length / positions)
    return replace(
        final_states,
        peak_bytes=max(final_states.peak_bytes, head),
        read_bytes=final_states.read_bytes + head_reads * t.head_bytes,
        flops=forward_flops(t, tokens, length),
    )


def pruning_cost(job: DistillationSpec, limit: int) -> StageCost:
    """Choose the tokens, calibrate where something is cut, then copy tensor by tensor."""
    t = job.teacher
    length = job.max_seq_length
    if job.uncut:  # nothing is ranked
        cost = StageCost(name="", read_bytes=0, written_bytes=0, peak_bytes=0, flops=0.0)
    else:
        cost = calibration_cost(t, job.num_samples, length, limit, rotation=job.rotation)
    if job.shown and job.shown.shape != t.shape:
        tokens = vocabulary_cost(job.shown, length)
        cost = cost.then(replace(tokens, waits=0))  # its waits are not counted
    return replace(
        cost,
        name="prune",
        peak_bytes=max(cost.peak_bytes, copying_bytes(t, rotation=job.rotation)),
        read_bytes=cost.read_bytes + t.nbytes,
        written_bytes=cost.written_bytes + job.student.nbytes,
    )


def calibration_cost(
    t: ModelSize, windows: int, length: int, limit: int, *, rotation: bool
) -> StageCost:
    """The passes that say what to keep: one, and two more for a rotation.

    rotation: the hidden size is cut along directions. That takes D x D sums and their eigenvectors,
    in float64. Hidden states stay in memory as far as they fit besides these, for the same place
    serves all passes.
    """
    square = t.shape.hidden**2
    sums = 5 * 8 * square if rotation else 0
    one_pass = streamed_pass(
        "calibration",
        t,
        tokens=windows * length,
        micro_tokens=length,
        length=length,
        limit_bytes=limit,
        head=False,
        beside_bytes=sums,
    )
    if not rotation:
        return one_pass
    tokens = windows * length
    turning = 4.0 * square * (t.shape.layers + 1) * tokens
    return replace(
        one_pass,
        read_bytes=3 * one_pass.read_bytes,
        written_bytes=3 * one_pass.written_bytes,
        flops=3 * one_pass.flops + turning,
    )


def copying_bytes(t: ModelSize, *, rotation: bool) -> int:
    """The largest tensor on its way into the student.

    rotation: the hidden size is cut along directions, so it is turned in float32 before that.
    """
    nbytes = tensor_bytes(t)
    largest = block_matrix(t)
    if not t.packed:
        # What was read is gone before the cut part is converted (measured).
        nbytes = max(nbytes - 2 * largest, DENSE_ITEM * table_part(t))
    if rotation:
        nbytes += 2 * 4 * max(largest, table_part(t))
    return nbytes


def fit_cost(m: ModelSize, tokens: int, workspace: int = 0) -> tuple[int, float, float]:
    """(bytes, operations, operations of the host's solver) of a closed-form fit.

    Normal equations, and tokens held out as they are; besides them what a block's pass takes
    (`workspace`) and float32 batches of products, then what solving makes of the sums, and the
    block where it is a copy. Held-out tokens judge every ridge, then join the sums. Solvers are
    numpy's in float64, or LAPACK's in float32 of wide layers, of which four operations count as
    one.
    """
    f = m.wide.ffn
    d = m.shape.hidden
    item = np.dtype(precision(f)).itemsize
    solving = f * (item * f + max(2 * item, 16) * d)
    if workspace and not m.as_stored:
        solving += m.block_work
    products = 4 * parallel_windows(m) * f * (f + d)
    sums_bytes = item * f * (f + d)
    held_out = max(1, tokens // HELD_OUT)
    held_out_bytes = 4 * held_out * (f + d)
    judged = 2.0 * len(RIDGES) * held_out * f * d
    solved = (len(RIDGES) + 1) * f * f * (2 / 3 * f + 4 * d)
    host = (len(RIDGES) + 1) * solver_flops(f, 2 / 3 * f, 2 * d)
    total = 2.0 * tokens * f * (f + d) + solved + judged
    # BLAS packs parts of what it solves: as much was measured on F = 3,242, less on 1,024.
    packed = min(TRAINED_BYTES, sums_bytes // 4)
    nbytes = sums_bytes + held_out_bytes + max(products + workspace, solving + packed)
    return nbytes, total - host, host


def repair_cost(job: DistillationSpec) -> StageCost:
    """Both models side by side, every down_proj fitted anew (pruning/reconstruct).

    The new matrices wait in memory, and a pass goes on. Of a mixture the routers are trained: every
    expert's output for all tokens that there is room for, in a training and a held-out set, of
    which a step gathers some more.
    """
    t = job.teacher
    m = job.student
    length = job.max_seq_length
    tokens = job.reconstruct_samples * length
    students_pass = streamed_pass(
        "", m, tokens=tokens, micro_tokens=length, length=length, head=False, spool=False
    )
    workspace = pass_workspace(m, tokens, length, length)
    beside = students_pass.peak_bytes
    beside -= m.in_flight(workspace)  # which the teacher's pass has too
    read = m.nbytes
    host_flops = 0.0
    if m.shape.experts:
        token_bytes = m.shape.experts * m.hidden_bytes  # of all experts' outputs
        outputs_bytes = 2 * min(tokens * token_bytes, ROUTER_BYTES)
        beside += 2 * outputs_bytes + tokens * m.hidden_bytes
        read += students_pass.read_bytes
        asked = min(tokens, outputs_bytes // (2 * token_bytes))
        flops = 2.0 * asked * m.shape.layers * m.largest_block_params
    else:
        fit_bytes, fit_flops, solver = fit_cost(m, tokens)
        teachers = t.body_bytes(pass_workspace(t, tokens, length, length))
        beside -= min(teachers, m.body_bytes(workspace) + fit_bytes)  # they take turns
        beside += fit_bytes + 4 * m.shape.layers * m.shape.hidden * m.shape.ffn
        flops = students_pass.flops + m.shape.layers * fit_flops
        host_flops = m.shape.layers * solver
    cost = streamed_pass(
        "repair",
        t,
        tokens=tokens,
        micro_tokens=length,
        length=length,
        head=False,
        spool=False,
        beside_bytes=beside,
    )
    return replace(
        cost,
        read_bytes=cost.read_bytes + read,
        flops=cost.flops + students_pass.flops + flops,
        waits=cost.waits + 2 * students_pass.waits,
        host_flops=host_flops,
    )


def repair_by_block_cost(job: DistillationSpec, limit: int, item: int) -> StageCost:
    """The repair of a student in parts of `item` bytes a number, each of which is written.

    A window at a time, hidden states on disk as far as they find no room, and a block's output
    computed once more.
    """
    t = job.teacher
    length = job.max_seq_length
    tokens = job.reconstruct_samples * length
    m = replace(
        job.student,
        block_bytes=item * job.student.largest_block_params,
        as_stored=item == job.student.item == 4,
    )
    layers = m.shape.layers
    teachers = t.body_bytes(pass_workspace(t, tokens, length, length))
    students = m.body_bytes(pass_workspace(m, tokens, length, length))
    body = max(teachers, students)
    fit_bytes, fit_flops, solver = fit_cost(m, tokens, body)
    peak = t.slots_bytes + m.slots_bytes + SMALL_BYTES
    peak += max(fit_bytes, body + 4 * m.largest_block_params)
    peak += 4 * m.shape.ffn * m.shape.hidden
    token_bytes = t.hidden_bytes + m.hidden_bytes
    held = headroom_bytes(limit, peak, t.gpu) // (length * token_bytes) * length
    held = min(tokens, held)
    spooled = tokens - held
    visits = t.hidden_bytes * (t.shape.layers + 1) + m.hidden_bytes * (layers + 1)
    moved = spooled * visits
    flops = forward_flops(t, tokens, length, head=False)
    flops += 2 * forward_flops(m, tokens, length, head=False)
    return StageCost(
        name="repair",
        read_bytes=t.shape.layers * t.block_bytes + m.nbytes + moved,
        written_bytes=item * (m.params + layers * m.largest_block_params) + moved,
        peak_bytes=peak + held * token_bytes,
        flops=flops + layers * fit_flops,
        spooled_bytes=spooled * token_bytes,
        held_tokens=held,
        host_flops=layers * solver,
    )
