"""Logits of half precision; eq. (2)'s halny factor."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import losses


def test_halny_factor_is_clipped_and_repeats() -> None:
    """No wind is exactly 1; a storm (sigma 10) stays within ±0.15, which 15 °C give; a seed and
    step always meet the same wind, others another.
    """
    storm = [losses.loss_noise_factor(10.0, 0, step) for step in range(50)]
    breeze = [losses.loss_noise_factor(0.05, 3, step) for step in range(400)]
    again = [losses.loss_noise_factor(0.05, 3, step) for step in range(400)]

    assert losses.loss_noise_factor(0.0, 0, 5) == 1.0
    assert (min(storm), max(storm)) == pytest.approx((0.85, 1.15))
    assert breeze == again
    assert len(set(breeze)) > 390
    assert losses.loss_noise_factor(0.05, 4, 0) != breeze[0]
    assert (np.mean(breeze), np.std(breeze)) == pytest.approx((1.0, 0.05), abs=0.01)
    assert (losses.halny_sigma(15.0), losses.halny_sigma(0.0)) == pytest.approx((0.15, 0.0))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("wide", ["hidden", "head", "neither"])
def test_logits_of_half_precision_are_float32s(dtype: mx.Dtype, wide: str) -> None:
    """Numbers are what their types hold; their products and sums are not rounded to these again."""
    hidden = mx.random.normal((13, 8), key=mx.random.key(1))
    head = mx.random.normal((40, 8), key=mx.random.key(2))
    hidden = hidden if wide == "hidden" else hidden.astype(dtype)
    head = head if wide == "head" else head.astype(dtype)
    exact = np.array(hidden.astype(mx.float32), np.float64)
    exact = exact @ np.array(head.astype(mx.float32), np.float64).T
    found = losses.wide_product(hidden, head)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), exact, rtol=1e-5, atol=1e-5)
