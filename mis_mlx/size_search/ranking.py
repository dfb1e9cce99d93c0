"""Which students of a search lose least, or are the smallest that lose little enough.

What axes cost together is not what they cost alone. So students are measured, and the sums of what
axes cost alone only say which ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mis_mlx import cli
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.reporting import progress
from mis_mlx.size_search import candidates, excess, shape_search
from mis_mlx.size_search.limits import Limit, file_bytes
from mis_mlx.size_search.shape_search import Choice, Losses, Sizes
from mis_mlx.types import MisError

# Axes together are taken to cost between so many times and so many times the sum of each alone.
TOGETHER = 0.33, 3.0
CLOSE = 1.03  # times --lose that a student may be expected to lose
NEAR = 0.03  # share of --lose: no student is sought beyond one that is so near to it
# (students that were measured, the best first; nats a byte that each of them should lose)
Ranking = tuple[list[Choice], dict[Choice, float]]


def rank(c: candidates.Candidates, within: Sequence[Choice], sizes: Sizes) -> Ranking:
    """The students that should lose least, measured.

    MisError where no loss is a number; students whose loss is not a number are left out.
    """
    with progress.phase("rank"):
        losses = excess.losses(c, sizes)
        likely = shape_search.best(within, sizes, losses, c.settings.evaluations)
        found = excess.scores(c, likely, losses)
        scores = dict(zip(likely, found, strict=True))
        for choice, score in scores.items():
            cli.say(_shown(choice, score))
    finite = [choice for choice, score in scores.items() if math.isfinite(score)]
    if not finite:
        raise MisError(
            f"none of {len(scores)} candidates has a loss that is a number: ask for a smaller cut"
        )
    return sorted(finite, key=lambda choice: scores[choice]), scores


def _shown(choice: Choice, score: float) -> str:
    return f"{choice.name}  {score / math.log(2):.3f} bits per byte"


def smallest(
    c: candidates.Candidates,
    within: Sequence[Choice],
    sizes: Sizes,
    limits: Sequence[Limit],
) -> Ranking:
    """The students that should lose --lose or less, the smallest first.

    The smallest student by the sum is measured, and the sums are corrected by what was found, until
    the smallest one by corrected sums is one that was measured.
    """
    lose = c.settings.lose * math.log(2)  # nats a byte
    evaluations = c.settings.evaluations
    shapes = [choice.shape for choice in within]
    config = c.teacher.config
    scores = dict[Choice, float]()
    with progress.phase("rank"):
        losses = excess.losses(c, sizes)
        together = 1.0  # the measured loss over the sum
        with progress.bar("rank", evaluations) as show:
            for number in range(1, evaluations + 1):
                fitting = shape_search.smallest(
                    config, shapes, losses, lose / together, within=limits
                )
                if not fitting and not scores:
                    raise MisError(_nearest(c, shapes, losses, limits))
                if not fitting or fitting[0] in scores:
                    break
                choice = fitting[0]
                (score,) = excess.scores(c, [choice], losses)
                scores[choice] = score
                show(number, _shown(choice, score))
                if abs(score - lose) <= NEAR * lose:
                    break
                together = TOGETHER[1]
                if math.isfinite(score):
                    ratio = score / losses.expected(choice)
                    together = float(np.clip(ratio, *TOGETHER))

    def order(choice: Choice) -> tuple[bool, float]:
        too_much = scores[choice] > CLOSE * lose
        return too_much, file_bytes(config, *choice)

    ranked = sorted(scores, key=order)
    if scores[ranked[0]] > CLOSE * lose:  # no student keeps to it: the nearest first
        ranked.sort(key=lambda choice: scores[choice])
    return ranked, scores


def _nearest(
    c: candidates.Candidates,
    shapes: Sequence[Shape],
    losses: Losses,
    limits: Sequence[Limit],
) -> str:
    """The sentence on a --lose that no student keeps to.

    It says what the best student within the other limits should lose.
    """
    config = c.teacher.config
    beside = "".join(f" and {limit.flag}" for limit in limits)
    asked = f"--lose {c.settings.lose:g}{beside}"
    least = 0.002  # bits a byte
    while True:
        nats = least * math.log(2)
        students = shape_search.smallest(config, shapes, losses, nats, within=limits)
        if students:
            break
        if least > candidates.WORST:
            return f"{asked}: no possible student stays within it: ask for a smaller cut"
        least *= 1.1
    megabytes = file_bytes(config, *students[0]) / 1e6
    what = f"the nearest student should lose {least:.2g} bits per byte, with {megabytes:.4g} MB"
    remedy = f"give --lose {_rounded_up(least)}"
    if limits:
        remedy += f", or leave out {limits[0].flag}"
    return f"{asked} cannot be reached: {what}: {remedy}"


def _rounded_up(value: float) -> str:
    """To two digits that are not zero."""
    scale = 10 ** (1 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale) / scale:g}"


def flags_of(choice: Choice, before: Shape) -> dict[str, Any]:
    """Settings of `distill` that make this student. before: the teacher's shape."""
    flags: dict[str, Any] = {"scenario": "none"}
    for axis in shape_search.CUTS:
        size = getattr(choice.shape, axis)
        if size != getattr(before, axis):
            flags[axis] = str(size) if axis == "vocab" else size
    flags["target_bpw"] = choice.bpw
    group = shape_search.group_of(choice.shape)
    if group != 64:
        flags["q_group_size"] = group
    return flags


def named(choices: Sequence[Choice], before: Shape) -> list[str]:
    """The students for people: their sizes and bits. before: the teacher's shape."""
    return [
        f"{shape_search.words(choice.shape, before)}, {choice.bpw:.2f} bits" for choice in choices
    ]
