"""A plan as people and machines read it: phases, seconds, memory, bytes on disk."""

import os
from collections.abc import Sequence
from typing import Any

from mis_mlx import cli
from mis_mlx.distillation import state_cost, strategies, training_cost
from mis_mlx.models import arch, pass_cost
from mis_mlx.models.model_size import BY_FORMULA
from mis_mlx.planner import estimates
from mis_mlx.planner.distillation_spec import SCALES
from mis_mlx.quantization import rounding_cost
from mis_mlx.reporting import html
from mis_mlx.settings import workloads
from mis_mlx.types import duration, gib

LIFE_BYTES = 150e12  # written: 600 times a 256 GB SSD, a rule of thumb; Apple publishes no figure


def table(
    plan: strategies.MemoryPlan,
    words: str = "",
    *,
    left_out: Sequence[Any] = (),
    more_loss: float = 1.0,
    expected_loss: float | None = None,
) -> str:
    """The plan for people: the student, time and memory of each phase, how; or what would fit.

    words: the cuts that make the student. left_out: parts that the budget has no room for, with
    name and budget_bytes, which come first. more_loss: what the student loses without them, as a
    multiple. expected_loss: with them, in bits per byte. With -v every byte of it.
    """
    job = plan.job
    teacher = job.shown or job.teacher
    hours = duration(sum(plan.planned.values()))
    if plan.rates.hot < 1:
        hot = sum(p.seconds(plan.rates, hot=True) for p in plan.phases)
        hours += f" ({duration(hot)} once hot)"
    packed = 0
    if any(p.name == "quantize" for p in plan.phases):
        packed = rounding_cost.packed_bytes(job.student, job.rounding)
    layers = plan.shard_layers or job.student.shape.layers
    before = arch.params(teacher.config)
    after = arch.params(job.student.config)
    measured = job.student.block_factors != BY_FORMULA
    visit = training_cost.steps_per_shard(job, layers)
    cost_of_a_token = pass_cost.token_cost(job.teacher, job.max_seq_length, plan.budget_bytes)
    spooled_bytes = max(p.spooled_bytes for p in plan.phases)
    written_bytes = sum(p.written_bytes for p in plan.phases)
    page = {
        "plan": plan,
        "before": before,
        "after": after,
        "words": words,
        "hours": hours,
        "packed": packed,
        "measured": measured,
        "one": cost_of_a_token,
        "remedy": strategies.remedy(plan),
        "disk": disk_bytes(plan),
        "visit": visit,
        "left_out": left_out,
        "more_loss": more_loss,
        "expected_loss": expected_loss,
        "state": max(p.state_bytes for p in plan.phases),
        "spooled": spooled_bytes,
        "written": written_bytes,
    }
    forms = {
        "gib": gib,
        "duration": duration,
        "flag": estimates.budget_flag,
        "life": LIFE_BYTES,
        "verbose": cli.DETAILS in os.environ,
    }
    return html.document("plan.md", {**page, **forms})


def outcome(plan: strategies.MemoryPlan, teacher: str) -> dict[str, Any]:
    """The plan for machines: the last line of `distill --dry-run`, too.

    teacher: its path or name.
    """
    before = plan.job.shown or plan.job.teacher
    return {
        "teacher": teacher,
        "params_teacher": arch.params(before.config),
        "params_student": arch.params(plan.job.student.config),
        "mode": plan.mode,
        **totals(plan),
    }


def totals(plan: strategies.MemoryPlan) -> dict[str, Any]:
    """Memory and time of all phases together."""
    return {
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "seconds": round(sum(plan.planned.values())),
        "check_failed": not plan.fits,
    }


def disk_bytes(plan: strategies.MemoryPlan) -> int:
    """Files there may be at once, without the teacher's: models, two checkpoints, scratch."""
    m = plan.job.student
    params = arch.params(m.config)
    files = 0
    if not plan.job.rounds_only and not plan.job.viewed:
        files += 2 * m.nbytes
    files += params * strategies.in_parts(plan.job, plan.mode)
    if plan.mode == "resident":
        files += 2 * workloads.SAVED_BYTES * params
    elif plan.mode != "none":
        blocks = plan.shard_layers or m.shape.layers
        files += 2 * blocks * state_cost.block_state_bytes(m.config)
    for p in plan.phases:
        if p.name == "quantize":
            files += rounding_cost.files_bytes(m, plan.job.rounding)
        if p.name == "logit store":
            files += p.written_bytes
        if p.name == SCALES:
            # the rounded model stays beside the one with what was learned
            files += rounding_cost.packed_bytes(m, plan.job.rounding)
            files += p.state_bytes
            files += 2 * workloads.SAVED_BYTES * training_cost.learning_scales(plan.job)
    return files + max(p.spooled_bytes for p in plan.phases)
