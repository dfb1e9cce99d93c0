"""What a run of `distill` is, resolved once from its flags.

Stages are given what they need of it, by name. No stage asks for a flag, and a run that goes on is
resolved to what it was.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mis_mlx.distillation import conversations, run_plan
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.distillation.run_plan import RunRequest, StudentSpec
from mis_mlx.distillation.strategies import MemoryPlan
from mis_mlx.hardware import memory
from mis_mlx.planner import estimates
from mis_mlx.pruning import vocabulary
from mis_mlx.pruning.select import PruningConfig
from mis_mlx.quantization import packed_format
from mis_mlx.settings.parts import part_of
from mis_mlx.settings.recipe import EVAL_PROMPTS, DistillationConfig, QuantizationConfig
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, Checkpoint


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a run measures, reports and keeps at its end, named as the flags.

    lose, expected_loss: in bits per byte, where a search chose the sizes.
    """

    eval_prompts: int
    lose: float | None
    expected_loss: float | None
    keep_steps: bool


@dataclass(frozen=True, kw_only=True)
class StoredSettings:
    """The settings as decided, by name. given: those of `values` that are not the defaults."""

    values: Mapping[str, Any]
    given: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with everything decided.

    teacher: with its own vocabulary. recipe: with the number of steps, the learning rate, and
    micro-batches as planned. strategy: how the student trains, for plan.json. settings: for
    config.yaml. plan: what all that takes on this machine.
    """

    teacher: Checkpoint
    student: StudentSpec
    recipe: DistillationConfig
    text: conversations.Wanted
    report: ReportConfig
    strategy: Mapping[str, Any]
    settings: StoredSettings
    # Both rest on rates and the budget, which may be others when a run goes on.
    plan: MemoryPlan = field(compare=False)

    @property
    def name(self) -> str:
        """Of the run's folder, without its number."""
        return f"{self.teacher.path.name}-{self.student.pruning.scenario or 'student'}"

    @property
    def budget(self) -> Budget:
        """The memory that the run may take."""
        return Budget(self.plan.budget_bytes)


def resolve(
    asked: DistillFlags, sizes: Mapping[str, Any], teacher: Checkpoint, folder: Path | None
) -> ResolvedRun:
    """Decide everything that the flags leave open.

    sizes: settings that a search chose for them. folder: of a run that goes on, which keeps the
    strategy that it began with. MisError where the flags cannot be met. That the plan fits the
    budget is not checked.
    """
    limit = memory.budget(asked.budget_bytes)
    # Decided, too: what is free on another day does not change a run that goes on.
    asked = replace(asked, budget=asked.budget or estimates.budget_flag(limit.limit_bytes))
    values = {**asdict(asked), **sizes}
    _settle(values, teacher)
    student = _student(values, teacher)

    def wanted(iters: int) -> conversations.Wanted:
        return conversations.wanted_of(
            asked.data, asked.conversations, visited=iters * asked.step_tokens, seed=asked.seed
        )

    request = RunRequest(
        teacher=teacher,
        student=student,
        recipe=part_of(DistillationConfig, values),
        eval_prompts=asked.eval_prompts,
        wanted=wanted,
    )
    plan = run_plan.plan_run(request, limit, folder)
    recipe = plan.recipe(request.recipe, teacher)
    values["iters"] = recipe.iters
    values["learning_rate"] = recipe.learning_rate
    if values["eval_prompts"] is None:
        values["eval_prompts"] = plan.job.answers or EVAL_PROMPTS
    settings = _stored(values, asdict(type(asked)()))
    report = part_of(ReportConfig, values)
    strategy = run_plan.stored_strategy(plan)
    return ResolvedRun(
        teacher=teacher,
        student=student,
        recipe=recipe,
        text=wanted(plan.job.iters),
        report=report,
        strategy=strategy,
        settings=settings,
        plan=plan,
    )


def _settle(values: dict[str, Any], teacher: Checkpoint) -> None:
    """Give the settings by name the scenario, vocabulary and bits that this teacher has."""
    values |= packed_format.of_mixture(teacher.config, part_of(QuantizationConfig, values))
    if values["student"] is None:
        scenario = values["scenario"]
        values |= vocabulary.defaults(scenario, values["vocab"], teacher.config, teacher.path)


def _student(values: Mapping[str, Any], teacher: Checkpoint) -> StudentSpec:
    """The student to be made. values: the settings by name, settled."""
    folder = values["student"]
    pruning = part_of(PruningConfig, values)
    rounding = None
    if values["quantize"]:
        rounding = part_of(QuantizationConfig, values)
    return StudentSpec(
        folder=folder,
        rows=vocabulary.rows_left(teacher, pruning, folder),
        pruning=pruning,
        rounding=rounding,
    )


def _stored(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> StoredSettings:
    """The settings that a run's folder keeps."""
    stored = {name: value for name, value in values.items() if name not in run_folder.NOT_STORED}
    given = {name: value for name, value in stored.items() if value != defaults[name]}
    return StoredSettings(values=stored, given=given)
