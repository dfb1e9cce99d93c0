"""Losses on pairs and log-probabilities of answers: by hand, against TRL's stored numbers, and what
must not matter.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mis_mlx import dpo
from mis_mlx.dpo import Pair, Settings
from mis_mlx.maths.losses import token_logps
from mis_mlx.maths.rl_losses import PairLoss, dead_zone, pair_losses
from tests import trl_model

# float32 on a CPU, two frameworks: measured 1e-6 and 5e-6
LOSS = 1e-5
GRADIENT = 5e-5
CASES = {
    "sigmoid": Settings(loss_type="sigmoid", beta=0.3, dpop_lambda=0.0),
    "dpop": Settings(loss_type="dpop", beta=0.3, dpop_lambda=50.0),
    "dpop_mild": Settings(loss_type="dpop", beta=0.1, dpop_lambda=5.0),
    "dpop_zero": Settings(loss_type="dpop", beta=0.3, dpop_lambda=0.0),
}


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    """TRL's numbers."""
    return trl_model.stored()


@pytest.fixture(scope="module")
def policy(found: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """TRL's policy in MLX."""
    return trl_model.model(found, "policy", tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def pairs(found: dict[str, np.ndarray]) -> list[Pair]:
    """The rows that TRL was given, padding cut off: (ids, marks) of the chosen and of the rejected
    answer.
    """
    rows = []
    for ids, mask in zip(found["dpo/ids"], found["dpo/mask"], strict=True):
        length = int(np.flatnonzero(mask)[-1]) + 1
        rows.append((ids[:length].astype(np.int32), mask[:length].astype(np.float32)))
    half = len(rows) // 2
    return list(zip(rows[:half], rows[half:], strict=True))


def batch(pairs: list[Pair], reference: np.ndarray) -> tuple[mx.array, ...]:
    """A micro-batch, as training makes it. reference: (2 B,)."""
    return (*dpo.padded_pairs(pairs), mx.array(reference))


def gradients(
    policy: nn.Module, objective: Settings, *arguments: mx.array
) -> tuple[float, float, Any]:
    """(sum, count, gradients of the sum)."""
    work = nn.value_and_grad(policy, partial(objective.loss))
    (total, count, _), made = work(policy, *arguments)
    return float(total), float(count), made


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_trls(
    case: str, found: dict[str, np.ndarray], policy: nn.Module, pairs: list[Pair]
) -> None:
    """DPO as TRL's DPOTrainer computes it; DPO-P as its formula does in torch. Its
    penalty, here of 50, multiplies the 2e-5 nats that count as rounding, which TRL counts as
    rewards.
    """
    theirs = float(found[f"{case}/loss"])
    tolerance = 2 * LOSS if case == "dpop" else LOSS
    arguments = batch(pairs, found["dpo/reference"])

    total, count, made = gradients(policy, CASES[case], *arguments)

    assert total / count == pytest.approx(theirs, rel=tolerance)
    assert trl_model.worst(made, found, case, count) < GRADIENT


def test_the_reference_is_torchs(
    found: dict[str, np.ndarray], pairs: list[Pair], tmp_path: Path
) -> None:
    """Pair by pair and three at a time, as in training and as held out, which must not matter."""
    model = trl_model.model(found, "reference", tmp_path / "reference")
    half = len(pairs)
    for batch_size in (1, 3):
        values = dpo.reference(model, pairs, batch_size, trained=batch_size == 3)
        np.testing.assert_allclose(values[:, 0], found["dpo/reference"][:half], rtol=1e-5)
        np.testing.assert_allclose(values[:, 1], found["dpo/reference"][half:], rtol=1e-5)


def test_by_hand() -> None:
    """r_w = 1, r_l = -2, beta 0.5: margin 3; and with r_w = -1 the penalty of dpop stands inside
    beta and sigma.
    """
    one = mx.array([1.0])
    two = mx.array([-2.0])
    loss = partial(pair_losses, beta=0.5)

    def log_sigma(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    sigmoid = loss(one, two, kind="sigmoid").item()
    dpop = loss(one, two, kind="dpop", dpop_lambda=50.0).item()
    with_penalty = loss(-one, two, kind="dpop", dpop_lambda=3.0).item()
    assert sigmoid == pytest.approx(-log_sigma(1.5))
    assert dpop == pytest.approx(-log_sigma(1.5))
    assert with_penalty == pytest.approx(-log_sigma(0.5 * (1 - 3)))


def test_at_the_reference_the_loss_is_ln_2() -> None:
    """Policy = reference: nothing is preferred yet; the gradient of dpop there is DPO's, its
    penalty's is 0.
    """
    zero = mx.zeros((3,))
    beta = 0.7
    for kind in ("sigmoid", "dpop"):
        losses = pair_losses(zero, zero, beta, kind)
        assert np.allclose(np.array(losses), math.log(2), atol=1e-7)
        chosen = mx.grad(lambda r, kind=kind: pair_losses(r, zero, beta, kind).sum())(zero)
        assert np.allclose(np.array(chosen), -beta / 2)


def test_rounding_is_no_reward() -> None:
    """Within the zone exactly 0, beyond it less by its width, as steep as without it."""
    apart = mx.array([-0.5, -0.1, 0.0, 0.05, 0.3])
    np.testing.assert_allclose(np.array(dead_zone(apart, 0.1)), [-0.4, 0, 0, 0, 0.2], atol=1e-7)
    assert dead_zone(apart, 0.1)[1:4].tolist() == [0.0] * 3

    def twice(x: mx.array) -> mx.array:
        zone = dead_zone(x, mx.array([0.1] * 5))
        return (2 * zone).sum()

    host_gradients = mx.grad(twice)(apart)
    assert host_gradients.tolist() == [2.0] * 5


@pytest.mark.parametrize("kind", ["dpop", "sigmoid"])
def test_micro_batches_are_one_batch(
    kind: PairLoss, found: dict[str, np.ndarray], policy: nn.Module, pairs: list[Pair]
) -> None:
    """Sums over one pair and over three, added: what all four give, to rounding; padding changes
    nothing.
    """
    objective = Settings(loss_type=kind, beta=0.3, dpop_lambda=50.0)
    by_side = found["dpo/reference"].reshape(2, -1)

    def of(at: slice) -> tuple[float, float, Any]:
        arguments = batch(pairs[at], by_side[:, at].reshape(-1))
        return gradients(policy, objective, *arguments)

    total, count, whole = of(slice(0, 4))
    first_total, first_count, first = of(slice(0, 1))
    rest_total, rest_count, rest = of(slice(1, 4))

    assert first_total + rest_total == pytest.approx(total, rel=1e-6)
    assert first_count + rest_count == count == 4
    assert close(whole, tree_map(mx.add, first, rest))


@pytest.mark.parametrize(("rows", "temperature"), [(None, 1.0), (1, 0.7), (5, 0.7), (64, 1.0)])
def test_log_probabilities_in_chunks_are_those_of_the_whole(
    rows: int | None, temperature: float
) -> None:
    """Values and gradients of hidden states and head, each position with its own cotangent, against
    log_softmax.
    """
    hidden = mx.random.normal((23, 16), key=mx.random.key(4))
    head = mx.random.normal((50, 16), key=mx.random.key(5))
    targets = mx.arange(23) * 2
    weights = mx.random.normal((23,), key=mx.random.key(6))

    def plain(h: mx.array, w: mx.array) -> mx.array:
        z = (h @ w.T) / temperature
        of_targets = mx.take_along_axis(z, targets[:, None], -1)[:, 0]
        log_p = of_targets - mx.logsumexp(z, -1)
        return (log_p * weights).sum()

    def chunked(h: mx.array, w: mx.array, frozen_head: bool = False) -> mx.array:
        log_p = token_logps(
            h,
            w,
            targets=targets,
            temperature=temperature,
            frozen_head=frozen_head,
            rows=rows,
        )
        return (log_p * weights).sum()

    wanted, wanted_gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    found, found_gradients = mx.value_and_grad(chunked, argnums=(0, 1))(hidden, head)
    frozen = mx.grad(lambda h: chunked(h, head, frozen_head=True))(hidden)

    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(wanted_gradients, found_gradients, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert mx.allclose(frozen, wanted_gradients[0], rtol=1e-4, atol=1e-5)


def close(one: Any, other: Any) -> bool:
    """Gradients alike to rounding, tensor by tensor."""
    pairs = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return all(
        float(mx.abs(a - b).max()) <= 1e-5 * float(mx.abs(a).max()) for (_, a), (_, b) in pairs
    )
