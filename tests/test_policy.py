"""The policy losses: values a reader can check by hand, and TRL's own numbers on a stored
fixture.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mis_mlx.alignment.grpo_rollout import Settings
from mis_mlx.maths import rl_losses
from mis_mlx.models.opening import load
from mis_mlx.models.passing import attention_masks
from mis_mlx.types import Checkpoint
from tests import trl_model

FIXTURE = Path(__file__).parent / "fixtures" / "trl_grpo.npz"
CASES = (
    "grpo",
    "grpo_kl",
    "dapo",
    "dapo_clip_higher",
    "dr_grpo",
    "dapo_temperature",
    "grpo_accumulated",
    "dapo_accumulated",
)


def stored() -> dict[str, np.ndarray]:
    """Everything in the fixture, by name."""
    with np.load(FIXTURE) as found:
        return dict(found)


def rewards(*groups: list[float]) -> np.ndarray:
    """(N, G)."""
    return np.array(groups, np.float64)


def total(
    objective: Settings, model: nn.Module, parts: list[tuple[Any, ...]]
) -> tuple[float, dict[str, np.ndarray], float]:
    """(loss, gradients, share of clipped tokens) of a step of these micro-batches."""
    sums = 0.0
    counts = 0.0
    clipped = 0.0
    gradients = None
    for part in parts:
        (value, count, more), found = nn.value_and_grad(model, objective.loss)(model, *part)
        gradients = found if gradients is None else tree_map(mx.add, gradients, found)
        sums = sums + float(value)
        counts = counts + float(count)
        clipped = clipped + float(more["clipped"])
    arrays: list[tuple[str, Any]] = tree_flatten(gradients)
    return sums / counts, {name: np.array(a) / counts for name, a in arrays}, clipped / counts


@pytest.mark.parametrize("case", CASES)
def test_trl_agrees(case: str, tmp_path: Path) -> None:
    """Loss to 1e-5, gradients to 5e-5, with an old policy that is another model, through all that
    training uses.
    """
    found = stored()
    about = json.loads(str(found["about"]))
    given = about["cases"][case]
    prompt = about["prompt"]
    objective = Settings(
        loss_type=given["loss_type"],
        epsilon_high=given.get("epsilon_high", 0.2),
        beta=given.get("beta", 0.0),
        max_completion_length=about["max_tokens"],
        temp=given.get("temperature", 1.0),
    )
    advantage = rl_losses.advantages(
        found["rewards"].astype(np.float64), scaled=given["loss_type"] != "dr_grpo"
    )
    assert np.abs(advantage - found[f"{case}/advantages"]).max() < 1e-5
    model = trl_model.model(found, "policy", tmp_path)
    parts = []
    for row, (tokens, mask) in enumerate(zip(found["tokens"].tolist(), found["mask"], strict=True)):
        length = int(mask.sum())
        b = attention_masks.join(tokens[:prompt], [tokens[prompt : prompt + length]])
        ref = mx.array(found[f"{case}/ref"][row : row + 1, :length]) if objective.beta else None
        old = mx.array(found[f"{case}/old"][row : row + 1, :length])
        parts.append((b, mx.array(advantage.reshape(-1)[row : row + 1]), old, ref))
    loss, gradients, clipped = total(objective, model, parts)
    assert loss == pytest.approx(float(found[f"{case}/loss"]), rel=1e-5)
    named = {
        name.removeprefix(f"{case}/grad/"): a
        for name, a in found.items()
        if name.startswith(f"{case}/grad/")
    }
    assert named.keys() == gradients.keys()
    assert max(np.abs(gradients[n] - a).max() / np.abs(a).max() for n, a in named.items()) < 5e-5
    assert clipped > 0.0


def test_advantages_by_pencil() -> None:
    """Two right of four: mean 1/2, deviation sqrt(1/3) with Bessel's correction; unscaled they are
    +1/2 and -1/2.
    """
    made = rl_losses.advantages(rewards([1, 0, 0, 1]), scaled=True)
    assert made == pytest.approx(np.array([[1, -1, -1, 1]]) * 0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert rl_losses.advantages(rewards([1, 0, 0, 1]), scaled=False).tolist() == [
        [0.5, -0.5, -0.5, 0.5]
    ]
    shifted = rl_losses.advantages(rewards([8, 7, 7, 8]), scaled=True)
    assert shifted == pytest.approx(made)


def test_equal_rewards_teach_nothing_and_are_numbers() -> None:
    """All right, all wrong, equal but for rounding in their mean, one scored: exactly 0; unscored
    ones are left out.
    """
    nan = math.nan
    table = rewards(
        [1, 1, 1], [0, 0, 0], [0.1, 0.1, 0.1], [1, nan, nan], [nan, nan, nan], [1, 0, nan]
    )
    assert rl_losses.teaches(table).tolist() == [False] * 5 + [True]
    made = rl_losses.advantages(table, scaled=False)
    assert not made[:5].any()
    assert made[5].tolist() == [0.5, -0.5, 0.0]
    assert np.isfinite(rl_losses.advantages(table, scaled=True)).all()


def test_a_token_by_pencil() -> None:
    """rho 1.5 and 0.5 against bounds 0.8 and 1.28: better answers are held above, worse ones
    below.
    """
    new = mx.log(mx.array([[1.5, 0.5]]))
    old = mx.zeros((1, 2))

    for advantage, wanted, clipped in (
        (1.0, [-1.28, -0.5], [1.0, 0.0]),
        (-1.0, [1.5, 0.8], [0.0, 1.0]),
    ):
        losses, held = rl_losses.token_losses(
            new, old, advantage=mx.array([advantage]), epsilon=0.2, epsilon_high=0.28
        )
        assert np.array(losses)[0] == pytest.approx(wanted)
        assert held.tolist() == [clipped]


def test_kl_is_k3_and_never_negative() -> None:
    """e^d - d - 1 by hand at d = ln 2; 0 where the model is the reference; unasked, nobody looks at
    the reference.
    """
    same = mx.zeros((1, 1))
    zero = mx.zeros((1,))
    ref = mx.full((1, 1), math.log(2))
    k3 = 0.5 * (2 - math.log(2) - 1)
    assert rl_losses.token_losses(
        same, same, advantage=zero, epsilon=0.2, epsilon_high=0.2, reference=ref, beta=0.5
    )[0].item() == pytest.approx(k3)
    assert (
        rl_losses.token_losses(
            same, same, advantage=zero, epsilon=0.2, epsilon_high=0.2, reference=same, beta=0.5
        )[0].item()
        == 0.0
    )
    broken = mx.full((1, 1), math.nan)
    assert (
        rl_losses.token_losses(
            same, same, advantage=zero, epsilon=0.2, epsilon_high=0.2, reference=broken, beta=0.0
        )[0].item()
        == 0.0
    )


@pytest.mark.parametrize(
    ("kind", "expected"), [("grpo", (4 / 2 + 9 / 3) / 2), ("dapo", 13 / 5), ("dr_grpo", 13 / 20)]
)
def test_the_three_divisors_by_pencil(kind: rl_losses.LossType, expected: float) -> None:
    """Answers of 2 and 3 tokens, losses 2 and 3 each, at most 10 tokens; what is masked may be
    infinite.
    """
    losses = mx.array([[2.0, 2.0, math.inf], [3.0, 3.0, 3.0]])
    total, count = rl_losses.loss_sum(
        losses, mx.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), kind, 10
    )
    assert float(total) / float(count) == pytest.approx(expected)


PROMPT = [5, 6, 7, 8]
ANSWERS = [[11, 12, 13, 0], [21, 22], [31, 32, 33, 34, 35], [41]]


@pytest.fixture(name="model")
def _model(llama: Checkpoint) -> nn.Module:
    made = load.resident_model(llama, mx.float32)
    mx.eval(made.parameters())
    return made


def test_on_policy_the_gradient_is_reinforce(model: nn.Module) -> None:
    """Where the old policy is the model itself, as with one update a step: minus advantage times
    grad log pi.
    """
    b = attention_masks.join(PROMPT, ANSWERS)
    advantage = mx.array([1.0, -0.5, 0.7, -1.2])
    objective = Settings(max_completion_length=8)
    _, found = nn.value_and_grad(model, objective.loss)(model, b, advantage)

    def plain(m: nn.Module) -> mx.array:
        return -(objective.logps(m, b, False) * b.mask * advantage[:, None]).sum()

    _, expected = nn.value_and_grad(model, plain)(model)
    for (name, a), (_, e) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.allclose(a, e, rtol=1e-5, atol=1e-7), name
