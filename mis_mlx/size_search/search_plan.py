"""The plan of a search: memory and time of its measurements and of its largest finalist."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.distillation import answer_loss, strategies
from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner import estimates, measured_block
from mis_mlx.planner.distillation_spec import DistillationSpec, spec_of
from mis_mlx.pruning.calibrate import calibration_cost
from mis_mlx.pruning.vocabulary import vocabulary_cost
from mis_mlx.quantization.bit_allocation import sensing_cost
from mis_mlx.size_search import excess, known_losses, limits, shape_search
from mis_mlx.size_search.shape_search import Choice, Sizes, probes_of
from mis_mlx.size_search.unwritten import fitting_cost, passes_cost
from mis_mlx.types import Budget, Checkpoint, MisError

# Students that a search by --lose measures before the smallest one by corrected sums is one that
# was measured: 1, 1, 1, 4 and 6 in five searches of three teachers.
SETTLED_AFTER = 4


def plan_search(
    s: Any,
    teacher: Checkpoint,
    within: Sequence[Choice],
    sizes: Sizes,
    *,
    limit: Budget,
    known: Mapping[str, Any],
) -> tuple[strategies.MemoryPlan, dict[str, float], dict[str, Any]]:
    """(plan of the largest finalist; seconds by phase of the run; the result of a --dry-run).

    Every stage is told in a line. s: settings of `search`. known: the identity of measurements that
    are perhaps kept; {}: none are. MisError where the search does not fit the budget.
    """
    plan = _plan_of_largest(s, teacher, within, limit)
    probes = probes_of(sizes, shape_of(teacher.config).vocab)
    if known and known_losses.all_known(known, probes):
        probes = []
        s = replace(s, evaluations=1)
    work = search_cost(
        s,
        plan.job,
        plan.phases,
        probes,
        rows=any(axis == "vocab" for axis, _ in probes),
        limit=limit.limit_bytes,
    )
    stages = []
    seconds = {}
    for name, part in work.items():
        if part:
            text = plan.job.teacher.text_bytes
            stages += [stage.beside(text) for stage in part]
            seconds[name] = sum(stage.seconds(plan.rates) for stage in part)
    tell = cli.say if s.dry_run else cli.detail
    outcome = estimates.report_costs(stages, limit.limit_bytes, plan.rates, tell)
    tell(str(plan.rates))
    if not s.dry_run:
        if not plan.fits:
            raise MisError(strategies.remedy(plan))
        estimates.require_fit(limit, *stages)
    outcome["check_failed"] = outcome["check_failed"] or not plan.fits
    return plan, seconds, outcome


def _plan_of_largest(
    s: Any, teacher: Checkpoint, within: Sequence[Choice], limit: Budget
) -> strategies.MemoryPlan:
    """The plan that distils the largest student."""

    def weights(choice: Choice) -> int:
        return sum(limits.weights_of(teacher.config, choice.shape))

    shape = max(within, key=weights).shape
    student = model_of(
        arch.student_config(teacher.config, shape), dtype=precision.usual_dtype(s.precision)
    )
    rounding = shape_search.rounding_of(Choice(shape, shape_search.USUAL_BPW))
    before = shape_of(teacher.config)
    whole = all(replace(choice.shape, vocab=before.vocab) == before for choice in within)
    job = spec_of(model_of(teacher), student, s, rounding, copied=whole)
    job = measured_block.of_job(job, limit.limit_bytes)
    return strategies.best_plan(job, limit.limit_bytes, estimates.machine_rates())


def search_cost(
    s: Any,
    job: DistillationSpec,
    planned: Sequence[StageCost],
    probes: Sequence[tuple[str, int]],
    *,
    rows: bool,
    limit: int,
) -> dict[str, list[StageCost]]:
    """What a search with these settings takes: {"rank": stages, "finalists": stages}.

    To rank, and to train, round and judge finalists, each student counted as `job`'s, whose phases
    are `planned`. probes: axes measured alone. rows: whether some students have fewer tokens.
    """
    t = job.teacher
    m = job.student
    length = job.max_seq_length
    # of two texts
    windows = -(-4 * s.rank_windows // 3)
    judging = -(-4 * s.eval_windows // 3)
    rank = []
    if {axis for axis, _ in probes} - {"vocab"}:
        beside_text = max(0, limit - t.text_bytes)
        seen = calibration_cost(t, s.num_samples, length, beside_text, rotation="hidden" in s.axes)
        rank.append(replace(seen, name="calibrate"))
    if s.mixed:
        rank.append(sensing_cost(t, length, limit))
    if rows:
        rank.append(replace(vocabulary_cost(t, length), name="choose tokens"))
    most = answer_loss.MOST_OF_OTHERS if s.streams else answer_loss.MOST
    texts = max(windows, most)
    if probes:
        students = len(probes) + len(excess.BITS_PROBED)
        alone = passes_cost(t, students, 1, texts, length, limit)
        rank.append(replace(alone, name=f"{students} axes alone"))
    # sizes are corrected by what was found, so these are measured one after the other
    likely = s.evaluations if s.lose is None else min(s.evaluations, SETTLED_AFTER)
    each = in_turn(f"rank {likely}", passes_cost(t, 1, 1, texts, length, limit), fitting_cost(t))
    rank.append(each.repeated(likely))
    if not s.finalists:
        return {"rank": rank, "finalists": []}
    finalists = []
    for p in planned:
        if p.name not in ("prune", "measure"):  # which a finalist does not go through
            name = f"{p.name}, {s.finalists} finalists"
            finalists.append(replace(p, name=name).repeated(s.finalists))
    judged = comparison_cost([t, m, m, m], judging, length)
    judged = replace(judged, name="judge them", written_bytes=2 * m.nbytes)
    finalists.append(judged.repeated(s.finalists))
    return {"rank": rank, "finalists": finalists}
