"""Sizes that a student could have under limits on bytes, memory and time, and which should lose
least.

Arithmetic on configs. What is lost is told of each axis by itself and added up; it is measured
elsewhere.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.maths.rounding import BITS
from mis_mlx.models import arch
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.planner.recipe import QuantizationConfig
from mis_mlx.pruning import limits
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
# What learning leaves of a loss, by the axis that it comes from. ffn, bits: finalists of `--bytes
# 50MB` (distilled, 20 steps, rounded by gptq); layers, heads, hidden: less a third of each, from
# pruned to distilled (benchmarks/README.md). vocab: that loss is told on text like that which chose
# the tokens; five texts of other kinds lose 5 times as much (24,576 and 12,288 tokens: 0.017 and
# 0.087 bits a byte). All of SmolLM2-135M, one seed.
LEFT = {"layers": 0.33, "ffn": 0.28, "heads": 0.64, "hidden": 0.72, "vocab": 5.0, "bits": 0.42}
# The same of the teacher's answers, whose conversations are in the training text but for those that
# tell it.
ANSWERS_LEFT = {
    "layers": 0.33,
    "ffn": 0.28,
    "heads": 0.64,
    "hidden": 0.72,
    "vocab": 0.7,
    "bits": 0.48,
}
STEPS = 30  # after which so much is left
# of 30, 300 and 2,400 steps the teacher's answers kept 0.463, 0.405, 0.393 (benchmarks/README.md)
FADING = 0.06
PART_LEFT = 0.30  # of heads, where a part of every group goes


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
        return {
            **{axis: getattr(self.shape, axis) for axis in (*CUTS, "kv_heads")},
            "bits": self.bpw,
        }


def words(shape: Shape, before: Shape) -> str:
    """What of the teacher's shape is cut: '20 layers, FFN 1280'."""
    cut = [
        form.format(getattr(shape, a))
        for a, form in FORMS.items()
        if getattr(shape, a) != getattr(before, a)
    ]
    return ", ".join(cut) or "the teacher's own"


