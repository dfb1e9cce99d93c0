"""What choosing tokens, calibrating, cutting and repairing a model take: bytes, memory, operations.

Arithmetic on sizes, beside the modules that allocate them.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mis_mlx.hardware.ledger import Ledger
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
    side_bytes,
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
        "vocabulary", t, tokens=tokens, length=length, head=False, spool=False
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
        cost = StageCost(name="")
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


class FitWork(NamedTuple):
    """Operations of a block's fit, and those of the host's solver besides."""

    flops: float
    host_flops: float


def fit_cost(ledger: Ledger, m: ModelSize, tokens: int, workspace: int) -> FitWork:
    """Write down what a block's closed-form fit holds (maths/reconstruction); its work.

    Normal equations, and tokens held out as they are; besides them what a block's pass takes
    (`workspace`) and float32 batches of products, then what solving makes of the sums, and the
    block where it is a copy. Held-out tokens judge every ridge, then join the sums. Solvers are
    numpy's in float64, or LAPACK's in float32 of wide layers, of which four operations count as
    one.
    """
    f = m.wide.ffn
    d = m.shape.hidden
    item = np.dtype(precision(f)).itemsize
    held_out = max(1, tokens // HELD_OUT)
    sums = {"sums": item * f * (f + d), "held_out": 4 * held_out * (f + d)}
    products = 4 * parallel_windows(m) * f * (f + d)
    ledger.moment("products", **sums, products=products, workspace=workspace)
    ledger.moment(
        "solving",
        **sums,
        solving=f * (item * f + max(2 * item, 16) * d),
        # BLAS packs parts of what it solves: as much was measured on F = 3,242, less on 1,024.
        packed=min(TRAINED_BYTES, sums["sums"] // 4),
        block=0 if m.as_stored else m.block_work,
    )
    judged = 2.0 * len(RIDGES) * held_out * f * d
    solves = len(RIDGES) + 1
    host = solves * solver_flops(f, 2 / 3 * f, 2 * d)
    flops = 2.0 * tokens * f * (f + d) + solves * f * f * (2 / 3 * f + 4 * d) + judged
    return FitWork(flops - host, host)


def repair_cost(job: DistillationSpec, limit: int, item: int = 0) -> StageCost:
    """Both models side by side, every down_proj fitted anew (pruning/reconstruct).

    item: bytes of a number in the student's parts, each of which is written, with hidden states on
    disk as far as they find no room; 0: the student is one file, and its new matrices wait in
    memory. Of a mixture the routers are trained: every expert's output for all tokens that there is
    room for, in a training and a held-out set, of which a step gathers some more.
    """
    length = job.max_seq_length
    tokens = job.reconstruct_samples * length
    t = job.teacher
    m = job.student
    if item:
        block_bytes = item * m.largest_block_params
        m = replace(m, block_bytes=block_bytes, as_stored=item == m.item == 4)
    layers = m.shape.layers
    ledger = Ledger(limit, t.gpu)
    passes = []
    bodies = []
    for model in (t, m):
        passes.append(
            streamed_pass(
                "",
                model,
                tokens=tokens,
                length=length,
                head=False,
                spool=False,
            )
        )
        bodies.append(model.body_bytes(pass_workspace(model, tokens, length, length)))
        ledger.hold("slots", model.slots_bytes)
        ledger.hold("what blocks share", side_bytes(model, tokens))
        ledger.hold("norms and masks", SMALL_BYTES)
    big, small = passes
    ledger.hold("in flight", t.in_flight(pass_workspace(t, tokens, length, length)))
    ledger.moment("teacher's pass", body=bodies[0])
    read = big.read_bytes + m.nbytes
    if m.shape.experts:
        work = _routers(ledger, m, tokens)
        ledger.hold("student's pass", bodies[1])
        read += small.read_bytes
        again = 1
    else:
        work = fit_cost(ledger, m, tokens, bodies[1])
        ledger.hold("new matrices", 4 * m.shape.hidden * m.shape.ffn, 1 if item else layers)
        again = 2  # a block's output is computed once more
    window = length * (t.hidden_bytes + m.hidden_bytes)
    held = job.reconstruct_samples
    written = 0
    if item:
        ledger.moment("a part is written", block=bodies[1] + 4 * m.largest_block_params)
        held = ledger.fill("hidden states of windows", window, job.reconstruct_samples)
        written = item * (m.params + layers * m.largest_block_params)
    else:
        ledger.hold("hidden states of windows", window, held)
    spooled = tokens - held * length
    visits = t.hidden_bytes * (t.shape.layers + 1) + m.hidden_bytes * (layers + 1)
    return StageCost(
        name="repair",
        read_bytes=read + spooled * visits,
        written_bytes=written + spooled * visits,
        peak_bytes=ledger.peak_bytes,
        flops=big.flops + again * small.flops + layers * work.flops,
        spooled_bytes=spooled * (t.hidden_bytes + m.hidden_bytes),
        held_tokens=held * length,
        waits=big.waits + 2 * small.waits,
        host_flops=layers * work.host_flops,
    )


def _routers(ledger: Ledger, m: ModelSize, tokens: int) -> FitWork:
    """Write down what training a block's router holds; its work."""
    token_bytes = m.shape.experts * m.hidden_bytes  # of all experts' outputs
    outputs_bytes = 2 * min(tokens * token_bytes, ROUTER_BYTES)
    ledger.hold("outputs of all experts", outputs_bytes, count=2)
    ledger.hold("what they should give", tokens * m.hidden_bytes)
    asked = min(tokens, outputs_bytes // (2 * token_bytes))
    return FitWork(2.0 * asked * m.largest_block_params, 0.0)
