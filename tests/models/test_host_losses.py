"""The vocabulary by numpy: the same numbers as maths/losses, and nearer to float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.hardware import lanes
from mis_mlx.maths import losses
from mis_mlx.models import host_losses
from tests.maths.test_losses import Problem, gradients, ours, problem


def exact(p: Problem, temperature: float) -> float:
    """The loss in numpy float64."""
    a = {k: np.array(v, dtype=np.float64) for k, v in p.items()}
    z_t, z_s = a["teacher"] @ a["teacher_head"].T / temperature, a["student"] @ a["head"].T / temperature
    log_t, log_s = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (z_t, z_s))
    return float(((np.exp(log_t) * (log_t - log_s)).sum(-1) * a["learn"]).sum())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("n", "vocab"), [(13, 40), (300, 20), (1, 7)])
def test_kl_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, n: int, vocab: int, temperature: float, count: int
) -> None:
    """Beside `losses.kl_sum` and float64; more positions than a chunk, more and fewer than a piece, two threads."""
    monkeypatch.setattr(lanes, "count", lambda: count)
    p = problem(n, vocab)
    where = p["student"], p["head"], p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"]
    total, dh, dw = host_losses.kl_gradients(*where, temperature)
    want, (want_dh, want_dw) = gradients(ours(p, temperature=temperature), p)
    assert total == pytest.approx(exact(p, temperature), rel=1e-5) and total == pytest.approx(want.item(), rel=1e-4)
    assert dw is not None
    assert mx.allclose(dh, want_dh, atol=1e-5) and mx.allclose(dw, want_dw, atol=1e-4)
    frozen = host_losses.kl_gradients(*where, temperature, frozen_head=True)
    assert frozen[2] is None and frozen[0] == total and mx.array_equal(frozen[1], dh)


def test_what_a_comparison_says() -> None:
    """Each column beside `losses.compared`."""
    z_t, z = (3 * mx.random.normal((21, 50), key=mx.random.key(k)) for k in (1, 2))
    z = 0.5 * z + z_t
    targets = mx.random.randint(0, 50, (21,), key=mx.random.key(3))
    want = np.array(losses.compared(z_t, z, targets))
    found = host_losses.compared(z_t * 1, z * 1, targets)
    assert 0 < want[:, 3].sum() < 21
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_what_is_no_number_stays_so_without_a_warning() -> None:
    """The training loop judges the loss; numpy has nothing to say to it."""
    p = problem()
    p["teacher"][2] = mx.inf
    total, _, _ = host_losses.kl_gradients(
        p["student"], p["head"], p["teacher"], lambda h: h @ p["teacher_head"].T, mx.ones((13,))
    )
    assert not np.isfinite(total)
