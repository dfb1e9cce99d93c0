"""What a run of `distill` is, resolved once from its flags.

Stages are given what they need of it, by name. No stage asks for a flag, and a run that goes on is
resolved to what it was.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mis_mlx.distillation import conversations, run_plan, run_text
from mis_mlx.distillation.conversations import Wanted
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.distillation.run_text import TeacherText
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.planner import machines
from mis_mlx.planner.phases import MemoryPlan
from mis_mlx.pruning import vocabulary
from mis_mlx.pruning.select import PruningConfig
from mis_mlx.quantization import packed_format
from mis_mlx.settings.parts import part_of
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, Checkpoint


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with everything decided.

    teacher: with its own vocabulary. student: the folder of one that is there already. rows: of the
    student's vocabulary. pruning: with scenario, sizes and --vocab. recipe: with the number of
    steps, the learning rate, and micro-batches as planned; with --minutes the number is what the
    plan expects. rounding: None: weights stay as they were trained. text: what the run learns from;
    teacher_text: what the teacher writes of it first. eval_prompts: held-out prompts to answer.
    allowed_loss, expected_loss: in bits per byte, where a search chose the sizes. strategy: how the
    student trains, for plan.json. stored: all settings as decided, for config.yaml; given: those of
    them that are not the defaults. plan: what all that takes on this machine. shares: how many of
    the teacher's blocks each machine has; (): each has all.
    """

    teacher: Checkpoint
    student: str | None
    rows: int
    pruning: PruningConfig
    recipe: DistillationConfig
    rounding: QuantizationConfig | None
    text: Wanted
    teacher_text: TeacherText | None
    eval_prompts: int
    bench_tokens: int
    allowed_loss: float | None
    expected_loss: float | None
    report_to: str | None
    keep_steps: bool
    strategy: Mapping[str, Any]
    stored: Mapping[str, Any]
    given: Mapping[str, Any]
    # Both rest on rates and the budget, which may be others when a run goes on.
    plan: MemoryPlan = field(compare=False)
    shares: tuple[int, ...] = field(compare=False)

    @property
    def name(self) -> str:
        """Of the run's folder, without its number."""
        return f"{self.teacher.path.name}-{self.pruning.scenario or 'student'}"

    @property
    def budget(self) -> Budget:
        """The memory that the run may take."""
        return Budget(self.plan.budget_bytes)

    @property
    def thermal(self) -> ThermalFlags:
        """Air, altitude, and how hot the machine may get."""
        return part_of(ThermalFlags, self.stored)


def resolve(
    asked: DistillFlags, sizes: Mapping[str, Any], teacher: Checkpoint, folder: Path | None
) -> ResolvedRun:
    """Decide everything that the flags leave open.

    sizes: settings that a search chose for them. folder: of a run that goes on, which keeps the
    strategy that it began with. MisError where the flags cannot be met. That the plan fits the
    budget is not checked.
    """
    values = {**asdict(asked), **sizes}
    _settle(values, teacher)
    request = _request(values, teacher)
    plan = run_plan.plan_run(request, memory.budget(asked.budget_bytes), folder)
    teacher_text = run_text.teacher_text(asked, teacher)
    data = asked.data
    if teacher_text:
        data = str(teacher_text.out)
    iters = plan.job.iters
    text = conversations.wanted_of(request.recipe, iters, data=data, share=asked.conversations)
    recipe = plan.recipe(request.recipe, teacher)
    # With --minutes the first steps say how many there are.
    values["iters"] = iters if recipe.minutes is None else None
    values["learning_rate"] = recipe.learning_rate
    stored = {name: value for name, value in values.items() if name not in run_folder.NOT_STORED}
    defaults = asdict(type(asked)())
    return ResolvedRun(
        teacher=teacher,
        student=request.student,
        rows=request.rows,
        pruning=request.pruning,
        recipe=recipe,
        rounding=request.rounding,
        text=text,
        teacher_text=teacher_text,
        eval_prompts=asked.eval_prompts,
        bench_tokens=asked.bench_tokens,
        allowed_loss=values["lose"],
        expected_loss=values["expected_loss"],
        report_to=asked.report_to,
        keep_steps=asked.keep_steps,
        strategy=run_plan.stored_strategy(plan),
        stored=stored,
        given={name: value for name, value in stored.items() if value != defaults[name]},
        plan=plan,
        shares=machines.blocks_by_machine(plan) if asked.spread == "layers" else (),
    )


def _settle(values: dict[str, Any], teacher: Checkpoint) -> None:
    """Give the settings by name the scenario, vocabulary and bits that this teacher has."""
    values |= packed_format.of_mixture(teacher.config, part_of(QuantizationConfig, values))
    if values["student"] is None:
        scenario = values["scenario"]
        values |= vocabulary.defaults(scenario, values["vocab"], teacher.config, teacher.path)


def _request(values: Mapping[str, Any], teacher: Checkpoint) -> run_plan.RunRequest:
    """What is to be planned. values: the settings by name, settled."""
    pruning = part_of(PruningConfig, values)
    return run_plan.RunRequest(
        teacher=teacher,
        student=values["student"],
        rows=vocabulary.rows_left(teacher, pruning, values["student"]),
        pruning=pruning,
        recipe=part_of(DistillationConfig, values),
        rounding=part_of(QuantizationConfig, values) if values["quantize"] else None,
        eval_prompts=values["eval_prompts"],
    )
