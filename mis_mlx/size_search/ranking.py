"""Which students of a search lose least, or are the smallest that lose little enough.

What axes cost together is not what they cost alone. So students are measured, and the sums of what
axes cost alone only say which ones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mis_mlx import cli
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.reporting import progress
from mis_mlx.size_search import candidates, excess, shape_search
from mis_mlx.size_search.shape_search import Choice, Losses, Sizes, file_bytes
from mis_mlx.types import MisError

# Axes together are taken to cost between so many times and so many times the sum of each alone.
TOGETHER = 0.33, 3.0
CLOSE = 1.03  # times --lose that a student may be expected to lose
NEAR = 0.03  # share of --lose: no student is sought beyond one that is so near to it
POINTS = 12  # of the table of bytes against expected loss
LEAST_LOSS = 0.02  # bits a byte: its first point
MOST_LOSS = 0.5


class Found(NamedTuple):
    """What a search found. ranked: the students that were measured, the best first.

    scores: nats a byte that each of them should lose. losses: what each axis costs alone;
    together: times the sum of these that the best student cost.
    """

    ranked: list[Choice]
    scores: dict[Choice, float]
    losses: Losses
    together: float


def rank(
    c: candidates.Candidates, within: Sequence[Choice], sizes: Sizes, *, evaluations: int
) -> Found:
    """The students that should lose least, measured, `evaluations` of them.

    MisError where no loss is a number; students whose loss is not a number are left out.
    """
    with progress.phase("rank"):
        losses = excess.losses(c, sizes)
        likely = shape_search.best(within, sizes, losses, evaluations)
        found = excess.scores(c, likely, losses)
        scores = dict(zip(likely, found, strict=True))
        for choice, score in scores.items():
            cli.say(_shown(c, choice, score))
    finite = [choice for choice, score in scores.items() if math.isfinite(score)]
    if not finite:
        raise MisError(
            f"none of {len(scores)} candidates has a loss that is a number: ask for a smaller cut"
        )
    ranked = sorted(finite, key=lambda choice: scores[choice])
    return Found(ranked, scores, losses, _together(losses, ranked[0], scores[ranked[0]]))


def _together(losses: Losses, choice: Choice, score: float) -> float:
    """Times the sum of what its axes cost alone that a student should lose."""
    if not math.isfinite(score):
        return TOGETHER[1]
    return float(np.clip(score / max(losses.expected(choice), 1e-9), *TOGETHER))


def _shown(c: candidates.Candidates, choice: Choice, score: float) -> str:
    return f"{choice.words(c.before)}: {score / math.log(2):.3f} bits per byte"


def smallest(
    c: candidates.Candidates, sizes: Sizes, lose_bits: float, *, evaluations: int, most_bytes: float
) -> Found:
    """The students that should lose `lose_bits` a byte or less, the smallest first.

    The smallest student by the sum is measured, and the sums are corrected by what was found, until
    the smallest one by corrected sums is one that was measured.
    """
    lose = lose_bits * math.log(2)  # nats a byte
    config = c.teacher.config
    shapes = shape_search.shapes(config, sizes)
    scores = dict[Choice, float]()
    with progress.phase("rank"):
        losses = excess.losses(c, sizes)
        together = 1.0  # the measured loss over the sum
        with progress.bar("rank", evaluations) as show:
            for number in range(1, evaluations + 1):
                fitting = shape_search.smallest(
                    config, shapes, losses, lose / together, most_bytes=most_bytes
                )
                if not fitting and not scores:
                    raise MisError(_nearest(c, shapes, losses, lose_bits, most_bytes))
                if not fitting or fitting[0] in scores:
                    break
                choice = fitting[0]
                (score,) = excess.scores(c, [choice], losses)
                scores[choice] = score
                show(number, _shown(c, choice, score))
                if abs(score - lose) <= NEAR * lose:
                    break
                together = _together(losses, choice, score)

    def order(choice: Choice) -> tuple[bool, float]:
        too_much = scores[choice] > CLOSE * lose
        return too_much, file_bytes(config, *choice)

    ranked = sorted(scores, key=order)
    if scores[ranked[0]] > CLOSE * lose:  # no student keeps to it: the nearest first
        ranked.sort(key=lambda choice: scores[choice])
    return Found(ranked, scores, losses, _together(losses, ranked[0], scores[ranked[0]]))


def table(c: candidates.Candidates, found: Found, sizes: Sizes) -> list[dict[str, Any]]:
    """Bytes against expected loss: {"loss": bits a byte, "bytes", "student": words}, rising loss.

    The fewest bytes for each loss, by corrected sums; the best student as it was measured.
    """
    config = c.teacher.config
    shapes = shape_search.shapes(config, sizes)
    best = found.ranked[0]
    expected = {best: found.scores[best]}
    for allowed in np.geomspace(LEAST_LOSS, MOST_LOSS, POINTS):
        nats = float(allowed) * math.log(2) / found.together
        for choice in shape_search.smallest(config, shapes, found.losses, nats)[:1]:
            expected.setdefault(choice, found.losses.expected(choice) * found.together)
    rows = list[dict[str, Any]]()
    for choice, nats in sorted(expected.items(), key=lambda pair: pair[1]):
        nbytes = round(file_bytes(config, *choice))
        if not rows or nbytes < rows[-1]["bytes"]:
            loss = round(nats / math.log(2), 4)
            rows.append({"loss": loss, "bytes": nbytes, "student": choice.words(c.before)})
    return rows


def _nearest(
    c: candidates.Candidates,
    shapes: Sequence[Shape],
    losses: Losses,
    lose_bits: float,
    most_bytes: float,
) -> str:
    """The sentence on a --lose that no student keeps to, with what the best one should lose."""
    config = c.teacher.config
    limited = math.isfinite(most_bytes)
    asked = f"--lose {lose_bits:g}"
    if limited:
        asked += f" in {most_bytes / 1e6:.4g} MB"
    least = 0.002  # bits a byte
    while True:
        nats = least * math.log(2)
        students = shape_search.smallest(config, shapes, losses, nats, most_bytes=most_bytes)
        if students:
            break
        if least > candidates.WORST:
            return f"{asked}: no possible student stays within it: ask for a smaller cut"
        least *= 1.1
    megabytes = file_bytes(config, *students[0]) / 1e6
    what = f"the nearest student should lose {least:.2g} bits per byte, with {megabytes:.4g} MB"
    remedy = f"give --lose {_rounded_up(least)}"
    if limited:
        remedy += ", or leave out --bytes"
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
    if choice.bpw == shape_search.UNROUNDED:
        return flags
    flags["target_bpw"] = choice.bpw
    group = shape_search.group_of(choice.shape)
    if group != 64:
        flags["q_group_size"] = group
    return flags
