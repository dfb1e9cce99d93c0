"""Which students of a search lose least, or are the smallest that lose little enough.

What axes cost together is not what they cost alone. So students are measured, and the sums of what
axes cost alone only say which ones.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mis_mlx import cli
from mis_mlx.reporting import progress
from mis_mlx.size_search import shape_search
from mis_mlx.size_search.candidates import Candidates
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
    """What a search found. best: the student that it chose.

    scores: nats a byte that each student which was measured should lose. losses: what each axis
    costs alone.
    """

    best: Choice
    scores: dict[Choice, float]
    losses: Losses


def rank(c: Candidates, sizes: Sizes, most_bytes: float, *, evaluations: int) -> Found:
    """The student of `most_bytes` that should lose least, of `evaluations` that are measured.

    MisError where no loss is a number; students whose loss is not a number are left out.
    """
    losses = c.losses(sizes)
    within = shape_search.within(c.teacher.config, sizes, most_bytes)
    likely = shape_search.best(within, sizes, losses, evaluations)
    scores = dict(zip(likely, c.scores(likely, losses), strict=True))
    for choice, score in scores.items():
        cli.say(_shown(c, choice, score))
    best = min(scores, key=scores.__getitem__)
    if not math.isfinite(scores[best]):
        raise MisError(
            f"none of {len(scores)} candidates has a loss that is a number: ask for a smaller cut"
        )
    return Found(best, scores, losses)


def _together(losses: Losses, choice: Choice, score: float) -> float:
    """Times the sum of what its axes cost alone that a student should lose."""
    if not math.isfinite(score):
        return TOGETHER[1]
    return float(np.clip(score / max(losses.expected(choice), 1e-9), *TOGETHER))


def _shown(c: Candidates, choice: Choice, score: float) -> str:
    return f"{choice.words(c.before)}: {score / math.log(2):.3f} bits per byte"


def smallest(
    c: Candidates, sizes: Sizes, lose_bits: float, *, evaluations: int, most_bytes: float
) -> Found:
    """The smallest student that should lose `lose_bits` a byte or less; else the nearest to it.

    The smallest student by the sum is measured, and the sums are corrected by what was found, until
    the smallest one by corrected sums is one that was measured.
    """
    lose = lose_bits * math.log(2)  # nats a byte
    config = c.teacher.config
    scores = dict[Choice, float]()
    losses = c.losses(sizes)
    together = 1.0  # the measured loss over the sum
    with progress.bar("rank", evaluations) as show:
        for number in range(1, evaluations + 1):
            fitting = shape_search.smallest(
                config, sizes, losses, lose / together, most_bytes=most_bytes
            )
            if not fitting and not scores:
                raise _out_of_reach(c, sizes, losses, lose_bits, most_bytes)
            if not fitting or fitting[0] in scores:
                break
            choice = fitting[0]
            (score,) = c.scores([choice], losses)
            scores[choice] = score
            show(number, _shown(c, choice, score))
            if abs(score - lose) <= NEAR * lose:
                break
            together = _together(losses, choice, score)
    kept = [choice for choice, score in scores.items() if score <= CLOSE * lose]
    if kept:
        best = min(kept, key=lambda choice: file_bytes(config, *choice))
    else:
        best = min(scores, key=scores.__getitem__)
    return Found(best, scores, losses)


def table(c: Candidates, found: Found, sizes: Sizes) -> list[dict[str, Any]]:
    """Bytes against expected loss: {"loss": bits a byte, "bytes", "student": words}, rising loss.

    The fewest bytes for each loss, by corrected sums; the best student as it was measured.
    """
    config = c.teacher.config
    expected = {found.best: found.scores[found.best]}
    together = _together(found.losses, found.best, expected[found.best])
    for allowed in np.geomspace(LEAST_LOSS, MOST_LOSS, POINTS):
        nats = float(allowed) * math.log(2) / together
        for choice in shape_search.smallest(config, sizes, found.losses, nats)[:1]:
            expected.setdefault(choice, found.losses.expected(choice) * together)
    rows = list[dict[str, Any]]()
    for choice, nats in sorted(expected.items(), key=lambda pair: pair[1]):
        nbytes = round(file_bytes(config, *choice))
        if not rows or nbytes < rows[-1]["bytes"]:
            loss = round(nats / math.log(2), 4)
            rows.append({"loss": loss, "bytes": nbytes, "student": choice.words(c.before)})
    return rows


def _out_of_reach(
    c: Candidates, sizes: Sizes, losses: Losses, lose_bits: float, most_bytes: float
) -> MisError:
    """The refusal of a --lose that no student keeps to, with what the nearest one should lose."""
    config = c.teacher.config
    asked = f"--lose {lose_bits:g}"
    remedy = ""
    if math.isfinite(most_bytes):
        asked += f" in {most_bytes / 1e6:.4g} MB"
        remedy = ", or leave out --bytes"
    if "bits" in losses.points:
        students = shape_search.within(config, sizes, most_bytes)
    else:
        shapes = shape_search.shapes(config, sizes)
        students = [Choice(shape, shape_search.UNROUNDED) for shape in shapes]
    nearest = min(students, key=losses.expected)
    least = max(losses.expected(nearest) / math.log(2), 0.001)
    megabytes = file_bytes(config, *nearest) / 1e6
    # two digits that are not zero, rounded up
    scale = 10 ** (1 - math.floor(math.log10(least)))
    rounded_up = math.ceil(least * scale) / scale
    return MisError(
        f"{asked} cannot be reached: the nearest student should lose {least:.2g} bits per byte, "
        f"with {megabytes:.4g} MB: give --lose {rounded_up:g}{remedy}"
    )
