"""Sums of a step's losses: what was not sampled has no part in them."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mis_mlx.maths import rl_losses


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_what_was_not_sampled_has_no_part(beta: float) -> None:
    """A low temperature makes padding so unlikely that exp(reference - new) is infinite there; the
    reference has none where it is not asked.
    """
    new = mx.array([[-1.0, -2.0, -300.0], [-0.5, -math.inf, 5.0]])
    mask = mx.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    reference = mx.array([[-1.5, -2.0, 0.0], [-0.5, 0.0, math.nan]])
    reference = reference if beta else mx.full((2, 3), math.nan)
    advantage = mx.array([1.0, -2.0])

    def total(values: mx.array) -> mx.array:
        return rl_losses.token_loss_sum(values, advantage, mask, reference=reference, beta=beta)

    value, gradient = mx.value_and_grad(total)(new)
    k3 = math.exp(-0.5) + 0.5 - 1.0
    assert value.item() == pytest.approx(-1.0 - 1.0 + 2.0 + beta * k3, abs=1e-6)
    pull = beta * (1 - math.exp(-0.5))
    wanted = [[-1.0 + pull, -1.0, 0.0], [2.0, 0.0, 0.0]]
    for row, other in zip(gradient.tolist(), wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
