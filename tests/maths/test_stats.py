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


def test_the_same_values_give_the_same_interval() -> None:
    """Deterministic; another seed gives another interval."""
    values = np.random.default_rng(4).random(30)
    assert interval(values) == interval(values.copy())
    assert interval(values) != interval(values, seed=1)


def test_equal_values_have_no_width() -> None:
    """Seven times 1.5, and a single value."""
    assert interval(np.full(7, 1.5)) == (1.5, 1.5, 1.5)
    assert interval(np.array([4.0])) == (4.0, 4.0, 4.0)
