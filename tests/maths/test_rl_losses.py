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