def group_of(shape: Shape) -> int:
    """The largest group that cuts every matrix (quantization/packed_format); 0: none does."""
    rows = (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
    return next((g for g in GROUPS if not any(n % g for n in rows)), 0)


def bpw_range(group: int) -> tuple[float, float]:
    """(fewest, most) bits of a weight in groups of so many, scale and bias included."""
    return min(BITS) + 32 / group, max(BITS) + 32 / group


def axis_sizes(
    config: Mapping[str, Any], axes: Sequence[str], vocab: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Of every axis the teacher's size alone where the axis is not one of `axes`; else evenly
    spread ones before it that a student can have and bits can pack. vocab: numbers of rows.
    """
    s = shape_of(config)
    group = GROUPS[-1]
    sizes = dict[str, tuple[int, ...]]()
    for axis, step in {"layers": 1, "ffn": arch.FFN_MULTIPLE, "heads": 1, "hidden": group}.items():
        whole = getattr(s, axis)
        steps_of = range(step, whole, step) if axis in axes else ()
        fits = [n for n in steps_of if n >= LEAST_SHARE * whole and _shape(config, {axis: n})]
        if axis == "heads":
            fits = [n for n in fits if n * s.head_dim % group == 0]
            # whole groups, if there are several
            fits = [n for n in fits if n % (s.heads // s.kv_heads) == 0] or fits
        at = np.linspace(0, max(0, len(fits) - 1), min(SIZES, len(fits))).round().astype(int)
        sizes[axis] = (*(fits[i] for i in np.unique(at)), whole)
    return sizes | {"vocab": (*sorted(vocab), s.vocab) if "vocab" in axes else (s.vocab,)}


def _shape(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Shape | None:
    """The teacher's shape cut to these sizes; None where no loader accepts it."""
    try:
        return arch.target_shape(config, {}, **sizes)
    except MisError:
        return None


def probed(sizes: Sequence[int]) -> list[int]:
    """The one or two sizes of an axis that are measured by themselves: nearest to 5/6 and to 2/3 of
    the largest.
    """
    *smaller, whole = sizes
    return sorted(
        {min(smaller, key=lambda n: abs(n - share * whole)) for share in (5 / 6, 2 / 3)}
        if smaller
        else ()
    )


def left_after(iters: int | None, left: Mapping[str, float]) -> dict[str, float]:
    """What so many steps leave of a loss, by axis; None: of the usual number."""
    power = (STEPS / max(1, iters or STEPS)) ** FADING
    return {
        axis: share if axis in ("vocab", "bits") else share * power for axis, share in left.items()
    }


class Losses(NamedTuple):
    """Nats a byte that a teacher loses by one axis alone: (size, nats) of some sizes of each.

    left: by axis, what learning leaves of it."""

    before: Shape
    points: Mapping[str, Sequence[tuple[float, float]]]
    left: Mapping[str, float] = LEFT

    def by_axis(self, choice: Choice) -> dict[str, float]:
        """What each axis of a student is told to cost, before it learns."""
        values = {
            axis: self._along(axis, getattr(choice.shape, axis))
            for axis in CUTS
            if self.points.get(axis)
        }
        if bits := self.points.get("bits"):
            bpw, nats = np.array(bits).T
            values["bits"] = float(np.interp(choice.bpw, bpw, nats))
        return values

    def _along(self, axis: str, size: int) -> float:
        """scale * removed ** power through the points; the points themselves of the vocabulary."""
        removed = 1 - size / getattr(self.before, axis)
        points = self.points[axis]
        if removed == 0:
            return 0.0
        if axis == "vocab":
            return dict(points)[size]
        shares = [1 - n / getattr(self.before, axis) for n, _ in points]
        nats = [max(value, 1e-6) for _, value in points]
        power = 2.0  # as far as the second order reaches
        if len(points) > 1:
            power = float(
                np.clip(math.log(nats[0] / nats[1]) / math.log(shares[0] / shares[1]), 1.0, 4.0)
            )
        return nats[-1] * (removed / shares[-1]) ** power

    def raw(self, choice: Choice) -> float:
        """Of all axes together, before the student learns."""
        return sum(self.by_axis(choice).values())

    def expected(self, choice: Choice) -> float:
        """What should be left of that once it has learned."""
        return sum(self.expected_by_axis(choice).values())

    def expected_by_axis(self, choice: Choice) -> dict[str, float]:
        """The same, of each axis."""
        left = dict(self.left)
        if choice.shape.kv_heads == self.before.kv_heads:
            left["heads"] = min(left["heads"], PART_LEFT)
        return {axis: left[axis] * value for axis, value in self.by_axis(choice).items()}

    def fewest_bits(self, shape: Shape, lose: float, most: float) -> float | None:
        """The fewest bits, `most` at the most, in which a student of this shape should lose `lose`
        nats a byte or less.

        None where there are none. In hundredths of a bit, rounded up.
        """
        by_axis = self.expected_by_axis(Choice(shape, most))
        of_shape = sum(value for axis, value in by_axis.items() if axis != "bits")
        allowed = (lose - of_shape) / self.left["bits"]
        bpw, nats = np.array(self.points["bits"]).T
        # Bits that cost more than that are too few. What more bits cost never rises, so the first
        # that fits counts.
        fits = np.flatnonzero((nats <= allowed) & (bpw <= most))
        if not len(fits):
            return None
        first = int(fits[0])
        if first == 0:
            return float(bpw[0])
        share = (nats[first - 1] - allowed) / max(nats[first - 1] - nats[first], 1e-12)
        between = bpw[first - 1] + share * (bpw[first] - bpw[first - 1])
        return float(min(bpw[first], math.ceil(100 * between) / 100))


def smallest(
    config: Mapping[str, Any],
    shapes_of: Iterable[Shape],
    losses: Losses,
    lose: float,
    within: Sequence[limits.Limit],
) -> list[Choice]:
    """Of every shape the student of the fewest bits that should lose `lose` nats a byte or less;
    fewest bytes first.

    Only those within the limits. Where bits are not chosen, all have the usual ones.
    """
    found = list[tuple[float, Choice]]()
    for shape in shapes_of:
        group = group_of(shape)
        if not group:
            continue
        if "bits" in losses.points:
            bpw = losses.fewest_bits(shape, lose, bpw_range(group)[1])
        else:
            bpw = USUAL_BPW if losses.expected(Choice(shape, USUAL_BPW)) <= lose else None
        if bpw is None or bpw < bpw_range(group)[0]:
            continue
        if all(limit.cost(shape, bpw) <= limit.most for limit in within):
            found.append((limits.file_bytes(config, shape, bpw), Choice(shape, bpw)))
    found.sort(key=lambda each: each[0])
    return [choice for _, choice in found]


def choices(
    config: Mapping[str, Any], sizes: Sizes, within: Sequence[limits.Limit], bits: bool
) -> list[Choice]:
    """Every student within the limits, in the most bits that they allow; in the usual ones where
    `bits` are not to be chosen, or none of the limits is in bytes. MisError where there is none:
    the smallest number within reach, and which axes are not open.
    """
    before = shape_of(config)
    found = list[Choice]()
    least = dict.fromkeys(within, math.inf)
    in_bytes = [limit for limit in within if limit.in_bytes]
    for shape in shapes(config, sizes):
        if not (group := group_of(shape)):
            continue
        weights, _ = limits.weights_of(config, shape)
        fewest, most = bpw_range(group) if bits else (USUAL_BPW, USUAL_BPW)
        costs = {limit: limit.cost(shape, fewest) for limit in within}
        least = {limit: min(cost, least[limit]) for limit, cost in costs.items()}
        if all(cost <= limit.most for limit, cost in costs.items()) and (bits or shape != before):
            more = (8 * (limit.most - costs[limit]) / weights for limit in in_bytes)
            bpw = min([most, *(fewest + each for each in more)]) if in_bytes else USUAL_BPW
            found.append(Choice(shape, math.floor(100 * bpw) / 100))
    if found:
        return found
    closed = [axis for axis in CUTS if len(sizes[axis]) == 1] + ([] if bits else ["bits"])
    remedy = "ask for less of a cut" + (
        f", or let {', '.join(closed)} be cut too (--axes)" if closed else ""
    )
    for limit, reach in least.items():
        if reach > limit.most:
            why = (
                f"that is {limit.words(limit.most)}, the smallest student within reach has "
                f"{limit.words(reach)}"
            )
            raise MisError(f"{limit.flag}: {why}: {remedy}")
    flags = " and ".join(limit.flag for limit in within)
    raise MisError(f"{flags}: each can be met, no student meets all of them: {remedy}")


def shapes(config: Mapping[str, Any], sizes: Sizes) -> Iterator[Shape]:
    """All combinations that a loader accepts."""
    for layers, ffn, heads, hidden in itertools.product(*(sizes[axis] for axis in CUTS[:-1])):
        if shape := _shape(
            config, {"layers": layers, "ffn": ffn, "heads": heads, "hidden": hidden}
        ):
            for vocab in sizes["vocab"]:
                yield replace(shape, vocab=vocab)


def best(candidates: Iterable[Choice], sizes: Sizes, losses: Losses, count: int) -> list[Choice]:
    """The `count` of which least is expected to be lost, the best first; no two are a step along
    one axis apart.
    """
    chosen = dict[Choice, np.ndarray]()  # and where each stands among the sizes
    for choice in sorted(candidates, key=losses.expected):
        at = np.array([sizes[axis].index(getattr(choice.shape, axis)) for axis in CUTS])
        if all(abs(at - other).sum() > 1 for other in chosen.values()):
            chosen[choice] = at
        if len(chosen) == count:
            break
    return list(chosen)


def rounding_of(choice: Choice) -> QuantizationConfig:
    """How a student of this choice is rounded."""
    group = group_of(choice.shape)
    return QuantizationConfig(q_group_size=group, target_bpw=choice.bpw, q_iters=0)  # type: ignore[arg-type]
