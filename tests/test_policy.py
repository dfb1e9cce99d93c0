"""The policy losses: values a reader can check by hand."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.alignment.grpo_rollout import Settings, filled_up
from mis_mlx.maths import rl_losses
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint


def rewards(*groups: list[float]) -> np.ndarray:
    """(N, G)."""
    return np.array(groups, np.float64)


def test_advantages_by_pencil() -> None:
    """Two right of four: mean 1/2, deviation sqrt(1/3) with Bessel's correction."""
    made = rl_losses.advantages(rewards([1, 0, 0, 1]))
    assert made == pytest.approx(np.array([[1, -1, -1, 1]]) * 0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert rl_losses.advantages(rewards([8, 7, 7, 8])) == pytest.approx(made)


def test_equal_rewards_teach_nothing_and_are_numbers() -> None:
    """All right, all wrong, equal but for rounding in their mean, one scored: exactly 0; unscored
    ones are left out.
    """
    nan = math.nan
    table = rewards(
        [1, 1, 1], [0, 0, 0], [0.1, 0.1, 0.1], [1, nan, nan], [nan, nan, nan], [1, 0, nan]
    )
    assert rl_losses.teaches(table).tolist() == [False] * 5 + [True]
    made = rl_losses.advantages(table)
    assert not made[:5].any()
    half = 0.5 / (math.sqrt(1 / 2) + 1e-4)
    assert made[5] == pytest.approx([half, -half, 0.0])


def test_kl_is_k3_and_never_negative() -> None:
    """e^d - d - 1 by hand at d = ln 2; 0 where the model is the reference; unasked, nobody looks at
    the reference.
    """
    same = mx.zeros((1, 1))

    def loss(reference: float, beta: float = 0.5) -> float:
        of_reference = mx.full((1, 1), reference)
        total = rl_losses.token_loss_sum(
            same, mx.zeros((1,)), mx.ones((1, 1)), reference=of_reference, beta=beta
        )
        return total.item()

    assert loss(math.log(2)) == pytest.approx(0.5 * (2 - math.log(2) - 1))
    assert loss(0.0) == 0.0
    assert loss(math.nan, beta=0.0) == 0.0


PROMPT = [5, 6, 7, 8]
ANSWERS = [[11, 12, 13, 0], [21, 22], [31, 32, 33, 34, 35], [41]]


@pytest.fixture(name="model")
def _model(llama: Checkpoint) -> nn.Module:
    made = load.resident_model(llama, mx.float32)
    mx.eval(made.parameters())
    return made


def test_on_policy_the_gradient_is_reinforce(model: nn.Module) -> None:
    """The model that sampled is the model itself: minus advantage times grad log pi."""
    tokens, mask = filled_up(PROMPT, ANSWERS)
    advantage = mx.array([1.0, -0.5, 0.7, -1.2])
    objective = Settings(max_completion_length=8)
    _, found = nn.value_and_grad(model, objective.loss)(model, tokens, mask, advantage)

    def plain(m: nn.Module) -> mx.array:
        logps = objective.logps(
            m.model(tokens), load.head_weight(m), tokens, mask.shape[1], frozen_head=False
        )
        return -(logps * mask * advantage[:, None]).sum()

    _, expected = nn.value_and_grad(model, plain)(model)
    for (name, a), (_, e) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.allclose(a, e, rtol=1e-5, atol=1e-7), name
