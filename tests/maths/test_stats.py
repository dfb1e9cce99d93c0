"""Means and bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mis_mlx.maths.stats import LEAST_FOR_INTERVAL, bounds, interval, recovery
from mis_mlx.reporting import text
from mis_mlx.reporting.text import plus_minus
from mis_mlx.types import Row


def test_interval_against_the_normal_one() -> None:
    """400 normal values: the mean exactly, and an interval near ± 1.96 sigma / sqrt(n)."""
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    mean, low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.15)

    assert interval(values) == interval(values.copy())


@pytest.mark.parametrize("count", [1, 4, 9])
def test_of_few_values_there_is_no_interval(count: int) -> None:
    """Nothing is known, and a comparison with anything is within the noise."""
    values = np.linspace(2.0, 3.0, count)
    mean, low, high = interval(values)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (-math.inf, math.inf)
    assert bounds((mean, low, high)) == [mean, None, None]
    assert recovery(values, 2 * values, 0 * values) == (pytest.approx(0.5), -math.inf, math.inf)
    assert plus_minus(low, high, ".1f") == " (too few)"
    row = Row("student", "bpb", mean, low, high=high, n=count)
    assert "(too few)" in text.table([row], ["student"], {"bpb": ("bits", ".3f")})


@pytest.mark.parametrize("count", [LEAST_FOR_INTERVAL, 40])
def test_an_interval_holds_the_mean_as_often_as_it_says(count: int) -> None:
    """Of normal values: nearly 95 % of the time, from the fewest values on."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        _, low, high = interval(rng.normal(size=count))
        held += low <= 0 <= high
    assert held > 0.87 * 400
