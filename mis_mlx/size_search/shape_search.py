"""Sizes that a student could have, the bytes of its file, and what it should lose.

Tokens and bits, and FFN neurons where bytes ask for it. Arithmetic on configs. Losses are of each
axis by itself and added up; they are measured elsewhere.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.distillation import plan_report, strategies
from mis_mlx.maths import stats
from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.architectures.shape import Shape, Shapes, weight_count
from mis_mlx.quantization import format_costs
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import MisError

CUTS = ("ffn", "vocab")
GROUPS = (64, 32)  # weights that share a scale; one of them has to divide every row
SIZES = 12  # of the FFN, tried at the most
USUAL_BPW = 4.5
UNROUNDED = 16.0  # bits of a weight where nobody rounds
LEAST_SHARE = 0.25  # of what the teacher has on an axis
TENSOR_BYTES = 120  # in a file's header
OTHER_PARTS = 3  # of a header, each as long as that of a tensor
Sizes = Mapping[str, Sequence[int]]  # of every axis, rising, the teacher's last
# The share of a loss that learning leaves, by the axis that it comes from. ffn, bits: students of
# 50 MB (distilled, 20 steps, rounded by gptq). vocab: that loss is measured on text like the one
# that chose the tokens; five texts of other kinds lose 5 times as much (24,576 and 12,288 tokens:
# 0.017 and 0.087 bits a byte). All of SmolLM2-135M, one seed.
REMAINING_LOSS = {"ffn": 0.28, "vocab": 5.0, "bits": 0.42}
# The same of losses on the teacher's answers. Its conversations are in the training text, except
# those that measure this.
REMAINING_ANSWER_LOSS = {"ffn": strategies.FFN_LOSS_LEFT, "vocab": 0.7, "bits": 0.45}
STEPS = 30  # after which so much is left
# of 30, 300 and 2,400 steps the teacher's answers kept 0.463, 0.405, 0.393 (benchmarks/README.md)
FADING = 0.06


class Choice(NamedTuple):
    """Sizes, and the mean bits of a weight, scales included."""

    shape: Shape
    bpw: float

    @property
    def sizes(self) -> dict[str, int | float]:
        """By axis, for a log."""
        return {"ffn": self.shape.ffn, "vocab": self.shape.vocab, "bits": self.bpw}

    def flags(self, before: Shape) -> dict[str, Any]:
        """Settings of `distill` that make this student. before: the teacher's shape."""
        flags: dict[str, Any] = {"scenario": "none"}
        if self.shape.ffn != before.ffn:
            flags["ffn"] = self.shape.ffn
        if self.shape.vocab != before.vocab:
            flags["vocab"] = str(self.shape.vocab)
        if self.bpw != UNROUNDED:
            flags["target_bpw"] = self.bpw
            if group_of(self.shape) != GROUPS[0]:
                flags["q_group_size"] = group_of(self.shape)
        return flags

    def words(self, before: Shape) -> str:
        """For people: 'FFN 1280, 24,576 tokens, 4.20 bits'. before: the teacher's shape."""
        return f"{plan_report.cut_words(self.shape, before)}, {self.bpw:.2f} bits"


