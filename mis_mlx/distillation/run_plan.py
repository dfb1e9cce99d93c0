"""The plan of a run of `distill`: what its flags ask for, in sizes, and the way that fits."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.distillation import pipeline
from mis_mlx.evaluation import answers
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.models import arch, distributed, load
from mis_mlx.planner import estimates, phases
from mis_mlx.planner.distillation_spec import DistillationSpec, spec_of
from mis_mlx.pruning import select, vocabulary
from mis_mlx.quantization import stage
from mis_mlx.runs.run_loop import OpenRun
from mis_mlx.settings.recipe import FIRST_STEPS, ROUND_TO_NEAREST
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError, gib


def plan_run(s: Any, teacher: Checkpoint, rows: int, folder: Path | None) -> phases.MemoryPlan:
    """The plan of a new run; of the run in `folder`, which goes on its own way whatever the budget.

    s: settings of `distill`. rows: of the vocabulary that the student has. Several machines go the
    first one's way, each with its own budget; MisError where they would train a student in parts.
    """
    job = _job(s, teacher, rows)
    rates = estimates.machine_rates()
    limit = memory.budget(s.budget_bytes).limit_bytes
    if s.minutes is not None:
        job = _paced(s.minutes, job, limit, rates)

    def strategy() -> dict[str, Any]:
        if folder:
            return run_folder.stored_settings(folder, run_folder.PLAN)
        return phases.best_plan(job, limit, rates).strategy

    plan = phases.plan_strategy(job, limit, rates, **distributed.broadcast_json(strategy))
    if distributed.size() > 1 and plan.mode == "sharded":
        why = (
            f"with {distributed.size()} machines, each must hold the whole student, but "
            f"{gib(limit)} hold only a part of it"
        )
        raise MisError(f"{why}: raise --budget, leave out --train, or use one machine")
    return plan


def _job(s: Any, teacher: Checkpoint, rows: int) -> DistillationSpec:
    """The distillation that the settings ask for. MisError where the result cannot be rounded."""
    seen = vocabulary.first_rows(teacher, rows)
    if s.student:
        config = load.open_checkpoint(s.student).config
    else:
        shape = select.wanted_shape(seen.config, s)
        config = arch.student_config(seen.config, shape, dtype=pipeline.DTYPE)
    if s.quantize:
        stage.check(config, s, s.num_samples)
    prompts = 0
    if preparation.takes_conversations(load.tokenizer(teacher.path)):
        prompts = s.eval_prompts
    return spec_of(
        estimates.model_of(seen, dtype=precision.dtype_of(teacher)),
        estimates.model_of(config, dtype=precision.usual_dtype(s.precision)),
        s,
        rounding=s if s.quantize else ROUND_TO_NEAREST,
        rotates=s.hidden_by == "pca",
        shown=estimates.model_of(teacher),
        copied=not s.student,
        answers=prompts,
        answers_known=prompts > 0 and answers.known(teacher, answers.prompts(prompts)),
    )


def _paced(minutes: float, job: DistillationSpec, limit: int, rates: Rates) -> DistillationSpec:
    """The job with as many steps as the plan expects to fit into the minutes.

    MisError where that number must be known before the first step: --iters takes it.
    """
    plan = phases.best_plan(job, limit, rates)
    seconds = plan.planned.get("distil", 0.0)
    if not seconds:
        return job
    iters = max(2 * FIRST_STEPS, int(60 * minutes * job.iters / seconds))
    if plan.mode == "sharded" or job.targets == "cached":
        why = "a student in parts" if plan.mode == "sharded" else "targets on disk"
        need = f"but {why} must know the number first: give --iters {iters}"
        raise MisError(
            f"--minutes {minutes:g} counts steps during training, {need}, which should take about "
            f"as long"
        )
    return replace(job, iters=iters)


def log(s: Any, place: OpenRun, plan: phases.MemoryPlan) -> None:
    """Write the first line of a run's phases: its flags, and memory and time as planned."""
    defaults = asdict(type(s)())
    flags = {
        name: value
        for name, value in asdict(s).items()
        if name not in run_folder.NOT_STORED and value != defaults[name]
    }
    planned = [
        {
            "phase": phase.name,
            "seconds": round(phase.seconds(plan.rates), 3),
            "peak_bytes": phase.peak_bytes,
        }
        for phase in plan.phases
    ]
    record = {
        **place.thermal_monitor.now(),
        "flags": flags,
        "planned": planned,
        "mode": plan.mode,
        "budget_bytes": plan.budget_bytes,
        "step_tokens": plan.job.step,
        "iters": plan.job.iters,
        "rates": asdict(plan.rates),
    }
    place.files.append(place.folder / run_folder.PHASES, json.dumps(record))
