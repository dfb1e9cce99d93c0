"""The vocabulary by numpy: the same numbers as maths/losses, and nearer to float64."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.hardware import lanes
from mis_mlx.models import host_losses, policy
from tests.maths.test_losses import Problem, gradients, ours, problem


def exact(p: Problem, temperature: float) -> float:
    """The loss in numpy float64."""
    a = {k: np.array(v, dtype=np.float64) for k, v in p.items()}
    z_t = a["teacher"] @ a["teacher_head"].T / temperature
    z_s = a["student"] @ a["head"].T / temperature
    log_t, log_s = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (z_t, z_s))
    return float(((np.exp(log_t) * (log_t - log_s)).sum(-1) * a["learn"]).sum())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("n", "vocab"), [(13, 40), (300, 20), (1, 7)])
def test_kl_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, n: int, vocab: int, temperature: float, count: int
) -> None:
    """Beside `losses.kl_sum` and float64; more positions than a chunk, more and fewer than a piece,
    two threads.
    """
    monkeypatch.setattr(lanes, "count", lambda: count)
    p = problem(n, vocab)
    where = p["student"], p["head"], p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"]
    total, dh, dw = host_losses.kl_gradients(*where, temperature)
    want, (want_dh, want_dw) = gradients(ours(p, temperature=temperature), p)
    assert total == pytest.approx(exact(p, temperature), rel=1e-5) and total == pytest.approx(
        want.item(), rel=1e-4
    )
    assert dw is not None
    assert mx.allclose(dh, want_dh, atol=1e-5) and mx.allclose(dw, want_dw, atol=1e-4)
    frozen = host_losses.kl_gradients(*where, temperature, frozen_head=True)
    assert frozen[2] is None and frozen[0] == total and mx.array_equal(frozen[1], dh)


@pytest.mark.parametrize("word", ["cpu", "metal"])
@pytest.mark.parametrize("cuts", [[0, 50], [0, 17, 34, 50], [*range(51)]])
def test_what_a_comparison_says(
    cuts: list[int], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column beside its formula in float64, the vocabulary whole, in parts, and token by
    token; by numpy on a CPU, by MLX, which nobody waits for, on a GPU.
    """
    monkeypatch.setenv(policy.POLICY, word)
    z_t, z = (3 * mx.random.normal((21, 50), key=mx.random.key(k)) for k in (1, 2))
    z = 0.5 * z + z_t
    targets = np.random.default_rng(3).integers(0, 50, 21)
    log_t, log = (
        each - np.logaddexp.reduce(each, 1)[:, None]
        for each in (np.array(z_t, np.float64), np.array(z))
    )
    at = np.arange(21), targets
    same = log_t.argmax(1) == log.argmax(1)
    want = np.stack([-log_t[at], -log[at], (np.exp(log_t) * (log_t - log)).sum(1), same], 1)
    parts = [host_losses.compared(z_t[:, a:b], z[:, a:b], targets, a) for a, b in pairwise(cuts)]
    assert 0 < same.sum() < 21 and {type(part) for part in parts} == {
        np.ndarray if word == "cpu" else mx.array
    }
    np.testing.assert_allclose(host_losses.over_parts(parts), want, atol=1e-5)


def test_a_comparison_by_pencil() -> None:
    """Two tokens, teacher 3 : 1, student 1 : 1: losses ln 4/3 and ln 2, KL = 0.75 ln 1.5 + 0.25 ln
    0.5; of two tokens that are alike the first is the top one.
    """
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)

    def found(student: list[float]) -> np.ndarray:
        teacher = mx.array([[np.log(3.0), 0.0]])
        right = np.array([0])
        return host_losses.over_parts([host_losses.compared(teacher, mx.array([student]), right)])

    np.testing.assert_allclose(found([0.0, 0.0]), [[np.log(4 / 3), np.log(2), kl, 1.0]], atol=1e-6)
    assert found([0.0, 1.0])[0, 3] == 0.0


def test_what_is_no_number_stays_so_without_a_warning() -> None:
    """The training loop judges the loss; numpy has nothing to say to it."""
    p = problem()
    p["teacher"][2] = mx.inf
    total, _, _ = host_losses.kl_gradients(
        p["student"],
        p["head"],
        teacher=p["teacher"],
        teacher_logits=lambda h: h @ p["teacher_head"].T,
        learn=mx.ones((13,)),
    )
    assert not np.isfinite(total)
