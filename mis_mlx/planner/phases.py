"""The phases of a distillation in bytes, operations and memory, and which way of training fits a
budget.

Knows no flags, nor how the work is done. `resident`: the student fits with gradients and moments.
`blocks`: with 8-bit moments and one block's gradient. `lora`: only adapters change. `sharded`:
streamed, some blocks trainable at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mis_mlx.hardware.memory import TRAINED_BYTES, TRAINED_WHOLE_BYTES, process_bytes
from mis_mlx.hardware.rates import Rates
from mis_mlx.models import arch, load
from mis_mlx.models.config import shape_of
from mis_mlx.planner import compression_size, estimates, writing
from mis_mlx.planner.compression_size import (
    GRADIENT_BYTES,
    STATE_BYTES,
    block_state_bytes,
    prune,
    repair,
    repair_parts,
)
from mis_mlx.planner.estimates import TENSOR_BYTES, StageCost, forward_flops, room, streamed_pass
from mis_mlx.planner.recipe import ADAPTERS, PLAIN, RATE, DistillationConfig, DistillationSpec, Mode
from mis_mlx.types import Budget, Checkpoint, MisError, gib

TRAINED_WHOLE = "resident", "blocks", "lora"  # the student, in memory
SAVED_BYTES = 12  # of a trained parameter in a checkpoint: weight and two moments
PACKED_UPDATE_ARRAYS = 4  # opened moments, a new weight, and codes (measured)
RATE_OF_WEIGHTS = 5.35e-4  # learning rate, as a part of their root mean square
TEXTS = 2  # held-out texts that models are measured on


def store(job: DistillationSpec, limit: int) -> StageCost:
    """The teacher's sampled logits for all training tokens: one pass for as many windows as memory
    takes.
    """
    t = job.teacher
    length = job.max_seq_length
    steps = max(job.iters, job.rounding.steps(True))
    windows = steps * job.batch_size * job.grad_accumulation_steps
    one = streamed_pass("", t, length, length, length, spool=False)
    window = length * t.channels * t.item + estimates.side_bytes(t, length)
    at_once = 1 + min(room(limit, one.peak_bytes, t.gpu) // window, windows - 1)
    read = math.ceil(windows / at_once) * one.read_bytes
    written = windows * length * job.target_bytes
    peak = one.peak_bytes + (at_once - 1) * window
    return StageCost(
        "logit store", read, written, peak, windows * one.flops, held_tokens=at_once * length
    )


def resident(job: DistillationSpec, micro: int, limit: int) -> StageCost:
    """The student whole in memory; beside it as much of the teacher as there is room for, or its
    store.
    """
    m = job.student
    length = job.max_seq_length
    more = job.step > micro * length
    nbytes = compression_size.training_bytes(
        m.config, micro, length, job.host_lanes, more, gpu=m.gpu
    )
    one = StageCost(
        "distil",
        m.nbytes,
        m.nbytes,
        nbytes,
        3 * forward_flops(m, job.step, length),
        updated=m.params,
    )
    return _taught(
        job,
        one,
        micro,
        limit,
        SAVED_BYTES * m.params,
        estimates.activation_bytes(m.config, micro, length),
    )


def blocks(job: DistillationSpec, micro: int, limit: int, lora: bool = False) -> StageCost:
    """The student's blocks in memory, updated one after the other (distillation/sharded); the
    teacher as in `resident`. lora: only their adapters, beside weights in the type that the policy
    gives.
    """
    m = job.student
    layers = job.student.shape.layers
    state = sum(block_state_bytes(m.config, i) for i in range(layers))
    trained = m.blocks_params // layers
    work = way_back_bytes(job, micro, ADAPTERS.rank * lora)
    if lora:
        trained = ADAPTERS.params(m.config) // layers
        state = m.blocks_params * m.item + layers * STATE_BYTES * trained
    flops = (
        4 * forward_flops(m, job.step, job.max_seq_length, False) + 4.0 * job.step * m.head_params
    )
    plain = StageCost("distil", m.nbytes, m.nbytes, state + work, flops, updated=layers * trained)
    return _taught(job, plain, micro, limit, state, work - 4 * m.head_params, job.same_head)


def way_back_bytes(job: DistillationSpec, micro: int, rank: int = 0) -> int:
    """What a step in micro-batches of `micro` windows holds while a student is trained block by
    block (distillation/sharded), beside its weights and moments: what entered each block, the head,
    and the largest of: the loss, the way back of a block, its update. Windows side by side have a
    gradient each. rank: of adapters.
    """
    m = job.student
    length = job.max_seq_length
    lanes = estimates.together(job.student)
    host = bool(job.host_lanes)
    # micro-batches than one, whose gradients add up
    s = m.shape
    more = job.step > micro * length
    sizes = [
        rank * sum(shape) if rank else math.prod(shape)
        for shape in arch.layer_tensors(m.config).values()
    ]
    gradient = 4 * sum(sizes)
    back = estimates.backward_bytes(m.config, micro, length) + (min(lanes, micro) + more) * gradient
    loss = estimates.logit_bytes(s.vocab, micro * length, host, gpu=m.gpu)
    loss += (
        estimates.activation_bytes(m.config, micro, length) // s.layers + more * gradient
        if host
        else back
    )
    update = gradient + lanes * PACKED_UPDATE_ARRAYS * 4 * max(sizes)
    ahead = m.in_flight(estimates.activation_bytes(m.config, micro, length) // s.layers)
    sides = estimates.side_bytes(replace(m, item=4), job.step)
    states = 4 * (s.layers * job.step * m.channels + s.vocab * s.hidden)
    return estimates.SMALL_BYTES + sides + states + max(loss, back, update) + ahead


def tune(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """The packed student whole in memory, its scales learning: integers; float copies a lane; one
    block's gradient.
    """
    m = job.student
    s = job.student.shape
    trained = 2 * m.blocks_params // job.rounding.q_group_size
    nbytes = compression_size.packed_bytes(m, job.rounding)
    head = m.head_params * 4 * (1 if s.tied else 2)
    head += estimates.logit_bytes(
        s.vocab, micro * job.max_seq_length, bool(job.host_lanes), gpu=m.gpu
    )
    work = estimates.activation_bytes(m.config, micro, job.max_seq_length)
    # those of micro-batches add up
    state = STATE_BYTES + GRADIENT_BYTES * (job.step > micro * job.max_seq_length)
    copies = 2 * 4 * max(1, min(micro, job.host_lanes))  # a window goes through one lane
    sides = m.side_params * (1 if m.gpu else 4)  # packed, or de-quantized
    copied = (1 + copies) * m.blocks_params + 4 * m.block_params
    peak = copied + state * trained + head + work + sides + m.in_flight(work)
    plain = StageCost(
        "tune",
        nbytes,
        nbytes,
        peak,
        3 * forward_flops(m, job.step, job.max_seq_length),
        updated=trained,
    )
    return _taught(replace(job, iters=iters), plain, micro, limit, SAVED_BYTES * trained, work)


def _taught(
    job: DistillationSpec,
    plain: StageCost,
    micro: int,
    limit: int,
    saved: int,
    work: int,
    same_head: bool = False,
) -> StageCost:
    """`plain`, a student whole in memory and one step of it, with all its steps, its checkpoints of
    `saved` bytes, its teacher. work: of its bytes those held only after the teacher's pass.
    same_head: which the student has anyway.
    """
    t = job.teacher
    length = job.max_seq_length
    iters = job.iters
    peak = plain.peak_bytes
    flops = plain.flops
    keeps = 0
    read = iters * job.step * job.target_bytes
    if job.targets == "live":
        # The teacher's workspace and the student's activations do not meet, its head and hidden
        # states do.
        peak += max(
            0, t.body_bytes(estimates.pass_workspace(t, job.step, micro * length, length)) - work
        )
        peak += t.slots_bytes + (t.head_work + t.widened_bytes) * (not same_head)
        peak += job.step * t.channels * t.item + estimates.side_bytes(t, job.step)
        keeps = estimates.pins(t, room(limit, peak, t.gpu))
        read = t.head_bytes * (not same_head) + t.block_bytes * (
            keeps + iters * (t.shape.layers - keeps)
        )
        flops += forward_flops(t, job.step, length)
    written = plain.written_bytes + (iters // job.save_every + 2) * saved
    peak = peak + keeps * t.block_work
    read = plain.read_bytes + read
    micros = job.step // (micro * length)
    # of a step: loss and gradients of every micro-batch, the norm, the update
    waits = 2 * micros + 2
    if job.targets == "live":
        waits += streamed_pass(
            "", t, job.step, micro * length, length, head=False, spool=False
        ).waits
    return replace(
        plain,
        read_bytes=read,
        written_bytes=written,
        peak_bytes=peak,
        flops=iters * flops,
        pinned=keeps,
        updated=iters * plain.updated,
        waits=iters * waits,
    )


def sharded(job: DistillationSpec, micro: int, shard: int) -> StageCost:
    """The student streamed from float32 files, `shard` blocks in memory and trained
    (distillation/sharded).
    """
    t = job.teacher
    m = job.student
    length = job.max_seq_length
    s = m.shape
    b = m.block_params
    shards = math.ceil(m.shape.layers / shard)
    visits = math.ceil(job.iters / steps_per_shard(job, shard))
    # blocks above each shard
    over = [s.layers - min(s.layers, (i + 1) * shard) for i in range(shards)]
    # the last one turns in memory
    above, again = (sum(n) / shards for n in (over, [max(0, n - 1) for n in over]))
    state = shard * block_state_bytes(m.config)
    peak = 2 * 4 * b + state + way_back_bytes(job, micro)
    read = 4.0 * b * (s.layers - shard + again)
    forward = forward_flops(m, job.step, length, False) / s.layers  # of a block
    flops = forward * (s.layers - 1 + 2 * above + 3 * shard) + 4.0 * job.step * m.head_params
    if job.targets == "live":
        signal = streamed_pass("", t, job.step, micro * length, length, head=False, spool=False)
        peak = peak + signal.peak_bytes + t.head_work * (not job.same_head)
        read = read + signal.read_bytes
        flops += forward_flops(t, job.step, length)
    else:
        read += job.step * job.target_bytes
    trained = 4 * b * min(s.layers, visits * shard)
    read = job.iters * read + visits * 4 * m.head_params + trained
    # A resume needs one checkpoint of every visit.
    written = trained + state * max(job.iters // job.save_every + 2, 2 * visits)
    updated = job.iters * b * shard
    return StageCost("distil", int(read), written, peak, job.iters * flops, updated=updated)


def steps_per_shard(job: DistillationSpec, shard: int) -> int:
    """Steps that a shard is trained before the next one comes: all have had their turn when the run
    ends.
    """
    return math.ceil(job.iters / math.ceil(job.student.shape.layers / shard))


def measure(job: DistillationSpec, most_bytes: int, limit: int) -> StageCost:
    """Teacher, pruned, distilled and 4-bit student on every text; then those that fit the budget
    are timed, side by side where the phases before, which took `most_bytes`, leave room for all of
    them, else one by one.
    """
    four = replace(
        job.student, nbytes=compression_size.packed_bytes(job.student, job.rounding), packed=True
    )
    models = [job.shown or job.teacher, job.student, job.student, four]
    one = estimates.compared(models, job.eval_windows, job.max_seq_length)
    whole = [m.nbytes if m.packed else m.params * m.item for m in models]
    alone = [n for m, n in zip(models, whole, strict=True) if timed_bytes(m.params) <= limit]
    timed = (
        sum(whole)
        if sum(timed_bytes(m.params) for m in models) <= most_bytes
        else max(alone, default=0)
    )
    # its head, while it is converted
    peak = max(one.peak_bytes, timed and timed + 2 * models[0].head_params)
    texts = replace(
        one,
        read_bytes=TEXTS * one.read_bytes,
        peak_bytes=peak,
        flops=TEXTS * one.flops,
        waits=TEXTS * one.waits,
    )
    if not job.answers:
        return texts
    students = [job.student, four] if job.rounding is not PLAIN else [job.student]
    asked = [models[0], *students]
    try:
        said = writing.answers(
            asked,
            job.answers,
            Budget(limit),
            teacher_kept=job.answers_known,
            silent=len(students) - 1,
        )
    except MisError:  # the student cannot write in the budget, so nobody is asked
        return texts
    return replace(
        texts,
        read_bytes=texts.read_bytes + said.read_bytes,
        peak_bytes=max(texts.peak_bytes, said.peak_bytes),
        flops=texts.flops + said.flops,
        touched_bytes=texts.touched_bytes + said.touched_bytes,
        waits=texts.waits + said.waits,
    )


def timed_bytes(params: int) -> int:
    """Memory of stock mlx-lm with a model of so many parameters whole: as stored, and as
    float32.
    """
    return 6 * params


def usual_rate(teacher: Checkpoint) -> float:
    """AdamW's learning rate for a student that was repaired: as large a part of the teacher's
    weights as 1e-4 is of SmolLM2-135M's, which is what suits Gemma, too. By the attention of the
    middle block, a matrix at a time.
    """
    at = f"model.layers.{shape_of(teacher.config).layers // 2}.self_attn."
    names = [
        n
        for n, shape in arch.tensors_of(teacher.config).items()
        if n.startswith(at) and len(shape) > 1
    ]
    squares = [mx.square(load.dense(teacher, n).astype(mx.float32)).mean().item() for n in names]
    return float(f"{(sum(squares) / len(squares)) ** 0.5 * RATE_OF_WEIGHTS:.1e}")


@dataclass(frozen=True)
class MemoryPlan:
    """One way to do the job under a budget."""

    job: DistillationSpec
    budget_bytes: int
    rates: Rates
    mode: Mode
    micro_batch: int  # windows
    shard_layers: int  # trainable at a time; 0: all
    phases: tuple[StageCost, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the largest phase."""
        return max(p.peak_bytes for p in self.phases)

    @property
    def way(self) -> dict[str, Any]:
        """What a resumed run must not change, as arguments of `one`."""
        return {
            "mode": self.mode,
            "micro": self.micro_batch,
            "shard": self.shard_layers,
            "tuned": self.tuned,
        }

    def recipe(self, asked: DistillationConfig, teacher: Checkpoint) -> DistillationConfig:
        """The recipe that was asked for, with micro-batches as planned. Where all blocks learn at
        once, the usual rate knows the size of the teacher's weights: at 1e-4 a Gemma unlearned its
        repair (benchmarks/README.md).
        """
        parts = asked.grad_accumulation_steps * self.job.batch_size // self.micro_batch
        rate = asked.learning_rate or (
            usual_rate(teacher) if self.mode in ("resident", "blocks") else RATE
        )
        return replace(
            asked,
            iters=self.job.iters,
            batch_size=self.micro_batch,
            grad_accumulation_steps=parts,
            learning_rate=rate,
        )

    def held_windows(self, name: str) -> int:
        """How many windows of hidden states the phase of this name keeps in memory."""
        return next(p.held_tokens for p in self.phases if p.name == name) // self.job.max_seq_length

    @property
    def tuned(self) -> int:
        """Steps after rounding."""
        whole = self.mode in TRAINED_WHOLE or self.job.uncut
        return any(p.name == "tune" for p in self.phases) * self.job.rounding.steps(whole)

    @property
    def fits(self) -> bool:
        """Whether every phase keeps to the budget."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def planned(self) -> dict[str, float]:
        """Seconds by phase, in their order, the machine cool."""
        return {p.name: p.seconds(self.rates) for p in self.phases}

    @property
    def pinned(self) -> int:
        """Teacher blocks that stay in memory during training."""
        return next((p.pinned for p in self.phases if p.name in ("distil", "tune")), 0)


def in_parts(job: DistillationSpec, mode: Mode) -> int:
    """Bytes of a number in the files in which a student is repaired block by block; 0: in memory,
    as all mixtures.
    """
    return 0 if job.student.shape.experts else {"sharded": 4, "none": 2}.get(mode, 0)


def ways(job: DistillationSpec) -> Iterator[tuple[Mode, int, int]]:
    """(mode, micro-batch, shard) of all that could be tried; a micro-batch divides the one asked
    for.
    """
    small = [n for n in range(1, math.isqrt(job.batch_size) + 1) if job.batch_size % n == 0]
    for micro in sorted({*small, *(job.batch_size // n for n in small)}, reverse=True):
        for mode in job.modes:
            for shard in (
                range(max(1, job.student.shape.layers - 1), 0, -1) if mode == "sharded" else (0,)
            ):
                yield mode, micro, shard


def one(
    job: DistillationSpec,
    limit: int,
    rates: Rates,
    mode: Mode,
    micro: int,
    shard: int,
    tuned: int | None = None,
) -> MemoryPlan:
    """The plan of one way, fit or not. tuned: steps after rounding; None: as asked for, else the
    usual if they fit.
    """
    known = TENSOR_BYTES * job.teacher.tensors
    left = max(0, limit - known)
    lane = TRAINED_WHOLE_BYTES if mode == "resident" else TRAINED_BYTES
    own = known + process_bytes(left, job.teacher.gpu)
    more = (
        known + process_bytes(left, job.teacher.gpu, estimates.together(job.student) * lane) - own
    )
    phases = [prune(job, left), *([store(job, left)] if job.targets == "cached" else [])]
    whole = mode in TRAINED_WHOLE
    if job.reconstruct_samples:
        phases.append(
            repair_parts(job, left, item) if (item := in_parts(job, mode)) else repair(job)
        )
    if mode == "resident":
        phases.append(resident(job, micro, left - more))
    elif mode != "none":
        phases.append(
            blocks(job, micro, left - more, mode == "lora") if whole else sharded(job, micro, shard)
        )
    phases.append(
        compression_size.quantize(
            job.student, job.rounding, job.num_samples, job.max_seq_length, left
        )
    )
    steps = job.rounding.steps(whole or job.uncut) if tuned is None else tuned
    extra = [tune(job, micro, left - more, steps)] if steps else []
    optional = tuned is None and job.rounding.q_iters is None
    phases += [p for p in extra if not optional or p.peak_bytes + own + more <= limit]
    phases.append(measure(job, max(p.peak_bytes for p in phases) + own, limit))
    phases = [replace(p, peak_bytes=p.peak_bytes + own + more * bool(p.updated)) for p in phases]
    return MemoryPlan(job, limit, rates, mode, micro, shard, tuple(phases))


def make(job: DistillationSpec, budget_bytes: int, rates: Rates) -> MemoryPlan:
    """The best plan that fits: first by `job.modes`, then micro-batch, then bytes read; else that
    of least memory.
    """
    plans = [one(job, budget_bytes, rates, *way) for way in ways(job)]
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return min(plans, key=lambda p: p.peak_bytes)
    return min(
        fitting,
        key=lambda p: (
            job.modes.index(p.mode),
            -p.micro_batch,
            sum(f.read_bytes for f in p.phases),
        ),
    )


def least_bytes(job: DistillationSpec, rates: Rates) -> int:
    """The smallest budget in which some way of doing the job fits."""
    least = 0
    while (need := min(one(job, least, rates, *way).peak_bytes for way in ways(job))) > least:
        least = need
    return least


def remedy(plan: MemoryPlan) -> str:
    """What would make it fit, in one sentence with both numbers; empty when it fits."""
    if plan.fits:
        return ""
    job = plan.job
    worst = max(plan.phases, key=lambda p: p.peak_bytes)
    least = estimates.flag(least_bytes(job, plan.rates))
    text = (
        f"{worst.name} needs {gib(worst.peak_bytes)}, the budget is {gib(plan.budget_bytes)}: "
        f"give --budget {least}"
    )
    tries = (
        [("--reconstruct-samples 0", replace(job, reconstruct_samples=0))]
        if job.reconstruct_samples
        else []
    )
    if job.rounding.looks:
        flags = "--q-method round" + (
            " without --target-bpw" if job.rounding.target_bpw is not None else ""
        )
        tries.append(
            (flags, replace(job, rounding=replace(job.rounding, q_method="round", target_bpw=None)))
        )
    if job.rounding.steps(True):
        tries.append(("--q-iters 0", replace(job, rounding=replace(job.rounding, q_iters=0))))
    length = job.max_seq_length
    shorter = [n for n in (length >> k for k in range(1, 8)) if n >= 16]
    tries += [
        (f"--max-seq-length {n} instead of {length}", replace(job, max_seq_length=n))
        for n in shorter
    ]
    fitting = [name for name, other in tries if make(other, plan.budget_bytes, plan.rates).fits]
    return (
        f"{text}, or {fitting[0]}"
        if fitting
        else f"{text}; smaller batches or shorter windows do not help"
    )
