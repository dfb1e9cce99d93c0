"""Which shapes a student could have, which of them meet an aim, and a search that measures few of these.

Arithmetic on configs; what a shape is worth is asked of a `score(shape)`."""

import itertools
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mis_mlx.models import arch
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.planner import compression_size, estimates
from mis_mlx.types import MisError, gib

AXES = ("layers", "ffn", "heads", "hidden")
GROUPS = (64, 32)  # weights that share a scale in 4 bits; one of them has to divide every row
WIDTHS = 24  # hidden sizes tried at the most: of 4096 they are multiples of 256, as Minitron's
POPULATION, CHILDREN = 3, 2  # mu and lambda
FORMS = {
    "layers": "{} layers",
    "experts": "{} experts",
    "ffn": "FFN {}",
    "heads": "{} heads",
    "hidden": "hidden {}",
    "vocab": "{:,} tokens",
}
JUMPS = (-2, -1, 1, 2)  # places along an axis that a mutation goes


def label(shape: Shape) -> str:
    """Short, and a file name: '20l-1280f-9h-576d'."""
    return f"{shape.layers}l-{shape.ffn}f-{shape.heads}h-{shape.hidden}d"


def words(shape: Shape, before: Shape) -> str:
    """What of the teacher's shape is cut: '20 layers, FFN 1280'."""
    cut = [form.format(getattr(shape, a)) for a, form in FORMS.items() if getattr(shape, a) != getattr(before, a)]
    return ", ".join(cut) or "the teacher's own"


