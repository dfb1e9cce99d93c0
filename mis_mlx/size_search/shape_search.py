"""Sizes that a student could have under limits, and those that should lose least.

Arithmetic on configs. Losses are of each axis by itself and added
up; they are measured elsewhere.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.maths import stats
from mis_mlx.maths.rounding import CANDIDATE_BITS
from mis_mlx.models.architectures import arch, bit_floors
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of, side_width
from mis_mlx.quantization import format_costs
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.size_search import limits, unequal_blocks
from mis_mlx.types import MisError

CUTS = ("layers", "ffn", "heads", "hidden", "vocab")
GROUPS = (64, 32)  # weights that share a scale; one of them has to divide every row
SIZES = 12  # of an axis, tried at the most
USUAL_BPW = 4.5  # where no limit is one of bytes
LEAST_SHARE = 0.25  # of what the teacher has on an axis
FORMS = {
    "layers": "{} layers",
    "experts": "{} experts",
    "ffn": "FFN {}",
    "heads": "{} heads",
    "kv_heads": "{} kv heads",
    "hidden": "hidden {}",
    "vocab": "{:,} tokens",
}
Sizes = Mapping[str, Sequence[int]]  # of every axis, rising, the teacher's last
# The share of a loss that learning leaves, by the axis that it comes from. ffn, bits: finalists of
# `--bytes 50MB` (distilled, 20 steps, rounded by gptq); layers, heads, hidden: a third of each
# removed, from pruned to distilled (benchmarks/README.md). vocab: that loss is measured on text
# like the one that chose the tokens; five texts of other kinds lose 5 times as much (24,576 and
# 12,288 tokens: 0.017 and 0.087 bits a byte). All of SmolLM2-135M, one seed.
REMAINING_LOSS = {
    "layers": 0.33,
    "ffn": 0.28,
    "heads": 0.64,
    "hidden": 0.72,
    "vocab": 5.0,
    "bits": 0.42,
}
# The same of losses on the teacher's answers. Its conversations are in the training text, except
# those that measure this. ffn: a third of the neurons gone with a quarter of the tokens, 30 steps
# (benchmarks/lose.py): 2.4 times as much is left as on text. layers, heads and hidden have not been
# measured on answers: 2.4 times what is left on text, at most all.
REMAINING_ANSWER_LOSS = {
    "layers": 0.79,
    "ffn": 0.68,
    "heads": 1.0,
    "hidden": 1.0,
    "vocab": 0.7,
    "bits": 0.45,
}
STEPS = 30  # after which so much is left
# of 30, 300 and 2,400 steps the teacher's answers kept 0.463, 0.405, 0.393 (benchmarks/README.md)
FADING = 0.06
REMAINING_LOSS_OF_PARTIAL_GROUPS = 0.30  # of heads, where a part of every group goes


class Choice(NamedTuple):
    """Sizes, and the mean bits of a weight, scales included."""

    shape: Shape
    bpw: float

    @property
    def name(self) -> str:
        """Short, and a file name: '20l-1280f-9h3-576d-49152v-4.50b'."""
        s = self.shape
        return f"{s.layers}l-{s.ffn}f-{s.heads}h{s.kv_heads}-{s.hidden}d-{s.vocab}v-{self.bpw:.2f}b"

    @property
    def sizes(self) -> dict[str, int | float]:
        """By axis, for a log."""
        sizes = {axis: getattr(self.shape, axis) for axis in (*CUTS, "kv_heads")}
        return sizes | {"bits": self.bpw}


def words(shape: Shape, before: Shape) -> str:
    """The cuts of the teacher's shape, for people: '20 layers, FFN 1280'."""
    cuts = []
    for axis, form in FORMS.items():
        size = getattr(shape, axis)
        if size != getattr(before, axis):
            cuts.append(form.format(size))
    return ", ".join(cuts) or "the teacher's own"


