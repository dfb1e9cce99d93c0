"""Sums of a step's losses against numpy: what was not sampled has no part in them."""

from __future__ import annotations

from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import rl_losses


@pytest.mark.parametrize("kind", get_args(rl_losses.LossType))
def test_what_was_not_sampled_has_no_part(kind: rl_losses.LossType) -> None:
    """Whatever stands there, also infinity."""
    known = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    losses = np.where(mask > 0, known, np.inf).astype(np.float32)
    total, count = rl_losses.loss_sum(mx.array(losses), mx.array(mask), kind, max_tokens=5)
    wanted = {"grpo": (1.5 + 8, 2), "dr_grpo": (11, 10), "dapo": (11, 3)}
    assert (total.item(), count.item()) == wanted[kind]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "stops"),
    [
        (1.2, 1.0, -1.2, 0),  # above the lower bound's width, within the upper one's
        (1.5, 1.0, -1.3, 1),
        (0.8, 1.0, -0.8, 0),
        (0.8, -1.0, 0.9, 1),
        (1.5, -1.0, 1.5, 0),
    ],
)
def test_clipping_has_two_widths(ratio: float, advantage: float, loss: float, stops: int) -> None:
    """0.1 below and 0.3 above, by pencil."""
    found, clipped = rl_losses.token_losses(
        mx.log(mx.array([[ratio]])),
        mx.zeros((1, 1)),
        mx.array([advantage]),
        epsilon=0.1,
        epsilon_high=0.3,
    )
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert clipped.item() == stops