def group_of(shape: Shape) -> int:
    """The largest group that cuts every matrix into 4 bits (quantization/packed_format); 0: none does."""
    rows = (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
    return next((g for g in GROUPS if not any(n % g for n in rows)), 0)


@dataclass(frozen=True)
class Aim:
    """What a student may cost: `low` <= cost(shape) <= `high`; parameters, bytes, or seconds a token."""

    flag: str  # as it was given: '--params 0.667x'
    teacher: float
    low: float
    high: float
    cost: Callable[[Shape], float]
    words: Callable[[float], str]

    def meets(self, shape: Shape) -> bool:
        """Whether the shape costs neither too much nor too little."""
        return self.low <= self.cost(shape) <= self.high


def _number(flag: str, text: str, units: Mapping[str, float], example: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in units or not 0 < float(match[1]) < 1e18:
        raise MisError(f"{flag} {text!r} is not understood: write {example}")
    return float(match[1]) * units[match[2]], match[2]


def params_aim(config: Mapping[str, Any], text: str, tolerance: float) -> Aim:
    """'0.667x' of the teacher, or '90M': that, give or take `tolerance` of the teacher."""
    units = {"x": 1.0, "": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
    value, unit = _number("--params", text, units, "a share of the teacher, such as 0.667x, or a number, such as 90M")
    teacher = arch.params(config)
    target = value * teacher if unit == "x" else value

    def words(cost: float) -> str:
        return f"{count(cost)} parameters ({cost / teacher:.3f}x)"

    if target >= teacher:
        raise MisError(f"--params {text}: that is {words(target)}, the teacher has {count(teacher)}: ask for fewer")
    margin = tolerance * teacher
    return Aim(f"--params {text}", teacher, target - margin, target + margin,
               lambda shape: arch.params(arch.student_config(config, shape)), words)  # fmt: skip


def count(n: float) -> str:
    """Parameters for people: '90.3M'."""
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


def memory_bytes(config: Mapping[str, Any], cached: int) -> int:
    """Of a model in use: its weights in 4 bits, and keys and values of `cached` tokens in 2 bytes each."""
    m = estimates.model_of(config, gpu=True)
    return compression_size.packed_bytes(m) + estimates.keys_bytes(m, cached)


def memory_aim(config: Mapping[str, Any], text: str, limit: int, tolerance: float, cached: int) -> Aim:
    """At most `limit` bytes of memory in use, and at least twice `tolerance` of the teacher's less."""
    teacher = memory_bytes(arch.student_config(config, shape_of(config)), cached)
    if limit >= teacher:
        why = f"the teacher takes {gib(teacher)} in 4 bits with {cached} tokens of context, which fits"
        raise MisError(f"--memory {text}: {why}: ask for less")
    return Aim(f"--memory {text}", teacher, limit - 2 * tolerance * teacher, limit,
               lambda shape: memory_bytes(arch.student_config(config, shape), cached), gib)  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """Seconds of one token of the teacher, by two timings: one block, and all that is not a block."""

    block_s: float
    rest_s: float


def decode_aim(config: Mapping[str, Any], text: str, tolerance: float, cached: int, timed: Decoding) -> Aim:
    """At least '1.5x' the teacher's tokens a second with `cached` tokens in the cache.

    An estimate from the teacher's times: a block's grows with the weights, keys and values it fetches, the rest with
    the width of the stream and the vocabulary. Finalists are timed themselves."""
    value, _ = _number("--decode", text, {"x": 1.0}, "how many times as quick as the teacher, such as 1.5x")
    if value <= 1:
        raise MisError(f"--decode {text}: the teacher itself decodes at 1x: ask for more than 1x")
    before = shape_of(config)
    fetched = _fetched(config, before, cached)

    def cost(shape: Shape) -> float:
        blocks = shape.layers * timed.block_s * _fetched(config, shape, cached) / fetched
        return blocks + timed.rest_s * shape.hidden * shape.vocab / (before.hidden * before.vocab)

    teacher = cost(before)
    high = teacher / value
    return Aim(f"--decode {text}", teacher, high - 2 * tolerance * teacher, high, cost,
               lambda seconds: f"{teacher / seconds:.2f}x the teacher's speed")  # fmt: skip


def _fetched(config: Mapping[str, Any], shape: Shape, cached: int) -> int:
    """Numbers that a block takes from memory for one token."""
    weights = sum(map(math.prod, arch.layer_tensors(arch.student_config(config, shape)).values()))
    return weights + 2 * cached * shape.kv_heads * shape.head_dim


def axis_values(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis, rising, the teacher's last, that 4 bits can hold; `gate` says which go together."""
    s, group = shape_of(config), GROUPS[-1]
    step = group
    while s.hidden // step > WIDTHS:
        step *= 2
    values = {
        "layers": range(1, s.layers),
        "ffn": range(arch.FFN_MULTIPLE, s.ffn, arch.FFN_MULTIPLE),
        "heads": (n for n in range(s.kv_heads, s.heads, s.kv_heads) if n * s.head_dim % group == 0),
        "hidden": range(step, s.hidden, step),
    }
    return {axis: (*sizes, getattr(s, axis)) for axis, sizes in values.items()}


def stuck(config: Mapping[str, Any]) -> str:
    """The axes that cannot be cut, for people; empty when all can."""
    fixed = [f"{axis} {sizes[0]}" for axis, sizes in axis_values(config).items() if len(sizes) == 1]
    return ", ".join(fixed)


def gate(config: Mapping[str, Any], ratios: Mapping[str, float] | None = None, **sizes: int) -> Shape | None:
    """The shape of these ratios (arch.SCENARIOS) or sizes; None where no loader accepts it."""
    try:
        return arch.target_shape(config, ratios or {}, **sizes)
    except MisError:
        return None


def field(config: Mapping[str, Any], aim: Aim) -> list[Shape]:
    """Every shape that meets the aim, the teacher's own left out. MisError with both numbers when none does."""
    before, values = shape_of(config), axis_values(config)
    meeting, near, least = list[Shape](), list[Shape](), list[Shape]()
    for layers, heads, hidden in itertools.product(values["layers"], values["heads"], values["hidden"]):
        make = partial(gate, config, layers=layers, heads=heads, hidden=hidden)
        if (smallest := make(ffn=values["ffn"][0])) is None:
            continue
        sizes = [replace(smallest, ffn=n) for n in values["ffn"]]  # costs rise with it, so a piece of them is in
        low, high = bisect_left(sizes, aim.low, key=aim.cost), bisect_right(sizes, aim.high, key=aim.cost)
        meeting += [s for s in sizes[low:high] if s != before and make(ffn=s.ffn)]
        near += [s for s in sizes[max(0, low - 1) : low + 1] if s != before]
        least.append(smallest)
    if meeting:
        return meeting
    cheapest, target = min(map(aim.cost, least)), (aim.low + aim.high) / 2
    fixed = f" ({stuck(config)} cannot be cut)" if stuck(config) else ""
    if cheapest > aim.high or not near:
        why = f"that is {aim.words(aim.high)} at the most, the smallest shape this teacher can be cut to has "
        raise MisError(f"{aim.flag}: {why}{aim.words(cheapest)}{fixed}: ask for less of a cut")
    nearest = min(map(aim.cost, near), key=lambda cost: abs(cost - target))
    why = f"no shape lies between {aim.words(aim.low)} and {aim.words(aim.high)}, the nearest has {aim.words(nearest)}"
    raise MisError(f"{aim.flag}: {why}{fixed}: widen --tolerance, or ask for that")


def scenarios(config: Mapping[str, Any], aim: Aim) -> list[Shape]:
    """Shapes of the named scenarios that meet the aim and have a 4-bit form, if the teacher has one."""
    before, meeting = shape_of(config), list[Shape]()
    for ratios in arch.SCENARIOS.values():
        shape = gate(config, ratios)
        if shape and shape != before and aim.meets(shape) and (group_of(shape) or not group_of(before)):
            meeting.append(shape)
    return meeting


def evolve(
    shapes: Sequence[Shape], first: Sequence[Shape], score: Callable[[Shape], float], seed: int, limit: int
) -> dict[Shape, float]:
    """{shape: score} of at most `limit` of the shapes, lower is better; all of them where they are no more.

    Otherwise (mu + lambda): `first` and random ones begin, then each generation mutates the best so far.
    The same seed and the same scores visit the same shapes in the same order."""
    if len(shapes) <= limit:
        return {shape: score(shape) for shape in shapes}
    rng = np.random.default_rng([seed, 3])
    begin = dict.fromkeys([*first, *(shapes[i] for i in rng.permutation(len(shapes))[:POPULATION])])
    scores = {shape: score(shape) for shape in [*begin][: min(limit, max(POPULATION, len(first)))]}
    while len(scores) < limit:
        parents = sorted(scores, key=lambda shape: scores[shape])[:POPULATION]  # of equals the earlier
        for _ in range(min(CHILDREN, limit - len(scores))):
            unseen = [shape for shape in shapes if shape not in scores]
            child = mutate(parents[rng.integers(len(parents))], shapes, unseen, rng)
            scores[child] = score(child)
    return scores


def mutate(parent: Shape, shapes: Sequence[Shape], unseen: Sequence[Shape], rng: np.random.Generator) -> Shape:
    """One axis goes one or two places up or down, the others make up for it: the nearest unseen shape there."""
    sizes = {axis: sorted({getattr(shape, axis) for shape in shapes}) for axis in AXES}
    free = [axis for axis in AXES if len(sizes[axis]) > 1]
    axis, jump = free[rng.integers(len(free))], int(rng.choice(JUMPS))
    at = sizes[axis].index(getattr(parent, axis))
    to = at + jump if 0 <= at + jump < len(sizes[axis]) else at - jump
    value = sizes[axis][min(max(to, 0), len(sizes[axis]) - 1)]

    def distance(shape: Shape) -> float:
        return sum(abs(getattr(shape, a) - getattr(parent, a)) / sizes[a][-1] for a in AXES)

    return min([s for s in unseen if getattr(s, axis) == value] or unseen, key=distance)
