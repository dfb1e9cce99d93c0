"""The students that a search looks among: sizes of every axis, limits, and what is within them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.evaluation import judging_cost
from mis_mlx.hardware import memory
from mis_mlx.models.architectures import families
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.pruning import vocabulary
from mis_mlx.size_search import candidates, finalists, shape_search
from mis_mlx.size_search import limits as limiting
from mis_mlx.size_search.limits import Limit, Timing
from mis_mlx.size_search.shape_search import Choice
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, Checkpoint, MisError


@dataclass(frozen=True)
class Scope:
    """The students of a search. limits: what they may cost. speeds: the teacher's, by flag."""

    sizes: shape_search.Sizes
    limits: list[Limit]
    speeds: dict[str, Timing]
    within: list[Choice]
    flags: list[str]


def scope_of(s: Any, teacher: Checkpoint, folder: Path | None, budget: Budget) -> Scope:
    """The students that the settings ask for. folder: of a run that goes on."""
    sizes = tried_sizes(s, teacher)
    limits, speeds = limits_of(s, teacher, folder, budget)
    flags = [limit.flag for limit in limits]
    if s.lose is not None:
        flags.insert(0, f"--lose {s.lose:g}")
    if s.frontier:
        flags.insert(0, "--frontier")
    within = _within(s, teacher, sizes, limits)
    measured = min(s.evaluations, len(within))
    cli.say(f"students within {' '.join(flags)}: {len(within):,}; {measured} are measured")
    return Scope(
        sizes=sizes,
        limits=limits,
        speeds=speeds,
        within=within,
        flags=flags,
    )


def limits_of(
    s: Any, teacher: Checkpoint, folder: Path | None, budget: Budget
) -> tuple[list[Limit], dict[str, Timing]]:
    """(what the student may cost; the teacher's speed by flag).

    The speed is timed now, or read where it was timed when the run in `folder` began.
    """
    config = teacher.config
    limits = []
    if s.bytes:
        limits.append(limiting.bytes_limit(config, s.bytes))
    if s.memory:
        limits.append(limiting.memory_limit(config, s.memory, s.max_kv_size))
    if s.params or not (limits or s.timed_at or s.lose is not None or s.frontier):
        limits.append(limiting.params_limit(config, s.params or "0.667x"))
    speeds = _speeds(s, teacher, folder, budget) if s.timed_at else {}
    for flag, timing in speeds.items():
        asked = getattr(s, flag)
        limits.append(limiting.time_limit(config, f"--{flag}", asked, timing))
    return limits, speeds


def _speeds(s: Any, teacher: Checkpoint, folder: Path | None, budget: Budget) -> dict[str, Timing]:
    """The teacher's speed by flag."""
    if folder:
        stored = run_folder.stored_settings(folder, run_folder.PLAN)
        return {flag: Timing(**timing) for flag, timing in stored.items()}
    family = families.family(teacher.config)
    if family.per_layer:
        flags = " and ".join(f"--{flag}" for flag in s.timed_at)
        raise MisError(
            f"{flags} cannot be estimated for a {family.name}, whose blocks are not alike: limit "
            f"--bytes, --memory or --params"
        )
    for flag in s.timed_at:
        limiting.speed(f"--{flag}", getattr(s, flag))  # refuses before the timing, not after
    need = judging_cost.timed_bytes(model_of(teacher).params)
    budget.need(need, "timing the teacher, whole in memory,", "give limits of size alone")
    cli.say("timing the teacher, whole and with half of its blocks")
    speeds = {}
    with memory.limited(budget):
        for flag, (cached, prompt) in s.timed_at.items():
            speeds[flag] = finalists.timed_token(teacher, cached, prompt)
    return speeds


def tried_sizes(s: Any, teacher: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried. Axes that cannot be cut are said."""
    config = teacher.config
    if s.mixed and not shape_search.group_of(shape_of(config)):
        why = (
            "the rows of this teacher's matrices are not divisible by 32, so the cost of bits "
            "cannot be measured"
        )
        raise MisError(f"{why}: leave bits out of `search --axes`, or limit --params")
    rows = candidates.vocabularies(config, teacher.path) if "vocab" in s.axes else []
    sizes = shape_search.axis_sizes(config, s.axes, rows)
    if s.vocab:
        sizes["vocab"] = (vocabulary.rows_left(teacher, s),)
    stuck = []
    for axis, values in sizes.items():
        if axis in s.axes and len(values) == 1:
            stuck.append(f"{axis} {values[0]:,}")
    # With --vocab the vocabulary has the one size that was asked for.
    all_rows = shape_of(config).vocab
    asked_vocab = s.vocab and sizes["vocab"] != (all_rows,)
    if stuck and not (asked_vocab and len(stuck) == 1):
        cli.say(f"this teacher cannot be cut along every axis: {', '.join(stuck)} stay unchanged")
    return sizes


def _within(
    s: Any, teacher: Checkpoint, sizes: shape_search.Sizes, limits: list[Limit]
) -> list[Choice]:
    """The students that come into question.

    With --lose and --frontier these are all shapes, whose bits are chosen later.
    """
    if s.lose is None and not s.frontier:
        return shape_search.choices(teacher.config, sizes, limits, "bits" in s.axes)
    shapes = shape_search.shapes(teacher.config, sizes)
    bpw = shape_search.USUAL_BPW
    return [Choice(shape, bpw) for shape in shapes if shape_search.group_of(shape)]
