"""The plan of a run of `distill`: what its flags ask for, in sizes, and the way that fits."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.distillation import conversations, pipeline, strategies, teacher_answers
from mis_mlx.judge import answers
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner import estimates, measured_block
from mis_mlx.planner.distillation_spec import DistillationSpec, spec_of
from mis_mlx.pruning import select, vocabulary
from mis_mlx.quantization import packed_format, stage
from mis_mlx.runs.run_loop import OpenRun
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
class StudentSpec:
    """The student that a run makes.

    folder: of one that is pruned already. rows: of its vocabulary. pruning: with scenario, sizes
    and --vocab. rounding: None: weights stay as they were trained.
    """

    folder: str | None
    rows: int
    pruning: select.PruningConfig
    rounding: QuantizationConfig | None


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a run is to do, before it is known how.

    teacher: with its own vocabulary. recipe: the number of steps may be open. eval_prompts:
    held-out prompts that the models answer at the end; None: the usual number. wanted: the text of
    so many steps.
    """

    teacher: Checkpoint
    student: StudentSpec
    recipe: DistillationConfig
    eval_prompts: int | None
    wanted: Callable[[int], conversations.Wanted]


def plan_run(request: RunRequest, budget: Budget, folder: Path | None) -> strategies.MemoryPlan:
    """The plan of a new run; of the run in `folder`, which goes on its own way whatever the
    budget.
    """
    limit = budget.limit_bytes
    job = measured_block.of_job(_job(request, budget), limit)
    rates = estimates.machine_rates()
    before = _strategy_of(folder)
    writes: bool | None = before.pop(WRITES, None)
    writing = conversations.asked_of(request.teacher, request.wanted(job.iters))
    if writing is not None:
        known = conversations.file_of(request.teacher, writing).exists()
        # A run that goes on does not choose again, whatever it may take by now.
        if writes is None:
            writes = known or teacher_answers.is_whole(job.whole_teacher, writing, budget)
        job = replace(
            job,
            conversations=len(writing.prompts) if writes and not known else 0,
            asks_tools=any(prompt.tools for prompt in writing.prompts),
            teacher_writes=writes,
        )
    strategy = before or strategies.best_plan(job, limit, rates).strategy
    return strategies.plan_strategy(job, limit, rates, **strategy)


def stored_strategy(plan: strategies.MemoryPlan) -> dict[str, Any]:
    """What plan.json keeps: how the student trains, and whether the teacher writes."""
    return {**plan.strategy, WRITES: plan.job.teacher_writes}


def _strategy_of(folder: Path | None) -> dict[str, Any]:
    """What the plan.json of a run that goes on says, {} of a new one."""
    if folder is None:
        return {}
    return run_folder.stored_settings(folder, run_folder.PLAN)


def _job(request: RunRequest, budget: Budget) -> DistillationSpec:
    """The distillation that is asked for. MisError where the result cannot be rounded."""
    teacher = request.teacher
    recipe = request.recipe
    student = request.student
    rounding = student.rounding
    seen = vocabulary.first_rows(teacher, student.rows)
    if student.folder:
        given = load.open_checkpoint(student.folder)
        packed_format.check_dense(given)
        config = given.config
    else:
        config = select.largest_student(seen.config, student.pruning, pipeline.DTYPE)
    if rounding:
        stage.check(config, rounding)
    prompts = 0
    if preparation.takes_conversations(load.tokenizer(teacher.path)):
        prompts = _judging_prompts(request, budget)
    return spec_of(
        model_of(seen, dtype=precision.dtype_of(teacher)),
        model_of(config, dtype=precision.usual_dtype(teacher.precision)),
        recipe,
        rounding=rounding or ROUND_TO_NEAREST,
        shown=model_of(teacher),
        copied=not student.folder,
        sized=student.pruning.target == "fixed",
        answers=prompts,
        answers_known=prompts > 0 and answers.known(teacher, answers.prompts(prompts)),
    )


def _judging_prompts(request: RunRequest, budget: Budget) -> int:
    """Held-out prompts: as asked for; all, where their answers are there; or the usual number."""
    if request.eval_prompts is not None:
        return request.eval_prompts
    if answers.known(request.teacher, answers.prompts(EVAL_PROMPTS)):
        return EVAL_PROMPTS
    return teacher_answers.judging_prompts(model_of(request.teacher), budget)


def _hub_ids(given: Mapping[str, Any]) -> list[str]:
    """Those of a run's models and text that are of the hub: no folder here has their name.

    A model card tells such a name, and of a folder only the last part.
    """
    found = []
    for name in ("teacher", "student", "data"):
        value = given.get(name)
        if isinstance(value, str) and resolve.REPO_ID.fullmatch(value) and not Path(value).exists():
            found.append(value)
    return found


def log(given: Mapping[str, Any], place: OpenRun, plan: strategies.MemoryPlan) -> None:
    """Write the first line of a run's phases: its flags, and memory and time as planned.

    given: the settings that are not the defaults.
    """
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
        "flags": dict(given),
        "hub_ids": _hub_ids(given),
        "planned": planned,
        "mode": plan.mode,
        "budget_bytes": plan.budget_bytes,
        "step_tokens": plan.job.step_tokens,
        "iters": plan.job.iters,
        "rates": asdict(plan.rates),
    }
    place.files.append(place.folder / run_folder.PHASES, json.dumps(record))