def group_of(shape: Shape) -> int:
    """The largest group that cuts every matrix (quantization/packed_format); 0: none does."""
    rows = (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
    for group in GROUPS:
        if all(size % group == 0 for size in rows):
            return group
    return 0


def bpw_range(config: Mapping[str, Any], shape: Shape) -> tuple[float, float]:
    """(fewest, most) mean bits of a weight in a student of this shape, scale and bias included.

    Some families have small matrices that never have few bits. MisError where no group cuts every
    matrix.
    """
    group: Any = group_of(shape) or GROUPS[-1]
    one_group = QuantizationConfig(q_group_size=group, q_groups="one")
    fewest, most = format_costs.limits(arch.student_config(config, shape), one_group)
    return math.ceil(100 * fewest) / 100, most


def tensors_of(config: Mapping[str, Any], shape: Shape) -> Shapes:
    """The tensors of a student of this shape, before it is rounded."""
    return arch.tensors_of(arch.student_config(config, shape))


def file_bytes(config: Mapping[str, Any], shape: Shape, bpw: float) -> float:
    """Bytes of a student's file: matrices in `bpw` bits a weight, other numbers in 2 bytes."""
    tensors = tensors_of(config, shape)
    weights = weight_count(matrices_of(tensors))
    others = weight_count(tensors) - weights
    parts = len(tensors) + 2 * len(matrices_of(tensors))  # scales and biases of each matrix, too
    return bpw / 8 * weights + 2 * others + TENSOR_BYTES * (parts + OTHER_PARTS)


def matrices_of(tensors: Shapes) -> Shapes:
    """Those of these tensors that are rounded."""
    return {name: size for name, size in tensors.items() if len(size) == 2}


def axis_sizes(
    config: Mapping[str, Any], vocab: Sequence[int], *, ffn: bool = False
) -> dict[str, tuple[int, ...]]:
    """The sizes of every axis to be tried, the teacher's last.

    vocab: numbers of rows. ffn: whether neurons may be cut: to evenly spread sizes that a student
    can have and bits can pack.
    """
    before = shape_of(config)
    fits = list[int]()
    if ffn:
        for size in range(arch.FFN_MULTIPLE, before.ffn, arch.FFN_MULTIPLE):
            shape = replace(before, ffn=size)
            if size >= LEAST_SHARE * before.ffn and group_of(shape):
                fits.append(size)
    spread = [fits[place] for place in stats.spread(len(fits), SIZES)]
    return {"ffn": (*spread, before.ffn), "vocab": (*sorted(vocab), before.vocab)}


def shapes(config: Mapping[str, Any], sizes: Sizes) -> list[Shape]:
    """All combinations of sizes."""
    before = shape_of(config)
    found = []
    for ffn in sizes["ffn"]:
        for vocab in sizes["vocab"]:
            found.append(replace(before, ffn=ffn, vocab=vocab))
    return found


def probes_of(sizes: Sizes) -> list[tuple[str, int]]:
    """(axis, size) of every student that is measured to learn what one axis costs alone.

    Of the FFN one or two: those nearest to 5/6 and to 2/3 of the teacher's. Bits are measured
    apart.
    """
    *smaller, most = sizes["ffn"]
    nearest = set[int]()
    for share in (5 / 6, 2 / 3):
        distances = [abs(size - share * most) for size in smaller]
        if smaller:
            nearest.add(smaller[distances.index(min(distances))])
    probes = [("ffn", size) for size in sorted(nearest)]
    probes += [("vocab", rows) for rows in sizes["vocab"][:-1]]
    return probes


def remaining_after(iters: int | None, left: Mapping[str, float]) -> dict[str, float]:
    """The share of a loss that so many steps leave, by axis; None: of the usual number."""
    power = (STEPS / max(1, iters or STEPS)) ** FADING
    return {**left, "ffn": left["ffn"] * power}


class Losses(NamedTuple):
    """Nats a byte that a teacher loses by one axis alone: (size, nats) of some sizes of each.

    remaining: by axis, the share that learning leaves."""

    before: Shape
    points: Mapping[str, Sequence[tuple[float, float]]]
    remaining: Mapping[str, float] = REMAINING_LOSS

    def by_axis(self, choice: Choice) -> dict[str, float]:
        """The loss that each axis of a student should cost, before it learns."""
        values = {}
        if self.points.get("ffn"):
            values["ffn"] = self._of_ffn(choice.shape.ffn)
        if self.points.get("vocab"):
            known = {**dict(self.points["vocab"]), self.before.vocab: 0.0}
            values["vocab"] = known[choice.shape.vocab]
        bits = self.points.get("bits")
        if bits:
            bpw, nats = np.array(bits).T
            values["bits"] = float(np.interp(choice.bpw, bpw, nats))
        return values

    def _of_ffn(self, size: int) -> float:
        """scale * removed ** power through the points."""
        most = self.before.ffn
        removed = 1 - size / most
        points = self.points["ffn"]
        if removed == 0:
            return 0.0
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
        values = self.by_axis(choice)
        return sum(self.remaining[axis] * value for axis, value in values.items())

    def fewest_bits(self, shape: Shape, lose: float, most: float) -> float | None:
        """The fewest bits in which a student of this shape should lose `lose` nats a byte or less.

        `most` at most; None where there are none. In hundredths of a bit, rounded up. The curve
        begins at the teacher's fewest bits: a student may need some more.
        """
        values = self.by_axis(Choice(shape, most))
        of_shape = sum(self.remaining[axis] * values[axis] for axis in values if axis != "bits")
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
    sizes: Sizes,
    losses: Losses,
    lose: float,
    *,
    most_bytes: float = math.inf,
) -> list[Choice]:
    """Of every shape the student of the fewest bits that should lose `lose` nats a byte or less.

    Fewest bytes first, at most `most_bytes`. Where bits are not chosen, none is rounded.
    """
    sized = list[tuple[float, Choice]]()
    for shape in shapes(config, sizes):
        bpw: float | None = UNROUNDED
        if "bits" in losses.points:
            fewest, most = bpw_range(config, shape)
            bpw = losses.fewest_bits(shape, lose, most)
            if bpw is not None:
                bpw = max(bpw, fewest)
        elif losses.expected(Choice(shape, UNROUNDED)) > lose:
            bpw = None
        if bpw is None:
            continue
        nbytes = file_bytes(config, shape, bpw)
        if nbytes <= most_bytes:
            sized.append((nbytes, Choice(shape, bpw)))
    sized.sort(key=lambda pair: pair[0])
    return [choice for _, choice in sized]


