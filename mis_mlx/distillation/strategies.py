"""The phases of a distillation, and which strategy of training fits a budget.

In bytes, operations and memory. Knows no flags, nor how the work is done. What each phase takes is
beside the modules that do it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from mis_mlx.distillation import teacher_answers
from mis_mlx.distillation.block_student import scales_cost, weights_cost
from mis_mlx.distillation.targets import store_cost
from mis_mlx.hardware.memory import PROCESS_BYTES, TRAINED_BYTES
from mis_mlx.hardware.rates import Rates
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost, in_turn
from mis_mlx.judge import other_languages
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.judge.write import answers_cost
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.passing.pass_cost import TENSOR_BYTES
from mis_mlx.planner import estimates
from mis_mlx.planner.distillation_spec import SCALES, DistillationSpec, Mode
from mis_mlx.pruning.reconstruct import repair_cost
from mis_mlx.pruning.select import pruning_cost
from mis_mlx.pruning.vocabulary import vocabulary_cost
from mis_mlx.quantization import rounded_size
from mis_mlx.quantization.stage import quantizing_cost
from mis_mlx.settings.recipe import RATE, TUNE_ITERS, DistillationConfig
from mis_mlx.types import Budget, Checkpoint, MisError, gib

RATE_OF_WEIGHTS = 5.35e-4  # learning rate, as a part of their root mean square
# Losses are expected, not measured: from one student each (benchmarks/README.md).
# of the default teacher's student in 4.37 bits: as rounded by GPTQ, and with tuned scales
UNTUNED_LOSS = 0.149 / 0.129
# The share of the loss on the teacher's answers that learning leaves of a smaller FFN: a third of
# the neurons gone with a quarter of the tokens, 30 steps (benchmarks/lose.py).
FFN_LOSS_LEFT = 0.68
WITH_TEXT = "vocabulary", teacher_answers.PHASE, "measure"


def measuring_cost(job: DistillationSpec, limit: int) -> StageCost:
    """Teacher, pruned, distilled and 4-bit student on every text.

    Models answer prompts at the end, where the student can write in the budget `limit`.
    """
    four_bit = rounded_size.rounded_size(job.student, job.rounding)
    result = four_bit if job.rounds else job.student
    teacher = job.whole_teacher
    compared = [job.teacher]
    if not job.uncut:
        compared += [job.student, job.student]
    if job.rounds:
        compared.append(four_bit)
    stages = _on_texts(job, compared)
    if teacher.shape.vocab != job.student.shape.vocab:  # it reads with its own tokens, too
        stages += [*_on_texts(job, [teacher]), other_languages.excess_cost([teacher, result])]
    students = [result]
    if job.rounds and (not job.uncut or teacher.shape.vocab != job.student.shape.vocab):
        students.insert(0, job.student)
    if job.answers:
        with suppress(MisError):  # the student cannot write in the budget, so nobody is asked
            answers = answers_cost(
                [teacher, *students],
                job.answers,
                Budget(limit),
                teacher_kept=job.answers_known,
                silent=len(students) - 1,
            )
            stages.append(answers)
    return in_turn("measure", *stages)


def _on_texts(job: DistillationSpec, models: list[ModelSize]) -> list[StageCost]:
    """The passes of models over the held-out windows of the first text, and of the other one."""
    first = comparison_cost(models, job.eval_windows, job.max_seq_length)
    other = comparison_cost(models, max(1, job.eval_windows // 3), job.max_seq_length)
    return [first, other]


def usual_rate(teacher: Checkpoint) -> float:
    """AdamW's learning rate for a student that was repaired.

    As large a part of the teacher's weights as 1e-4 is of SmolLM2-135M's; that suits Gemma, too. By
    the attention of the middle block, a matrix at a time.
    """
    middle = shape_of(teacher.config).layers // 2
    while not family(teacher.config).attends(middle):
        middle = (middle + 1) % shape_of(teacher.config).layers
    prefix = f"model.layers.{middle}.self_attn."
    squares = []
    for name, shape in arch.tensors_of(teacher.config).items():
        if name.startswith(prefix) and len(shape) > 1:
            weight = load.dense(teacher, name).astype(mx.float32)
            squares.append(mx.square(weight).mean().item())
            del weight  # not beside the next one
    rms = (sum(squares) / len(squares)) ** 0.5
    return float(f"{rms * RATE_OF_WEIGHTS:.1e}")


def process_around(job: DistillationSpec, *, trains: bool) -> int:
    """Bytes of the process itself around a stage, which no phase has in it.

    With Python's notes on the teacher's tensors, and with what streams add that train.
    """
    known = TENSOR_BYTES * job.teacher.tensors
    of_streams = 0
    if trains and not job.teacher.gpu:
        of_streams = pass_cost.parallel_windows(job.student) * TRAINED_BYTES
    return known + PROCESS_BYTES + of_streams


@dataclass(frozen=True)
class MemoryPlan:
    """One strategy for the job under a budget."""

    job: DistillationSpec
    budget_bytes: int
    rates: Rates
    mode: Mode
    micro_batch: int  # windows
    shard_layers: int  # trainable at a time; 0: all
    phases: tuple[StageCost, ...]

    def needed_bytes(self, stage: StageCost) -> int:
        """What a stage of this job needs of a budget, with the process and text around it."""
        text = self.job.whole_teacher.text_bytes if stage.name in WITH_TEXT else 0
        return stage.peak_bytes + text + process_around(self.job, trains=bool(stage.updated))

    @property
    def peak_bytes(self) -> int:
        """Of the largest phase, with the process around it, or of opening the tokenizer."""
        opening_bytes = self.job.whole_teacher.opening_bytes
        return max(opening_bytes, *map(self.needed_bytes, self.phases))

    @property
    def strategy(self) -> dict[str, Any]:
        """The strategy that a resumed run must not change, as arguments of `plan_strategy`."""
        return {
            "mode": self.mode,
            "micro": self.micro_batch,
            "shard": self.shard_layers,
            "tuned": self.tuning_steps,
        }

    def recipe(self, asked: DistillationConfig, teacher: Checkpoint) -> DistillationConfig:
        """The recipe that was asked for, with micro-batches as planned.

        Where all blocks learn at once, the usual rate knows the size of the teacher's weights: at
        1e-4 a Gemma unlearned its repair (benchmarks/README.md).
        """
        parts = asked.grad_accumulation_steps * self.job.batch_size // self.micro_batch
        rate = asked.learning_rate
        if not rate:
            rate = usual_rate(teacher) if self.mode == "blocks" else RATE
        return replace(
            asked,
            iters=self.job.iters,
            batch_size=self.micro_batch,
            grad_accumulation_steps=parts,
            learning_rate=rate,
        )

    def held_windows(self, name: str) -> int:
        """How many windows of hidden states the phase of this name keeps in memory."""
        return next((p.stays.get(WINDOWS, 0) for p in self.phases if p.name == name), 0)

    @property
    def tuning_steps(self) -> int:
        """Steps after rounding."""
        if all(p.name != SCALES for p in self.phases):
            return 0
        return self.job.rounding.steps(TUNE_ITERS)

    @property
    def fits(self) -> bool:
        """Whether every phase keeps to the budget."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def planned(self) -> dict[str, float]:
        """Seconds by phase, in their order, the machine cool."""
        return {p.name: p.seconds(self.rates) for p in self.phases}


