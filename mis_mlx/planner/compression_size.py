"""What calibrating, cutting and repairing a model take, and what training it takes in memory.

Bytes, memory, operations: arithmetic on sizes. Does not know how it is done (pruning), nor the
steps between (planner/phases). Quantizing is in planner/rounding_cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mis_mlx.compute.token_losses import IN_ONE_GRAPH, Footprint
from mis_mlx.hardware.memory import in_flight_bytes, process_bytes
from mis_mlx.maths.optimizer import group_of
from mis_mlx.maths.reconstruction import HELD_OUT, RIDGES, precision
from mis_mlx.models import arch
from mis_mlx.models.config import shape_of
from mis_mlx.models.stream import HEAD_PART
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.planner.estimates import (
    SMALL_BYTES,
    TENSOR_BYTES,
    StageCost,
    activation_bytes,
    backward_bytes,
    comparison_cost,
    forward_flops,
    headroom_bytes,
    parallel_windows,
    pass_workspace,
    streamed_pass,
    tensor_bytes,
)
from mis_mlx.planner.model_size import ModelSize
from mis_mlx.planner.rounding_cost import sensitivity_cost, solver_flops
from mis_mlx.settings.workloads import ROUTER_BYTES, VOCABULARY_LOGITS, VOCABULARY_WINDOWS

# a clipped gradient; the rest of an update is written over what it is made of (measured)
UPDATE_ARRAYS = 2
# of a trained parameter: weight, gradient and two moments, float32
STATE_BYTES = 16
GRADIENT_BYTES = 4


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
    """Choose the tokens, calibrate, then copy what is kept, tensor by tensor."""
    t = job.teacher
    length = job.max_seq_length
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
    turning = 4.0 * square * (t.shape.layers + 1) * windows * length
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
    if rotation:
        nbytes += 2 * 4 * max(t.shape.vocab, t.shape.ffn) * t.shape.hidden
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
    nbytes = sums_bytes + held_out_bytes + max(products + workspace, solving)
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
        flops = 2.0 * asked * m.shape.layers * m.block_params
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
        block_bytes=item * job.student.block_params,
        as_stored=item == job.student.item == 4,
    )
    layers = m.shape.layers
    teachers = t.body_bytes(pass_workspace(t, tokens, length, length))
    students = m.body_bytes(pass_workspace(m, tokens, length, length))
    body = max(teachers, students)
    fit_bytes, fit_flops, solver = fit_cost(m, tokens, body)
    peak = t.slots_bytes + m.slots_bytes + SMALL_BYTES
    peak += max(fit_bytes, body + 4 * m.block_params)
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
        written_bytes=item * (m.params + layers * m.block_params) + moved,
        peak_bytes=peak + held * token_bytes,
        flops=flops + layers * fit_flops,
        spooled_bytes=spooled * token_bytes,
        held_tokens=held,
        host_flops=layers * solver,
    )


def training_bytes(
    config: Mapping[str, Any],
    batch: int,
    length: int,
    *,
    loss: Footprint = IN_ONE_GRAPH,
    accumulates: bool = False,
) -> int:
    """Memory to train a student that is whole in memory, on micro-batches (`batch`, `length`).

    Weights and moments, and the largest of: activations and the vocabulary's part of the loss; the
    backward pass; the update. loss: computed between the passes, with windows side by side that
    have gradients each; or all in one graph, of which the least that can be promised is the sum.
    accumulates: several micro-batches, so that the gradients of earlier ones wait meanwhile.
    """
    s = shape_of(config)
    params = arch.params(config)
    activations = activation_bytes(config, batch, length)
    head = 4 * s.vocab * s.hidden
    block = backward_bytes(config, batch, length) - activations // s.layers
    logits = loss.logit_bytes(s.vocab, batch * length)
    gradients = GRADIENT_BYTES * params
    forward = activations + 2 * head + logits
    backward = gradients
    if loss.on_host:
        lane_gradients = min(batch, loss.streams) * (gradients - head)
        backward = max(activations + head, lane_gradients + 3 * head)
    backward += block
    if accumulates:
        forward += gradients
        backward += gradients
    if not loss.on_host:
        forward += gradients
    largest = max(map(math.prod, arch.tensors_of(config, True).values()))
    update = gradients + UPDATE_ARRAYS * 4 * largest
    ahead = min(activations, in_flight_bytes()) if loss.gpu else 0
    return (STATE_BYTES - GRADIENT_BYTES) * params + max(forward, backward, update) + ahead


def block_state_bytes(config: Mapping[str, Any], block: int | None = None) -> int:
    """A block that is trained block by block, in memory or in a checkpoint.

    float32 weights, and moments of 8 bits. block: which one; default: the largest.
    """
    total = 0
    for shape in arch.layer_tensors(config, block=block).values():
        numbers = math.prod(shape)
        group = group_of(shape)
        if group:
            total += 4 * numbers + (2 * numbers + 8 * numbers // group)
        else:
            total += 12 * numbers
    return total


def search_cost(
    s: Any,
    job: DistillationSpec,
    planned: Sequence[StageCost],
    probes: int,
    *,
    rows: bool,
    limit: int,
) -> dict[str, list[StageCost]]:
    """What a search with these settings takes: {"rank": stages, "finalists": stages}.

    To rank, and to train, round and judge finalists, each student counted as `job`'s, whose phases
    are `planned`. probes: axes measured alone. rows: whether some students have fewer tokens.
    """
    t = job.teacher
    m = job.student
    length = job.max_seq_length
    known = TENSOR_BYTES * t.tensors
    own = known + process_bytes(max(0, limit - known))  # as in a plan, whose phases have it
    cut = next(p for p in planned if p.name == "prune")
    # of two texts
    windows = -(-4 * s.rank_windows // 3)
    judging = -(-4 * s.eval_windows // 3)
    comparison = comparison_cost([t, m], windows, length)
    # the teacher's pass, which is done once
    teachers_flops = forward_flops(t, windows * length, length, head=False)
    comparison = replace(
        comparison,
        peak_bytes=max(comparison.peak_bytes, tensor_bytes(t)),
        flops=comparison.flops - teachers_flops,
    )
    rank = [_times(cut, 1, name="calibrate", written=cut.written_bytes - m.nbytes)]
    if s.mixed:
        bits = sensitivity_cost(t, length, limit)
        rank.append(_times(bits, 1, name="sensitivity", own=own))
    rank.append(_times(comparison, probes, name=f"{probes} axes alone", written=m.nbytes, own=own))
    rank.append(
        _times(
            comparison, s.evaluations, name=f"rank {s.evaluations}", written=2 * m.nbytes, own=own
        )
    )
    if rows:
        rank.append(_times(vocabulary_cost(t, length), 1, name="choose tokens", own=own))
    if not s.finalists:
        return {"rank": rank, "finalists": []}
    finalists = []
    for p in planned:
        if p.name not in ("prune", "measure"):  # which a finalist does not go through
            name = f"{p.name}, {s.finalists} finalists"
            finalists.append(_times(p, s.finalists, name=name, written=p.written_bytes))
    judged = comparison_cost([t, m, m, m], judging, length)
    finalists.append(_times(judged, s.finalists, name="judge them", written=2 * m.nbytes, own=own))
    return {"rank": rank, "finalists": finalists}


def _times(p: StageCost, times: int, *, name: str, written: int = 0, own: int = 0) -> StageCost:
    """A stage `times` times, which writes `written` bytes each time; own: bytes of the process."""
    return replace(
        p,
        name=name,
        read_bytes=times * p.read_bytes,
        written_bytes=times * written,
        flops=times * p.flops,
        peak_bytes=p.peak_bytes + own,
        waits=times * p.waits,
        host_flops=times * p.host_flops,
    )
