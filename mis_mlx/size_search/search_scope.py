"""The students that a search looks among: sizes of every axis, limits, and what is within them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mis_mlx import cli
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.pruning import vocabulary
from mis_mlx.size_search import candidates, shape_search
from mis_mlx.size_search import limits as limiting
from mis_mlx.size_search.limits import Limit
from mis_mlx.size_search.shape_search import Choice
from mis_mlx.types import Checkpoint, MisError


@dataclass(frozen=True)
class Scope:
    """The students of a search. limits: what they may cost."""

    sizes: shape_search.Sizes
    limits: list[Limit]
    within: list[Choice]
    flags: list[str]


def scope_of(s: Any, teacher: Checkpoint) -> Scope:
    """The students that the settings ask for."""
    sizes = tried_sizes(s, teacher)
    limits = limits_of(s, teacher)
    flags = [limit.flag for limit in limits]
    if s.lose is not None:
        flags.insert(0, f"--lose {s.lose:g}")
    within = _within(s, teacher, sizes, limits)
    measured = min(s.evaluations, len(within))
    most = "" if s.lose is None else "at most "
    _tell(s)(f"students within {' '.join(flags)}: {len(within):,}; {most}{measured} are measured")
    return Scope(
        sizes=sizes,
        limits=limits,
        within=within,
        flags=flags,
    )


def _tell(s: Any) -> Callable[..., None]:
    """What says the facts of a search: inside of a distillation, -v alone shows them."""
    return cli.say if s.finalists else cli.detail


def limits_of(s: Any, teacher: Checkpoint) -> list[Limit]:
    """What the student may cost."""
    config = teacher.config
    limits = []
    if s.bytes:
        limits.append(limiting.bytes_limit(config, s.bytes))
    if s.params or not (limits or s.lose is not None):
        limits.append(limiting.params_limit(config, s.params or "0.667x"))
    return limits


def tried_sizes(s: Any, teacher: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried. Axes that cannot be cut are said."""
    config = teacher.config
    if s.mixed and not shape_search.group_of(shape_of(config)):
        why = (
            "the rows of this teacher's matrices are not divisible by 32, so the cost of bits "
            "cannot be measured"
        )
        raise MisError(f"{why}: leave bits out of `search --axes`, or limit --params")
    sizes = _sizes(s, teacher)
    stuck = []
    for axis, values in sizes.items():
        if axis in s.axes and len(values) == 1:
            stuck.append(f"{axis} {values[0]:,}")
    # With --vocab the vocabulary has the one size that was asked for.
    all_rows = shape_of(config).vocab
    asked_vocab = s.vocab and sizes["vocab"] != (all_rows,)
    if stuck and not (asked_vocab and len(stuck) == 1):
        _tell(s)(f"this teacher cannot be cut along every axis: {', '.join(stuck)} stay unchanged")
    return sizes


def _sizes(s: Any, teacher: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried."""
    config = teacher.config
    rows = candidates.vocabularies(config, teacher.path) if "vocab" in s.axes else []
    sizes = shape_search.axis_sizes(config, s.axes, rows)
    if s.vocab:
        sizes["vocab"] = (vocabulary.rows_left(teacher, s),)
    return sizes


def is_reached(s: Any, teacher: Checkpoint) -> bool:
    """Whether a student of the axes that the settings name is within the limits."""
    limits = limits_of(s, teacher)
    try:
        shape_search.choices(teacher.config, _sizes(s, teacher), limits, bits=True)
    except MisError:
        return False
    return True


def _within(
    s: Any, teacher: Checkpoint, sizes: shape_search.Sizes, limits: list[Limit]
) -> list[Choice]:
    """The students that come into question.

    With --lose these are all shapes, whose bits are chosen later.
    """
    if s.lose is None:
        return shape_search.choices(teacher.config, sizes, limits, "bits" in s.axes)
    shapes = shape_search.shapes(teacher.config, sizes)
    bpw = shape_search.USUAL_BPW
    return [Choice(shape, bpw) for shape in shapes if shape_search.group_of(shape)]