def group_of(shape: Shape) -> int:
    """The largest group that cuts every matrix (quantization/packed_format); 0: none does."""
    rows = (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
    for group in GROUPS:
        if all(size % group == 0 for size in rows):
            return group
    return 0


def bpw_range(group: int, config: Mapping[str, Any], shape: Shape) -> tuple[float, float]:
    """(fewest, most) bits of a weight in groups of so many, scale and bias included.

    On average: some families have small matrices that never have few bits.
    """
    scales = 32 / group
    fewest = min(CANDIDATE_BITS) + scales
    most = max(CANDIDATE_BITS) + scales
    if side_width(config):
        share = unequal_blocks.fixed_share(config, shape)
        fewest = (
            math.ceil(100 * (fewest + share * (max(CANDIDATE_BITS) - min(CANDIDATE_BITS)))) / 100
        )
    elif bit_floors.delta_floors(config):
        student = arch.student_config(config, shape)
        one_group = QuantizationConfig(q_group_size=group, q_groups="one")  # type: ignore[arg-type]
        least, _ = format_costs.limits(student, one_group)
        fewest = math.ceil(100 * least) / 100
    return fewest, most


def axis_sizes(
    config: Mapping[str, Any], axes: Sequence[str], vocab: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The sizes of every axis to be tried, the teacher's last.

    That one alone where the axis is not one of `axes`; else evenly spread ones before it that a
    student can have and bits can pack. vocab: numbers of rows.
    """
    s = shape_of(config)
    group = GROUPS[-1]
    steps = {"layers": 1, "ffn": arch.FFN_MULTIPLE, "heads": 1, "hidden": group}
    sizes = dict[str, tuple[int, ...]]()
    for axis, step in steps.items():
        most = getattr(s, axis)
        fits = list[int]()
        if axis in axes:
            for size in range(step, most, step):
                if size >= LEAST_SHARE * most and _shape(config, {axis: size}):
                    fits.append(size)
        if axis == "heads":
            fits = [n for n in fits if n * s.head_dim % group == 0]
            # whole groups, if there are several
            fits = [n for n in fits if n % (s.heads // s.kv_heads) == 0] or fits
        sizes[axis] = (*_spread(fits), most)
    smaller = sorted(vocab) if "vocab" in axes else []
    sizes["vocab"] = (*smaller, s.vocab)
    return sizes


def _spread(sizes: Sequence[int]) -> list[int]:
    """SIZES of these at most, evenly spread, the first and the last among them."""
    return [sizes[place] for place in stats.spread(len(sizes), SIZES)]


def _shape(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Shape | None:
    """The teacher's shape cut to these sizes; None where no loader accepts it."""
    try:
        return arch.target_shape(config, {}, **sizes)
    except MisError:
        return None


def probed(sizes: Sequence[int]) -> list[int]:
    """The one or two sizes of an axis that are measured by themselves.

    Nearest to 5/6 and to 2/3 of the largest.
    """
    *smaller, most = sizes
    if not smaller:
        return []
    nearest = set[int]()
    for share in (5 / 6, 2 / 3):
        distances = [abs(size - share * most) for size in smaller]
        nearest.add(smaller[distances.index(min(distances))])
    return sorted(nearest)


def probes_of(sizes: Sizes, all_rows: int) -> list[tuple[str, int]]:
    """(axis, size) of every student that is measured to learn what one axis costs alone.

    all_rows: of the teacher's vocabulary. Bits are measured apart.
    """
    probes = []
    for axis in CUTS[:-1]:
        for size in probed(sizes[axis]):
            probes.append((axis, size))
    for rows in sizes["vocab"]:
        if rows != all_rows:
            probes.append(("vocab", rows))
    return probes


def remaining_after(iters: int | None, left: Mapping[str, float]) -> dict[str, float]:
    """The share of a loss that so many steps leave, by axis; None: of the usual number."""
    power = (STEPS / max(1, iters or STEPS)) ** FADING
    shares = {}
    for axis, share in left.items():
        shares[axis] = share if axis in ("vocab", "bits") else share * power
    return shares


class Losses(NamedTuple):
    """Nats a byte that a teacher loses by one axis alone: (size, nats) of some sizes of each.

    remaining: by axis, the share that learning leaves."""

    before: Shape
    points: Mapping[str, Sequence[tuple[float, float]]]
    remaining: Mapping[str, float] = REMAINING_LOSS

    def by_axis(self, choice: Choice) -> dict[str, float]:
        """The loss that each axis of a student should cost, before it learns."""
        values = {}
        for axis in CUTS:
            if self.points.get(axis):
                values[axis] = self._along(axis, getattr(choice.shape, axis))
        bits = self.points.get("bits")
        if bits:
            bpw, nats = np.array(bits).T
            values["bits"] = float(np.interp(choice.bpw, bpw, nats))
        return values

    def _along(self, axis: str, size: int) -> float:
        """scale * removed ** power through the points; the points themselves of the vocabulary."""
        most = getattr(self.before, axis)
        removed = 1 - size / most
        points = self.points[axis]
        if removed == 0:
            return 0.0
        if axis == "vocab":
            return dict(points)[size]
        shares = [1 - n / most for n, _ in points]
        nats = [max(value, 1e-6) for _, value in points]
        power = 2.0  # as far as the second order reaches
        if len(points) > 1:
            rise = math.log(nats[0] / nats[1])
            slope = rise / math.log(shares[0] / shares[1])
            power = float(np.clip(slope, 1.0, 4.0))
        return nats[-1] * (removed / shares[-1]) ** power

    def raw(self, choice: Choice) -> float:
        """The loss of all axes together, before the student learns."""
        return sum(self.by_axis(choice).values())

    def expected(self, choice: Choice) -> float:
        """The loss that should be left once the student has learned."""
        return sum(self.expected_by_axis(choice).values())

    def expected_by_axis(self, choice: Choice) -> dict[str, float]:
        """The same, of each axis."""
        left = dict(self.remaining)
        if choice.shape.kv_heads == self.before.kv_heads:
            left["heads"] = min(left["heads"], REMAINING_LOSS_OF_PARTIAL_GROUPS)
        return {axis: left[axis] * value for axis, value in self.by_axis(choice).items()}

    def fewest_bits(self, shape: Shape, lose: float, most: float) -> float | None:
        """The fewest bits in which a student of this shape should lose `lose` nats a byte or less.

        `most` at most; None where there are none. In hundredths of a bit, rounded up.
        """
        by_axis = self.expected_by_axis(Choice(shape, most))
        of_shape = sum(value for axis, value in by_axis.items() if axis != "bits")
        allowed = (lose - of_shape) / self.remaining["bits"]
        bpw, nats = np.array(self.points["bits"]).T
        # Bits that cost more than that are too few. What more bits cost never rises, so the first
        # that fits counts.
        fits = np.flatnonzero((nats <= allowed) & (bpw <= most))
        if not len(fits):
            return None
        first = int(fits[0])
        if first == 0:
            return float(bpw[0])
        # between the last that costs too much and the first that fits
        below = first - 1
        share = (nats[below] - allowed) / max(nats[below] - nats[first], 1e-12)
        between = bpw[below] + share * (bpw[first] - bpw[below])
        rounded_up = math.ceil(100 * between) / 100
        return float(min(bpw[first], rounded_up))


def smallest(
    config: Mapping[str, Any],
    shapes_of: Iterable[Shape],
    losses: Losses,
    lose: float,
    within: Sequence[limits.Limit],
) -> list[Choice]:
    """Of every shape the student of the fewest bits that should lose `lose` nats a byte or less.

    Fewest bytes first, and only those within the limits. Where bits are not chosen, all have the
    usual ones.
    """
    sized = list[tuple[float, Choice]]()
    for shape in shapes_of:
        group = group_of(shape)
        if not group:
            continue
        fewest, most = bpw_range(group, config, shape)
        bpw: float | None = USUAL_BPW
        if "bits" in losses.points:
            bpw = losses.fewest_bits(shape, lose, most)
        elif losses.expected(Choice(shape, USUAL_BPW)) > lose:
            bpw = None
        if bpw is None or bpw < fewest:
            continue
        if all(limit.cost(shape, bpw) <= limit.most for limit in within):
            nbytes = limits.file_bytes(config, shape, bpw)
            sized.append((nbytes, Choice(shape, bpw)))
    sized.sort(key=lambda pair: pair[0])
    return [choice for _, choice in sized]


def choices(
    config: Mapping[str, Any],
    sizes: Sizes,
    within: Sequence[limits.Limit],
    bits: bool,
) -> list[Choice]:
    """Every student within the limits, in the most bits that they allow.

    In the usual ones where `bits` are not to be chosen, or none of the limits is in bytes. MisError
    where there is none: the smallest number within reach, and which axes are not open.
    """
    before = shape_of(config)
    chosen = list[Choice]()
    least = dict.fromkeys(within, math.inf)
    for shape in shapes(config, sizes):
        group = group_of(shape)
        if not group:
            continue
        fewest, most = bpw_range(group, config, shape) if bits else (USUAL_BPW, USUAL_BPW)
        costs = {limit: limit.cost(shape, fewest) for limit in within}
        for limit, cost in costs.items():
            least[limit] = min(cost, least[limit])
        fits = all(cost <= limit.most for limit, cost in costs.items())
        # the teacher itself is no choice, except in fewer bits
        if fits and (bits or shape != before):
            bpw = _most_bits(config, shape, costs, fewest=fewest, most=most)
            chosen.append(Choice(shape, math.floor(100 * bpw) / 100))
    if not chosen:
        raise _no_choice(sizes, least, bits=bits)
    return chosen


def _most_bits(
    config: Mapping[str, Any],
    shape: Shape,
    costs: Mapping[limits.Limit, float],
    *,
    fewest: float,
    most: float,
) -> float:
    """The most bits of a weight that the limits in bytes allow. costs: with the fewest bits."""
    in_bytes = [limit for limit in costs if limit.in_bytes]
    if not in_bytes:
        return USUAL_BPW
    weights, _ = limits.weights_of(config, shape)
    for limit in in_bytes:
        spare_bits = 8 * (limit.most - costs[limit])
        most = min(most, fewest + spare_bits / weights)
    return most


def _no_choice(sizes: Sizes, least: Mapping[limits.Limit, float], *, bits: bool) -> MisError:
    """The refusal where no student is within the limits. least: the smallest within reach."""
    closed = [axis for axis in CUTS if len(sizes[axis]) == 1]
    if not bits:
        closed.append("bits")
    remedy = "ask for a smaller cut"
    if closed:
        remedy += f", or add {' '.join(closed)} to `search --axes`"
    for limit, reach in least.items():
        if reach > limit.most:
            why = (
                f"that is {limit.words(limit.most)}, but the smallest possible student has "
                f"{limit.words(reach)}"
            )
            return MisError(f"{limit.flag}: {why}: {remedy}")
    flags = " and ".join(limit.flag for limit in least)
    return MisError(f"{flags}: each limit can be met, but no student meets all of them: {remedy}")


def shapes(config: Mapping[str, Any], sizes: Sizes) -> Iterator[Shape]:
    """All combinations that a loader accepts."""
    axes = CUTS[:-1]
    for combination in itertools.product(*(sizes[axis] for axis in axes)):
        shape = _shape(config, dict(zip(axes, combination, strict=True)))
        if shape:
            for vocab in sizes["vocab"]:
                yield replace(shape, vocab=vocab)


def best(candidates: Iterable[Choice], sizes: Sizes, losses: Losses, count: int) -> list[Choice]:
    """The `count` of which least is expected to be lost, the best first.

    No two are a step along one axis apart.
    """
    chosen = dict[Choice, np.ndarray]()  # with its place among the sizes of each axis
    for choice in sorted(candidates, key=losses.expected):
        steps = []
        for axis in CUTS:
            steps.append(sizes[axis].index(getattr(choice.shape, axis)))
        place = np.array(steps)
        if all(abs(place - other).sum() > 1 for other in chosen.values()):
            chosen[choice] = place
        if len(chosen) == count:
            break
    return list(chosen)


def rounding_of(choice: Choice) -> QuantizationConfig:
    """How a student of this choice is rounded."""
    return QuantizationConfig(
        q_group_size=group_of(choice.shape),  # type: ignore[arg-type]
        target_bpw=choice.bpw,
        q_iters=0,
    )
