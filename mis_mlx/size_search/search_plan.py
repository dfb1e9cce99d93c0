"""The plan of a search: memory and time of its measurements and of its largest finalist."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.models import arch
from mis_mlx.models.config import shape_of
from mis_mlx.planner import compression_size, estimates, phases
from mis_mlx.planner.distillation_spec import spec_of
from mis_mlx.size_search import known_losses, limits, shape_search
from mis_mlx.size_search.shape_search import Choice, Sizes, probes_of
from mis_mlx.types import Budget, Checkpoint, MisError


def plan_search(
    s: Any,
    teacher: Checkpoint,
    within: Sequence[Choice],
    sizes: Sizes,
    *,
    limit: Budget,
    known: Mapping[str, Any],
) -> tuple[phases.MemoryPlan, dict[str, float], dict[str, Any]]:
    """(plan of the largest finalist; seconds by phase of the run; the result of a --dry-run).

    Every stage is told in a line. s: settings of `search`. known: the identity of measurements that
    are perhaps kept; {}: none are. MisError where the search does not fit the budget.
    """
    plan = _plan_of_largest(s, teacher, within, limit)
    probes = probes_of(sizes, shape_of(teacher.config).vocab)
    if known and known_losses.all_known(known, probes):
        probes = []
        s = replace(s, evaluations=1)
    work = compression_size.search_cost(
        s,
        plan.job,
        plan.phases,
        len(probes),
        rows=any(axis == "vocab" for axis, _ in probes),
        limit=limit.limit_bytes,
    )
    stages = []
    seconds = {}
    for name, part in work.items():
        if part:
            stages += part
            seconds[name] = sum(stage.seconds(plan.rates) for stage in part)
    outcome = estimates.report_costs(stages, limit.limit_bytes, plan.rates)
    cli.say(str(plan.rates))
    if not s.dry_run:
        _need(plan, stages, limit)
    outcome["check_failed"] = outcome["check_failed"] or not plan.fits
    return plan, seconds, outcome


def _plan_of_largest(
    s: Any, teacher: Checkpoint, within: Sequence[Choice], limit: Budget
) -> phases.MemoryPlan:
    """The plan that distils the largest student."""

    def weights(choice: Choice) -> int:
        return sum(limits.weights_of(teacher.config, choice.shape))

    shape = max(within, key=weights).shape
    student = estimates.model_of(
        arch.student_config(teacher.config, shape), dtype=precision.usual_dtype(s.precision)
    )
    rounding = shape_search.rounding_of(Choice(shape, shape_search.USUAL_BPW))
    job = spec_of(estimates.model_of(teacher), student, s, rounding)
    return phases.best_plan(job, limit.limit_bytes, estimates.machine_rates())


def _need(plan: phases.MemoryPlan, stages: Sequence[estimates.StageCost], limit: Budget) -> None:
    """MisError where the plan or a stage does not fit the budget."""
    if not plan.fits:
        raise MisError(phases.remedy(plan))
    # With what the process itself takes.
    peak, worst = max((stage.peak_bytes, stage.name) for stage in stages)
    enough = estimates.budget_flag(peak)
    remedy = f"give --budget {enough} or more, or lower --max-seq-length or --batch-size"
    limit.need(peak, worst, remedy)