def within(config: Mapping[str, Any], sizes: Sizes, most_bytes: float) -> list[Choice]:
    """Every student of `most_bytes` at most, in the most bits that these allow; [] if none is."""
    chosen = list[Choice]()
    for shape in shapes(config, sizes):
        fewest, most = bpw_range(config, shape)
        spare_bytes = most_bytes - file_bytes(config, shape, fewest)
        if spare_bytes < 0:
            continue
        weights = weight_count(matrices_of(tensors_of(config, shape)))
        bpw = min(most, fewest + 8 * spare_bytes / weights)
        # Rounded down, but not below the fewest: 100 times 4.01 is less than 401.
        chosen.append(Choice(shape, max(fewest, math.floor(100 * bpw) / 100)))
    return chosen


def too_few_bytes(
    config: Mapping[str, Any], sizes: Sizes, asked: str, most_bytes: float
) -> MisError:
    """The refusal of a --bytes that no student has: what these sizes reach, and what would do."""
    reached = math.inf
    for shape in shapes(config, sizes):
        fewest, _ = bpw_range(config, shape)
        reached = min(reached, file_bytes(config, shape, fewest))
    remedy = "take a smaller teacher"
    rows = sizes["vocab"][0]
    for name, ratios in scenarios.RATIOS.items():
        try:
            shape = replace(arch.target_shape(config, ratios), vocab=rows)
            fewest, _ = bpw_range(config, shape)
        except MisError:
            continue
        if file_bytes(config, shape, fewest) <= most_bytes:
            remedy = (
                f"--scenario {name} --vocab {rows} --target-bpw {fewest:g} would, at a loss that "
                f"no search measures; or {remedy}"
            )
            break
    return MisError(
        f"--bytes {asked}: that is {most_bytes / 1e6:.4g} MB, but tokens, bits and FFN reach no "
        f"less than {reached / 1e6:.4g} MB: {remedy}"
    )


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