def in_parts(job: DistillationSpec, mode: Mode) -> int:
    """Bytes of a number in the files in which a student is repaired block by block.

    0: it is repaired in memory, or not at all, as all mixtures.
    """
    if job.student.shape.experts:
        return 0
    return {"sharded": 4, "none": 2 * bool(job.reconstruct_samples)}.get(mode, 0)


def candidate_strategies(job: DistillationSpec) -> Iterator[dict[str, Any]]:
    """All strategies that could be tried: mode, micro-batch and shard of `plan_strategy`.

    A micro-batch divides the one asked for.
    """
    all_but_one = max(1, job.student.shape.layers - 1)
    for micro in range(job.batch_size, 0, -1):
        for mode in job.modes if job.batch_size % micro == 0 else ():
            shards = range(all_but_one, 0, -1) if mode == "sharded" else [0]
            for shard in shards:
                yield {"mode": mode, "micro": micro, "shard": shard}


def plan_strategy(
    job: DistillationSpec,
    limit: int,
    rates: Rates,
    *,
    mode: Mode,
    micro: int,
    shard: int,
    tuned: int | None = None,
) -> MemoryPlan:
    """The plan of one strategy, whether it fits or not.

    tuned: steps after rounding; None: as asked for, else the usual number if they fit.
    """
    left = max(0, limit - TENSOR_BYTES * job.teacher.tensors)
    own = process_around(job, trains=False)
    training = process_around(job, trains=True)
    trained_left = left - (training - own)
    phases = teacher_answers.answering_cost(job, left)
    shown = job.shown if job.whole_teacher.shape != job.teacher.shape else None
    if not (job.viewed or job.rounds_only):
        pruning = pruning_cost(
            job.teacher,
            job.student.nbytes,
            windows=0 if job.uncut else job.num_samples,
            length=job.max_seq_length,
            limit=left,
            rotation=job.rotation,
            shown=shown,
        )
        phases.append(pruning)
    elif shown and job.viewed:
        phases.append(vocabulary_cost(shown, job.max_seq_length))
    if mode != "none":
        phases.append(store_cost(job, left))
    if job.reconstruct_samples:
        phases.append(repair_cost(job, left, in_parts(job, mode)))
    if mode != "none":
        phases.append(weights_cost(job, micro, shard, trained_left))
    phases.append(
        quantizing_cost(
            job.student,
            job.rounding,
            windows=job.num_samples,
            length=job.max_seq_length,
            limit=left,
        )
    )
    steps = job.rounding.steps(TUNE_ITERS) if tuned is None else tuned
    if steps:
        tuning = scales_cost(job, micro, trained_left, steps)
        needed = max(tuning.peak_bytes + training, store_cost(job, left).peak_bytes + own)
        if needed <= limit or tuned is not None or job.rounding.q_iters is not None:
            if mode == "none":  # nothing has needed targets before
                phases.append(store_cost(replace(job, iters=1), left))
            phases.append(tuning)
    if not job.rounds_only:
        phases.append(measuring_cost(job, left))
    return MemoryPlan(job, limit, rates, mode, micro, shard, tuple(phases))


