"""What cutting and repairing a model take: bytes, memory, operations."""

from dataclasses import replace

import numpy as np

from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.memory import TRAINED_BYTES
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost, in_turn
from mis_mlx.maths.reconstruction import HELD_OUT, RIDGES, precision, solver_flops
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import (
    hold_stream,
    parallel_windows,
    pass_workspace,
    streamed_pass,
)
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.pruning.calibrate import calibration_cost
from mis_mlx.pruning.reconstruct import ROUTER_BYTES
from mis_mlx.pruning.slicing import copying_bytes
from mis_mlx.pruning.vocabulary import vocabulary_cost


def pruning_cost(
    t: ModelSize,
    student_bytes: int,
    *,
    windows: int,
    length: int,
    limit: int,
    rotation: bool,
    shown: ModelSize | None = None,
) -> StageCost:
    """Choose the tokens, calibrate on windows, if any, then copy tensor by tensor.

    shown: the teacher with all of its tokens, where some go.
    """
    stages = [StageCost("")]  # nothing is ranked
    if windows:
        stages = [calibration_cost(t, windows, length, limit, rotation=rotation)]
    if shown:
        stages.append(vocabulary_cost(shown, length))
    copying = StageCost(
        "copy",
        read_bytes=t.nbytes,
        written_bytes=student_bytes,
        peak_bytes=copying_bytes(t, rotation=rotation),
    )
    return in_turn("prune", *stages, copying)


def fit_cost(ledger: Ledger, m: ModelSize, tokens: int, workspace: int) -> StageCost:
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
    return StageCost("fit", flops=flops - host, host_flops=host)


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
    big, small = (
        streamed_pass("", model, tokens=tokens, length=length, head=False, spool=False)
        for model in (t, m)
    )
    ledger = Ledger(limit, t.gpu)
    hold_stream(ledger, t, tokens)
    hold_stream(ledger, m, tokens)
    workspace = pass_workspace(t, tokens, length, length)
    ledger.hold("in flight", t.in_flight(workspace))
    ledger.moment("teacher's pass", body=t.body_bytes(workspace))
    body = m.body_bytes(pass_workspace(m, tokens, length, length))
    read = big.read_bytes + m.nbytes
    if m.shape.experts:
        work = _routers(ledger, m, tokens)
        ledger.hold("student's pass", body)
        read += small.read_bytes
        again = 1
    else:
        work = fit_cost(ledger, m, tokens, body)
        ledger.hold("new matrices", 4 * m.shape.hidden * m.shape.ffn, 1 if item else layers)
        again = 2  # a block's output is computed once more
    window = length * (t.hidden_bytes + m.hidden_bytes)
    held = job.reconstruct_samples
    written = 0
    if item:
        ledger.moment("a part is written", block=body + 4 * m.largest_block_params)
        held = ledger.fill(WINDOWS, window, job.reconstruct_samples)
        written = item * (m.params + layers * m.largest_block_params)
    else:
        ledger.hold(WINDOWS, window, held)
    spooled = tokens - held * length
    visits = t.hidden_bytes * (t.shape.layers + 1) + m.hidden_bytes * (layers + 1)
    return StageCost(
        name="repair",
        read_bytes=read + spooled * visits,
        written_bytes=written + spooled * visits,
        peak_bytes=ledger.peak_bytes,
        flops=big.flops + again * small.flops + layers * work.flops,
        scratch_bytes=spooled * (t.hidden_bytes + m.hidden_bytes),
        stays=ledger.filled,
        host_flops=layers * work.host_flops,
    )


def _routers(ledger: Ledger, m: ModelSize, tokens: int) -> StageCost:
    """Write down what training a block's router holds; its work."""
    token_bytes = m.shape.experts * m.hidden_bytes  # of all experts' outputs
    # of two sets, each of which has ROUTER_BYTES at the most; a step gathers as many
    outputs_bytes = min(tokens * token_bytes, 2 * ROUTER_BYTES)
    ledger.hold("outputs of all experts", outputs_bytes, count=2)
    ledger.hold("what they should give", tokens * m.hidden_bytes)
    asked = outputs_bytes // token_bytes
    return StageCost("routers", flops=2.0 * asked * m.largest_block_params)
