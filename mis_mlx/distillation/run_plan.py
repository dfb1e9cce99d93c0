"""What a run of `distill` is, resolved once from its flags, and the way that fits.

Stages are given what they need of it, by name. No stage asks for a flag, and a run that goes on is
resolved to what it was.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.distillation import conversations, pipeline, strategies, teacher_answers
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.hardware import memory
from mis_mlx.judge import answers
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.opening.resolve import REPO_ID
from mis_mlx.planner import estimates, measured_block
from mis_mlx.planner.distillation_spec import DistillationSpec, spec_of
from mis_mlx.pruning import select, vocabulary
from mis_mlx.quantization import packed_format, stage
from mis_mlx.runs.run_loop import OpenRun
from mis_mlx.settings.parts import part_of
from mis_mlx.settings.recipe import (
    EVAL_PROMPTS,
    ROUND_TO_NEAREST,
    DistillationConfig,
    QuantizationConfig,
)
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, Checkpoint

WRITES = "teacher_writes"  # in plan.json, beside the strategy


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with everything decided.

    teacher: with its own vocabulary. settings: the flags, with scenario, vocabulary, bits, steps,
    learning rate and prompts as decided. rows: of the student's vocabulary. expected_loss: in bits
    per byte, as the report says it, where a search chose the sizes. strategy: how the student
    trains, and whether the teacher writes, for plan.json. plan: what all that takes on this
    machine.
    """

    teacher: Checkpoint
    settings: DistillFlags
    rows: int
    expected_loss: float | None
    strategy: Mapping[str, Any]
    # It rests on rates and the budget, which may be others when a run goes on.
    plan: strategies.MemoryPlan = field(compare=False)

    @property
    def name(self) -> str:
        """Of the run's folder, without its number."""
        return f"{self.teacher.path.name}-{self.settings.scenario or 'student'}"

    @property
    def budget(self) -> Budget:
        """The memory that the run may take."""
        return Budget(self.plan.budget_bytes)

    @property
    def recipe(self) -> DistillationConfig:
        """Steps as decided, in micro-batches as planned."""
        return self.plan.recipe(part_of(DistillationConfig, vars(self.settings)), self.teacher)

    @property
    def pruning(self) -> select.PruningConfig:
        """What is cut."""
        return part_of(select.PruningConfig, vars(self.settings))

    @property
    def rounding(self) -> QuantizationConfig | None:
        """How the student is rounded; None: its weights stay as they were trained."""
        return _rounding(self.settings)

    @property
    def text(self) -> conversations.Wanted:
        """The text of its steps."""
        return _wanted(self.settings, self.plan.job.iters)

    @property
    def stored(self) -> dict[str, Any]:
        """The settings that the run's folder keeps, by name."""
        values = asdict(self.settings).items()
        return {name: value for name, value in values if name not in run_folder.NOT_STORED}

    @property
    def given(self) -> dict[str, Any]:
        """Those of them that are not the defaults."""
        defaults = asdict(type(self.settings)())
        return {name: value for name, value in self.stored.items() if value != defaults[name]}


def resolve(
    asked: DistillFlags, sizes: Mapping[str, Any], teacher: Checkpoint, folder: Path | None
) -> ResolvedRun:
    """Decide everything that the flags leave open.

    sizes: settings that a search chose for them. folder: of a run that goes on, which keeps the
    strategy that it began with, whatever the budget. MisError where the flags cannot be met. That
    the plan fits the budget is not checked.
    """
    budget = memory.budget(asked.budget_bytes)
    limit = budget.limit_bytes
    # Decided, too: what is free on another day does not change a run that goes on.
    decided = {**sizes, "budget": asked.budget or estimates.budget_flag(limit)}
    # What is of this call alone, such as --resume, is no part of the run.
    plain = asdict(type(asked)())
    decided |= {name: plain[name] for name in run_folder.NOT_STORED if name in plain}
    s = replace(asked, **decided)
    rounding = part_of(QuantizationConfig, vars(s))
    s = replace(s, **packed_format.of_mixture(teacher.config, rounding))
    if s.student is None:
        s = replace(s, **vocabulary.defaults(s.scenario, s.vocab, teacher.config, teacher.path))
    rows = vocabulary.rows_left(teacher, part_of(select.PruningConfig, vars(s)), s.student)
    job = measured_block.of_job(_job(s, teacher, rows, budget), limit)
    before = run_folder.stored_settings(folder, run_folder.PLAN) if folder else {}
    writes: bool | None = before.pop(WRITES, None)
    writing = conversations.asked_of(teacher, _wanted(s, job.iters))
    if writing is not None:
        known = conversations.file_of(teacher, writing).exists()
        # A run that goes on does not choose again, whatever it may take by now.
        if writes is None:
            writes = known or teacher_answers.is_whole(job.whole_teacher, writing, budget)
        job = replace(
            job,
            conversations=len(writing.prompts) if writes and not known else 0,
            asks_tools=any(prompt.tools for prompt in writing.prompts),
            teacher_writes=writes,
        )
    rates = estimates.machine_rates()
    strategy = before or strategies.best_plan(job, limit, rates).strategy
    plan = strategies.plan_strategy(job, limit, rates, **strategy)
    recipe = plan.recipe(part_of(DistillationConfig, vars(s)), teacher)
    prompts = s.eval_prompts
    if prompts is None:
        prompts = job.answers or EVAL_PROMPTS
    s = replace(s, iters=recipe.iters, learning_rate=recipe.learning_rate, eval_prompts=prompts)
    return ResolvedRun(
        teacher=teacher,
        settings=s,
        rows=rows,
        expected_loss=s.expected_loss,
        strategy={**plan.strategy, WRITES: job.teacher_writes},
        plan=plan,
    )


