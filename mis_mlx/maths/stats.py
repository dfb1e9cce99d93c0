"""Means and their 95 % intervals, what many timings say. Knows numbers only."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEAST_FOR_P95 = 20


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over the first axis, 95 %, always the same for the
    same values.
    """
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def summary(values: Sequence[float]) -> dict[str, float]:
    """{mean, sd, median, n}, and p95 where there are 20 values or more: fewer do not have one. sd:
    of a sample.
    """
    v = np.asarray(values, dtype=np.float64)
    figures = {"mean": v.mean(), "sd": v.std(ddof=1) if len(v) > 1 else 0.0, "median": np.median(v)}
    if len(v) >= LEAST_FOR_P95:
        figures["p95"] = np.percentile(v, 95)
    return {name: float(value) for name, value in figures.items()} | {"n": len(v)}


def recovery(
    student: np.ndarray, teacher: np.ndarray, chance: np.ndarray
) -> tuple[float, float, float]:
    """(value, low, high) of (student - chance) / (teacher - chance): the share of what the teacher
    knows that is left.

    student, teacher, chance: (n,) marks of the same questions. The bootstrap is paired: every draw
    takes the same questions for all three. Draws in which the teacher is no better than chance say
    nothing and are left out, so this is for teachers that are clearly better (`interval` of the
    difference). 1 exactly for the teacher itself.
    """
    above = np.asarray(student, np.float64) - chance
    most = np.asarray(teacher, np.float64) - chance
    draws = np.random.default_rng(0).integers(0, len(most), size=(RESAMPLES, len(most)))
    drawn = above[draws].mean(axis=1)
    whole = most[draws].mean(axis=1)
    low, high = np.percentile(drawn[whole > 0] / whole[whole > 0], [2.5, 97.5])
    return float(above.mean() / most.mean()), float(low), float(high)
