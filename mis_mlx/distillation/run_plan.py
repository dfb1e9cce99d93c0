"""What a run of `distill` is, resolved once from its flags, and the way that fits.

A run is its settings, with everything decided, and a plan. One that goes on is resolved to what it
was.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

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
    QuantizationConfig,
)
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Budget, Checkpoint

S = TypeVar("S", bound=DistillFlags)


def resolve(
    asked: S, sizes: Mapping[str, Any], teacher: Checkpoint, folder: Path | None
) -> tuple[S, strategies.MemoryPlan]:
    """Decide everything that the flags leave open: (the settings, what the run takes here).

    sizes: settings that a search chose for them. folder: of a run that goes on, which keeps the
    strategy that it began with, whatever the budget. MisError where the flags cannot be met. That
    the plan fits the budget is not checked. The plan rests on rates and the budget, which may be
    others when a run goes on; the settings are then the same.
    """
    budget = memory.budget(asked.budget_bytes)
    limit = budget.limit_bytes
    # Decided, too: what is free on another day does not change a run that goes on.
    decided = {**sizes, "budget": asked.budget or estimates.budget_flag(limit)}
    # What is of this call alone, such as --resume, is no part of the run.
    plain = asdict(type(asked)())
    decided |= {name: plain[name] for name in run_folder.NOT_STORED if name in plain}
    s = replace(asked, **decided)
    s = replace(s, **packed_format.of_mixture(teacher.config, s))
    if s.student is None:
        s = replace(s, **vocabulary.defaults(s.scenario, s.vocab, teacher.config, teacher.path))
    job = measured_block.of_job(_job(s, teacher, budget), limit)
    before = dict[str, Any]()
    if folder is not None and run_folder.is_decided(folder):
        before = run_folder.stored_settings(folder, run_folder.PLAN)
    writes: bool | None = before.pop(conversations.WRITES, None)
    wanted = text(replace(s, iters=job.iters))
    job = conversations.planned(job, teacher, wanted, budget, writes)
    rates = estimates.machine_rates()
    strategy = before or strategies.best_plan(job, limit, rates).strategy
    plan = strategies.plan_strategy(job, limit, rates, **strategy)
    recipe = plan.recipe(s, teacher)
    prompts = s.eval_prompts
    if prompts is None:
        prompts = job.answers or EVAL_PROMPTS
    rate = recipe.learning_rate
    return replace(s, iters=recipe.iters, learning_rate=rate, eval_prompts=prompts), plan


def text(s: DistillFlags) -> preparation.Source:
    """The text of all steps of a run."""
    assert s.iters is not None
    visited = s.iters * s.step_tokens
    return preparation.Source(s.data, share=s.conversations, tokens=visited, seed=s.seed)


def _job(s: DistillFlags, teacher: Checkpoint, budget: Budget) -> DistillationSpec:
    """The distillation that is asked for. MisError where the result cannot be rounded."""
    seen = vocabulary.first_rows(teacher, vocabulary.rows_left(teacher, s, s.student))
    if s.student:
        given = load.open_checkpoint(s.student)
        packed_format.check_dense(given)
        config = given.config
    else:
        config = select.largest_student(seen.config, s, pipeline.DTYPE)
    rounding = ROUND_TO_NEAREST
    if s.quantize:
        rounding = part_of(QuantizationConfig, vars(s))
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
        s,
        rounding=rounding,
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


def log(s: DistillFlags, plan: strategies.MemoryPlan, place: OpenRun) -> None:
    """Write the first line of a run's phases: its flags, and memory and time as planned."""
    defaults = asdict(type(s)())
    given = {name: value for name, value in asdict(s).items() if value != defaults[name]}
    planned = [
        {
            "phase": phase.name,
            "seconds": round(phase.seconds(plan.rates), 3),
            "peak_bytes": plan.needed_bytes(phase),
        }
        for phase in plan.phases
    ]
    record = {
        **place.thermal_monitor.now(),
        "flags": given,
        "hub_ids": _hub_ids(given),
        "planned": planned,
        "mode": plan.mode,
        "budget_bytes": plan.budget_bytes,
        "step_tokens": plan.job.step_tokens,
        "iters": plan.job.iters,
        "rates": asdict(plan.rates),
    }
    DISK.append(place.folder / run_folder.PHASES, json.dumps(record))