def best_plan(job: DistillationSpec, budget_bytes: int, rates: Rates) -> MemoryPlan:
    """The best plan that fits, else the one of least memory.

    First by `job.modes`, then with scales that are tuned, then micro-batch, then bytes read.
    """
    plans = [plan_strategy(job, budget_bytes, rates, **way) for way in candidate_strategies(job)]
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return min(plans, key=lambda p: p.peak_bytes)
    return min(
        fitting,
        key=lambda p: (
            job.modes.index(p.mode),
            not p.tuning_steps,
            -p.micro_batch,
            sum(f.read_bytes for f in p.phases),
        ),
    )


def least_bytes(job: DistillationSpec, rates: Rates) -> int:
    """The smallest budget in which some strategy for the job fits.

    One window and one block at a time: more only takes more.
    """
    ways = [w for w in candidate_strategies(job) if w["micro"] == 1 and w["shard"] <= 1]
    least = 0
    while True:
        need = min(plan_strategy(job, least, rates, **way).peak_bytes for way in ways)
        if need <= least:
            return least
        least = need


def remedy(plan: MemoryPlan) -> str:
    """What would make it fit, in one sentence with both numbers; empty when it fits."""
    if plan.fits:
        return ""
    worst = max(plan.phases, key=plan.needed_bytes).name
    if plan.peak_bytes == plan.job.whole_teacher.opening_bytes:
        worst = "opening the tokenizer"
    least = estimates.budget_flag(least_bytes(plan.job, plan.rates))
    text = (
        f"{worst} needs {gib(plan.peak_bytes)}, but the budget is {gib(plan.budget_bytes)}: "
        f"give --budget {least}"
    )
    for flags, job in _smaller_jobs(plan.job):
        if best_plan(job, plan.budget_bytes, plan.rates).fits:
            return f"{text}, or {flags}"
    return f"{text}; smaller batches or shorter windows do not help"


def _smaller_jobs(job: DistillationSpec) -> Iterator[tuple[str, DistillationSpec]]:
    """(flags, the job with them) that take less memory."""
    if job.reconstruct_samples:
        yield "--reconstruct-samples 0", replace(job, reconstruct_samples=0)
    if job.rounding.looks:
        flags = "--q-method round"
        if job.rounding.target_bpw is not None:
            flags += " without --target-bpw"
        yield flags, replace(job, rounding=job.rounding.blind)
    if job.rounding.steps(TUNE_ITERS):
        yield "--q-iters 0", replace(job, rounding=replace(job.rounding, q_iters=0))
    length = job.max_seq_length
    for halvings in range(1, 8):
        shorter = length >> halvings
        if shorter >= 16:
            flags = f"--max-seq-length {shorter} instead of {length}"
            yield flags, replace(job, max_seq_length=shorter)


class LeftOut(NamedTuple):
    """A part of a run that does not fit. budget_bytes: the least that would have it.

    loss: what the student should lose without it, as a multiple of what it loses with it; of
    training that is a bound.
    """

    name: str
    budget_bytes: int
    loss: float


def left_out(plan: MemoryPlan) -> list[LeftOut]:
    """What nobody has turned off, and the budget is too small for; [] where nothing fits."""
    if not plan.fits:
        return []
    parts = list[LeftOut]()
    job = plan.job
    if plan.mode == "none" and len(job.modes) > 1:
        training = replace(job, modes=job.modes[:-1])
        # At most all that learning wins back of fewer neurons. Of other cuts nobody measured it.
        cut = job.whole_teacher.shape.ffn != job.student.shape.ffn
        untrained = 1 / FFN_LOSS_LEFT if cut else 1.0
        parts.append(LeftOut("training", least_bytes(training, plan.rates), untrained))
    if not plan.tuning_steps and job.rounding.q_iters is None:
        rounding = replace(job.rounding, q_iters=TUNE_ITERS)
        tuning = replace(job, modes=(plan.mode,), rounding=rounding)
        least = least_bytes(tuning, plan.rates)
        parts.append(LeftOut("distillation of scales", least, UNTUNED_LOSS))
    return parts


def loss_factor(parts: Sequence[LeftOut]) -> float:
    """What a student should lose without these, as a multiple of what it would lose with them."""
    return math.prod(part.loss for part in parts)
