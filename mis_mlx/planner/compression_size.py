"""What calibrating, cutting, repairing and quantizing a model take: bytes, memory, operations; its
size afterwards, and what training it takes in memory.

Arithmetic on sizes. Does not know how it is done (pruning, quantization), nor the steps between
(planner/phases).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mis_mlx.hardware.memory import in_flight_bytes, process_bytes
from mis_mlx.maths.optimizer import group_of
from mis_mlx.maths.reconstruction import HELD_OUT, RIDGES, precision
from mis_mlx.maths.rounding import BITS, HELD_BYTES, PART, SLAB
from mis_mlx.models import arch
from mis_mlx.models.config import shape_of
from mis_mlx.models.stream import HEAD_PART, stacked
from mis_mlx.planner import estimates
from mis_mlx.planner.estimates import ModelSize, StageCost, streamed_pass
from mis_mlx.planner.recipe import (
    VOCABULARY_LOGITS,
    VOCABULARY_WINDOWS,
    DistillationSpec,
    QuantizationConfig,
)

ROUTER_BYTES = 2**28  # of outputs of all experts of a block (pruning/reconstruct)
BIAS_BITS = 32  # scale and bias of a group
SENSED = 8  # windows that say what bits cost
# a clipped gradient; what else an update makes is written over what it was made of (measured)
UPDATE_ARRAYS = 2
# of a trained parameter: weight, gradient and two moments, float32
STATE_BYTES = 16
GRADIENT_BYTES = 4


def vocabulary(t: ModelSize, length: int) -> StageCost:
    """Ask a teacher with all of its tokens which it expects: final states of all windows, then
    logits of all tokens at some positions, beside two parts of the head, and what one is made from.
    """
    tokens, vocab, rows = (
        VOCABULARY_WINDOWS * length,
        t.shape.vocab,
        min(HEAD_PART // t.shape.hidden, t.shape.vocab),
    )
    p = streamed_pass("vocabulary", t, tokens, length, length, head=False, spool=False)
    positions = min(length, VOCABULARY_LOGITS // vocab)
    head = (
        tokens * t.shape.hidden * t.item
        + 4 * positions * (vocab + 2 * rows)
        + 3 * rows * t.head_work // vocab
    )
    flops = estimates.forward_flops(t, tokens, length)
    times = VOCABULARY_WINDOWS * math.ceil(length / positions)
    return replace(
        p,
        peak_bytes=max(p.peak_bytes, head),
        read_bytes=p.read_bytes + times * t.head_bytes,
        flops=flops,
    )


def prune(job: DistillationSpec, limit: int) -> StageCost:
    """Choose the tokens, calibrate, then copy what is kept, tensor by tensor."""
    t = job.teacher
    length = job.max_seq_length
    p = calibration(t, job.num_samples, length, limit, rotation=job.rotation)
    peak = p.peak_bytes
    read = p.read_bytes
    written = p.written_bytes
    flops = p.flops
    if (shown := job.shown) and shown.shape != t.shape:
        asked = vocabulary(shown, length)
        peak = max(peak, asked.peak_bytes)
        read = read + asked.read_bytes
        flops = flops + asked.flops
    return replace(
        p,
        name="prune",
        peak_bytes=max(peak, copying_bytes(t, rotation=job.rotation)),
        read_bytes=read + t.nbytes,
        written_bytes=written + job.student.nbytes,
        flops=flops,
    )


def calibration(
    t: ModelSize, windows: int, length: int, limit: int, *, rotation: bool
) -> StageCost:
    """The passes that say what to keep: one, and two more where the hidden size is cut along
    directions.

    A rotation has D x D sums and their eigenvectors beside it, in float64. What is held of the
    hidden states is what fits beside these, for the same place serves all passes.
    """
    square = t.shape.hidden**2
    sums = 5 * 8 * square if rotation else 0
    p = streamed_pass(
        "calibration", t, windows * length, length, length, limit, head=False, beside_bytes=sums
    )
    if not rotation:
        return p
    turn = 4.0 * square * (t.shape.layers + 1) * windows * length
    return replace(
        p, read_bytes=3 * p.read_bytes, written_bytes=3 * p.written_bytes, flops=3 * p.flops + turn
    )


def copying_bytes(t: ModelSize, *, rotation: bool) -> int:
    """The largest tensor on its way into the student; where the hidden size is cut along
    directions, turned in float32 before that.
    """
    wide = 4 * max(t.shape.vocab, t.shape.ffn) * t.shape.hidden
    return estimates.tensor_bytes(t) + (2 * wide if rotation else 0)


def refit(m: ModelSize, tokens: int, workspace: int = 0) -> tuple[int, float, float]:
    """(bytes, operations, operations of the host's solver) of a closed-form fit: normal equations,
    and tokens held out as they are; beside them what a block's pass takes and float32 batches of
    products, then what solving makes of the sums, and the block where it is a copy. Held-out tokens
    judge every ridge, then join the sums. Solvers are numpy's in float64, or LAPACK's in float32 of
    wide layers, of which four operations count as one.
    """
    f = m.wide.ffn
    d = m.shape.hidden
    item = np.dtype(precision(m.wide.ffn)).itemsize
    solving = f * (item * f + max(2 * item, 16) * d) + (
        0 if m.as_stored or not workspace else m.block_work
    )
    nbytes = max(4 * estimates.together(m) * f * (f + d) + workspace, solving)
    solved = (len(RIDGES) + 1) * f * f * (2 / 3 * f + 4 * d)
    held_out = max(1, tokens // HELD_OUT)
    judged = 2.0 * len(RIDGES) * held_out * f * d
    sums_bytes = item * f * (f + d)
    held_out_bytes = 4 * held_out * (f + d)
    host = (len(RIDGES) + 1) * _solver(f, 2 / 3 * f, 2 * d)
    total = 2.0 * tokens * f * (f + d) + solved + judged
    return sums_bytes + held_out_bytes + nbytes, total - host, host


def _solver(inputs: int, factor: float, solve: float) -> float:
    """Operations of the host for sums (F, F): inputs^2 times `factor` to take their factor, times
    `solve` to use it. In float32 MLX does the latter, and the former counts a quarter.
    """
    if precision(inputs) is np.float32:
        return inputs**2 * factor / 4
    return inputs**2 * (factor + solve)


def repair(job: DistillationSpec) -> StageCost:
    """Both models side by side, every down_proj refitted (pruning/reconstruct); the new ones wait
    in memory, and a pass goes on. Of a mixture the routers: every expert says something to all
    tokens that there is room for, in training and held-out ones each, of which a step gathers some
    more.
    """
    m = job.student
    length = job.max_seq_length
    tokens = job.reconstruct_samples * job.max_seq_length
    small = streamed_pass("", m, tokens, length, length, head=False, spool=False)
    work = [estimates.pass_workspace(each, tokens, length, length) for each in (job.teacher, m)]
    theirs, own = (each.body_bytes(held) for each, held in zip((job.teacher, m), work, strict=True))
    ahead = m.in_flight(work[1])  # which the teacher's pass has too
    beside = small.peak_bytes - ahead
    read = m.nbytes
    if m.shape.experts:
        each = m.shape.experts * m.shape.hidden * m.item  # of what all say to a token
        said = 2 * min(tokens * each, ROUTER_BYTES)
        beside = beside + 2 * said + tokens * m.shape.hidden * m.item
        read = read + small.read_bytes
        flops = 2.0 * min(tokens, said // (2 * each)) * m.shape.layers * m.block_params
        host = 0.0
    else:
        fit_bytes, fit_flops, solved = refit(m, tokens)
        host = m.shape.layers * solved
        beside -= min(theirs, own + fit_bytes)  # they take turns
        beside += fit_bytes + 4 * m.shape.layers * m.shape.hidden * m.shape.ffn
        flops = small.flops + m.shape.layers * fit_flops
    big = streamed_pass(
        "repair", job.teacher, tokens, length, length, head=False, spool=False, beside_bytes=beside
    )
    return replace(
        big,
        read_bytes=big.read_bytes + read,
        flops=big.flops + small.flops + flops,
        waits=big.waits + 2 * small.waits,
        host_flops=host,
    )


def repair_parts(job: DistillationSpec, limit: int, item: int) -> StageCost:
    """The same for a student in parts of `item` bytes a number, each of which is written: a window
    at a time, hidden states on disk as far as they find no room, and a block's output computed once
    more.
    """
    t = job.teacher
    length = job.max_seq_length
    tokens = job.reconstruct_samples * job.max_seq_length
    m = replace(
        job.student,
        block_bytes=item * job.student.block_params,
        as_stored=item == job.student.item == 4,
    )
    body = max(
        each.body_bytes(estimates.pass_workspace(each, tokens, length, length)) for each in (t, m)
    )
    fit_bytes, fit_flops, solved = refit(m, tokens, body)
    peak = (
        t.slots_bytes
        + m.slots_bytes
        + max(fit_bytes, body + 4 * m.block_params)
        + estimates.SMALL_BYTES
    )
    peak += 4 * m.shape.ffn * m.shape.hidden
    # of a token
    theirs = t.shape.hidden * t.item
    ours = m.shape.hidden * m.item
    held = min(tokens, estimates.room(limit, peak, t.gpu) // (length * (theirs + ours)) * length)
    moved = (tokens - held) * (theirs * (t.shape.layers + 1) + ours * (m.shape.layers + 1))
    read = t.shape.layers * t.block_bytes + m.nbytes
    written = item * (m.params + m.shape.layers * m.block_params)
    flops = estimates.forward_flops(t, tokens, length, False) + 2 * estimates.forward_flops(
        m, tokens, length, False
    )
    return StageCost(
        "repair",
        read + moved,
        written + moved,
        peak + held * (theirs + ours),
        flops + m.shape.layers * fit_flops,
        spooled_bytes=(tokens - held) * (theirs + ours),
        held_tokens=held,
        host_flops=m.shape.layers * solved,
    )


def training_bytes(
    config: Mapping[str, Any],
    batch: int,
    length: int,
    host_lanes: int = 0,
    more: bool = False,
    *,
    gpu: bool = False,
) -> int:
    """A student whole in memory: weights and moments, and the largest of: activations and the
    vocabulary's part of the loss; the way back; the update. host_lanes: of the way where numpy
    computes the loss between the passes (live_teacher), each with gradients; 0: all in one graph,
    of which the least that can be promised is the sum. more: micro-batches than one, so that the
    gradients of those before lie beside it. gpu: with temporaries of the commands that are in
    flight there.
    """
    s = shape_of(config)
    params = arch.params(config)
    kept = estimates.activation_bytes(config, batch, length)
    head = 4 * s.vocab * s.hidden
    block = estimates.backward_bytes(config, batch, length) - kept // s.layers
    loss = 2 * head + estimates.logit_bytes(s.vocab, batch * length, bool(host_lanes), gpu=gpu)
    gradients = GRADIENT_BYTES * params
    forth = kept + loss + more * gradients
    back = (1 + more) * gradients + block
    if host_lanes:
        back = (
            max(kept + head, min(batch, host_lanes) * (gradients - head) + 3 * head)
            + block
            + more * gradients
        )
    else:
        forth += gradients
    largest = max(map(math.prod, arch.tensors_of(config, True).values()))
    ahead = min(kept, in_flight_bytes()) if gpu else 0
    most = max(forth, back, gradients + UPDATE_ARRAYS * 4 * largest)
    return (STATE_BYTES - GRADIENT_BYTES) * params + most + ahead


def block_state_bytes(config: Mapping[str, Any], block: int | None = None) -> int:
    """A block that is trained block by block, in memory or in a checkpoint: float32 weights, and
    moments of 8 bits. block: which one; default: the largest.
    """
    sizes = [
        (math.prod(shape), group_of(shape))
        for shape in arch.layer_tensors(config, block=block).values()
    ]
    return sum(4 * n + (2 * n + 8 * n // group if group else 8 * n) for n, group in sizes)


def packed_bytes(m: ModelSize, how: QuantizationConfig) -> int:
    """Of a model in the mean bits asked for; or in 4 bits, the embedding and the head in 8."""
    how = how.affine
    head = 0 if how.target_bpw else m.head_params * (1 if m.shape.tied else 2)
    return int(((how.target_bpw or 4 + BIAS_BITS / how.q_group_size) * m.params + 4 * head) / 8)


def quantize(
    m: ModelSize, how: QuantizationConfig, windows: int, length: int, limit: int
) -> StageCost:
    """Tensor by tensor; passes over `windows` before it say what bits cost, one beside it makes up
    for errors.
    """
    how = how.affine
    # as stored, packed, and what is rounded at a time
    largest = max(m.shape.vocab, m.wide.ffn) * m.shape.hidden
    rounded = (
        (math.ceil(m.nbytes / m.params) + 2) * largest
        + 4 * min(largest, PART)
        + estimates.stacked_bytes(m)
    )
    # scales of a table, which wait for its integers
    rounded += 2 * 4 * m.side_params // how.q_group_size
    made = StageCost("quantize", m.nbytes, packed_bytes(m, how), rounded, 0.0)
    if how.q_method == "gptq":
        made = _compensated(made, m, windows * length, length, limit)
    return _sensed(made, m, windows, length, limit) if how.target_bpw is not None else made


def _compensated(
    plain: StageCost, m: ModelSize, tokens: int, length: int, limit_bytes: int
) -> StageCost:
    """`plain`, rounding tensor by tensor, with a pass beside it that makes up for the errors
    (quantization/stage). In numpy: a block's gram matrices, five of the largest to take its factor,
    8 bytes for each weight of the largest set of matrices with the same inputs, and 20 more for
    those rounded at a time. In float32 MLX takes it, with three.
    """
    s = m.wide
    queries = s.heads * s.head_dim
    keys = s.kv_heads * s.head_dim
    # in, out
    sides = [
        (s.hidden, queries + 2 * keys),
        (queries, s.hidden),
        (s.hidden, 2 * s.ffn),
        (s.ffn, s.hidden),
    ]
    square = {n: np.dtype(precision(n)).itemsize * n**2 for n, _ in sides}
    grams = sum(square[n] for n, _ in sides)
    weights = max(n * out for n, out in sides)
    widest = max(sides)[0]
    factor = (3 if precision(widest) is np.float32 else 5) * square[widest]
    beside = grams + factor + 8 * weights + 20 * min(weights, PART)
    p = streamed_pass("", m, tokens, length, length, limit_bytes, head=False, beside_bytes=beside)
    held = p.held_tokens * m.channels * m.item + m.slots_bytes
    # columns are rounded by numpy
    host = sum(_solver(n, 3 * n, 0) + n * n * out for n, out in sides)
    each = 2 * tokens * sum(n * n for n, _ in sides) + sum(
        n * n * (3 * n + out) for n, out in sides
    )
    read = plain.read_bytes + 2 * p.written_bytes
    written = plain.written_bytes + p.written_bytes
    peak = max(p.peak_bytes, plain.peak_bytes + held)
    flops = 2 * p.flops + s.layers * (each - host)
    return replace(
        p,
        name=plain.name,
        read_bytes=read,
        written_bytes=written,
        peak_bytes=peak,
        flops=flops,
        waits=2 * p.waits,
        host_flops=float(s.layers * host),
    )


def _sensed(then: StageCost, m: ModelSize, windows: int, length: int, limit: int) -> StageCost:
    """`then`, after a pass forwards and one back (bit_allocation), inputs of all blocks spooled if
    need be. Beside the block: on Metal it in float32, in all formats together (26 bits and scales),
    what its matrices see of some windows, and a slab of gradients and errors. Traffic and
    operations are those of its docstring.
    """
    window = length * m.channels * m.item
    one = streamed_pass("", m, length, length, length, head=False, spool=False)
    # Of logits three arrays were measured on a CPU, five by the way of Metal.
    head = m.head_work + estimates.logit_bytes(2 * m.shape.vocab, length, True) * (2 + m.gpu) // 2
    # In one lane 0.2 to 0.8 of it were measured, in two 0.4 to 1.2; the workspace in `one` is free
    # by then.
    back = (1 + estimates.together(m)) * estimates.backward_bytes(m.config, 1, length) // 2
    if m.gpu:  # half a stack goes back in one pass
        back *= min(windows, max(1, stacked(m.config, length, length) // 2))
    back = max(0, back - (workspace := estimates.workspace_bytes(m, length, length)))
    s = m.wide
    formats = len(BITS)
    seen = 4 * length * (4 * s.hidden + 2 * (s.heads + s.kv_heads) * s.head_dim + 3 * s.ffn)
    batch = min(windows, max(1, max(HELD_BYTES, 4 * m.block_params) // seen))
    slab = (2 * batch + 4) * 4 * min(SLAB, s.ffn * s.hidden)
    sensed = back + (4 + 4 * m.gpu) * m.block_params + batch * seen + slab
    # The workspace is gone at the head, and the head before the way back.
    peak = one.peak_bytes + max(head - workspace, sensed) + 2 * windows * window
    touched = windows * (12 + 4 * formats) + math.ceil(windows / batch) * 20 * formats
    held = min(windows, estimates.room(limit, peak, m.gpu) // (window * m.shape.layers))
    spooled = (windows - held) * window * m.shape.layers
    return replace(
        then,
        read_bytes=then.read_bytes + 2 * m.nbytes + spooled,
        written_bytes=then.written_bytes + spooled,
        peak_bytes=max(then.peak_bytes, peak + held * window * m.shape.layers),
        flops=then.flops + 4 * estimates.forward_flops(m, windows * length, length),
        waits=then.waits
        + one.waits
        + s.layers * (7 * (formats + math.ceil(windows / batch)) + windows),
        touched_bytes=then.touched_bytes + touched * s.layers * m.block_params,
        held_tokens=min(then.held_tokens or windows * length, held * length),
    )


def sensitivity(teacher: ModelSize, length: int, limit: int) -> StageCost:
    """To see on SENSED windows what every matrix of the teacher costs in fewer bits."""
    return quantize(teacher, QuantizationConfig(q_method="round"), SENSED, length, limit)


def search(
    s: Any, job: DistillationSpec, planned: Sequence[StageCost], probes: int, rows: bool, limit: int
) -> dict[str, list[StageCost]]:
    """What a search with these settings takes to rank, and to train, round and judge finalists,
    each student counted as `job`'s, whose phases are `planned`. probes: axes measured alone. rows:
    whether some students have fewer tokens.
    """
    t = job.teacher
    m = job.student
    length = job.max_seq_length
    known = estimates.TENSOR_BYTES * t.tensors
    own = known + process_bytes(max(0, limit - known))  # as in a plan, whose phases have it

    def times(p: StageCost, n: int, name: str, written: int, beside: int = own) -> StageCost:
        return replace(
            p,
            name=name,
            read_bytes=n * p.read_bytes,
            written_bytes=n * written,
            flops=n * p.flops,
            peak_bytes=p.peak_bytes + beside,
            waits=n * p.waits,
            host_flops=n * p.host_flops,
        )

    cut = next(p for p in planned if p.name == "prune")
    windows, judging = (-(-4 * n // 3) for n in (s.rank_windows, s.eval_windows))  # of two texts
    one = estimates.compared([t, m], windows, length)
    # the teacher's pass, which is done once
    passed = estimates.forward_flops(t, windows * length, length, False)
    one = replace(
        one, peak_bytes=max(one.peak_bytes, estimates.tensor_bytes(t)), flops=one.flops - passed
    )
    rank = [times(cut, 1, "calibrate", cut.written_bytes - m.nbytes, 0)]
    rank += [times(sensitivity(t, length, limit), 1, "sensitivity", 0)] if s.mixed else []
    rank.append(times(one, probes, f"{probes} axes alone", m.nbytes))
    rank.append(times(one, s.evaluations, f"rank {s.evaluations}", 2 * m.nbytes))
    if rows:
        rank.append(times(vocabulary(t, length), 1, "choose tokens", 0))
    # which a finalist does not go through
    ours = [p for p in planned if p.name not in ("prune", "measure")]
    trained = [
        times(p, s.finalists, f"{p.name}, {s.finalists} finalists", p.written_bytes, 0)
        for p in ours
    ]
    trained.append(
        times(
            estimates.compared([t, m, m, m], judging, length),
            s.finalists,
            "judge them",
            2 * m.nbytes,
        )
    )
    return {"rank": rank, "finalists": trained if s.finalists else []}
