"""Means and bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from mis_mlx.maths.stats import interval


def test_interval_against_the_normal_one() -> None:
    """400 normal values: the mean exactly, and an interval near ± 1.96 sigma / sqrt(n)."""
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    mean, low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.15)

    assert interval(values) == interval(values.copy())
    assert interval(np.array([4.0])) == (4.0, 4.0, 4.0)
