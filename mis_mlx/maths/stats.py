"""Means and their 95 % intervals. Knows numbers only."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over the first axis, 95 %, always the same for the same values."""
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