def _rounding(s: DistillFlags) -> QuantizationConfig | None:
    return part_of(QuantizationConfig, vars(s)) if s.quantize else None


def _wanted(s: DistillFlags, iters: int) -> conversations.Wanted:
    """The text of so many steps."""
    return conversations.wanted_of(
        s.data, s.conversations, visited=iters * s.step_tokens, seed=s.seed
    )


def _job(s: DistillFlags, teacher: Checkpoint, rows: int, budget: Budget) -> DistillationSpec:
    """The distillation that is asked for. MisError where the result cannot be rounded."""
    rounding = _rounding(s)
    seen = vocabulary.first_rows(teacher, rows)
    if s.student:
        given = load.open_checkpoint(s.student)
        packed_format.check_dense(given)
        config = given.config
    else:
        pruning = part_of(select.PruningConfig, vars(s))
        config = select.largest_student(seen.config, pruning, pipeline.DTYPE)
    if rounding:
        stage.check(config, rounding)
    # Held-out prompts: as asked for; all, where their answers are there; or the usual number.
    prompts = 0
    if preparation.takes_conversations(load.tokenizer(teacher.path)):
        if s.eval_prompts is not None:
            prompts = s.eval_prompts
        elif answers.known(teacher, answers.prompts(EVAL_PROMPTS)):
            prompts = EVAL_PROMPTS
        else:
            prompts = teacher_answers.judging_prompts(model_of(teacher), budget)
    return spec_of(
        model_of(seen, dtype=precision.dtype_of(teacher)),
        model_of(config, dtype=precision.usual_dtype(teacher.precision)),
        part_of(DistillationConfig, vars(s)),
        rounding=rounding or ROUND_TO_NEAREST,
        shown=model_of(teacher),
        copied=not s.student,
        sized=s.target == "fixed",
        answers=prompts,
        answers_known=prompts > 0 and answers.known(teacher, answers.prompts(prompts)),
    )


def _hub_ids(given: Mapping[str, Any]) -> list[str]:
    """Those of a run's models and text that are of the hub: no folder here has their name.

    A model card tells such a name, and of a folder only the last part.
    """
    found = []
    for name in ("teacher", "student", "data"):
        value = given.get(name)
        if isinstance(value, str) and REPO_ID.fullmatch(value) and not Path(value).exists():
            found.append(value)
    return found


def log(run: ResolvedRun, place: OpenRun) -> None:
    """Write the first line of a run's phases: its flags, and memory and time as planned."""
    plan = run.plan
    given = run.given
    planned = [
        {
            "phase": phase.name,
            "seconds": round(phase.seconds(plan.rates), 3),
            "peak_bytes": plan.needed_bytes(phase),
        }
        for phase in plan.phases
    ]
    record = {
        **place.now(),
        "flags": given,
        "hub_ids": _hub_ids(given),
        "planned": planned,
        "mode": plan.mode,
        "budget_bytes": plan.budget_bytes,
        "step_tokens": plan.job.step_tokens,
        "iters": plan.job.iters,
        "rates": asdict(plan.rates),
    }
    place.files.append(place.folder / run_folder.PHASES, json.dumps(record))
