"""The KL to sparse targets by slabs of the vocabulary, beside float64 and pencil."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import slab_losses
from mis_mlx.compute.slab_losses import sparse_kl_gradients


def in_slabs(head: mx.array, sizes: list[int] | None = None) -> slab_losses.Slabs:
    """A whole head as it comes; its slabs' sizes are noted."""

    def slabs(rows: int) -> Iterator[tuple[int, mx.array]]:
        for start in range(0, len(head), rows):
            part = head[start : start + rows]
            if sizes is not None:
                sizes.append(len(part))
            yield start, part

    return slabs


def exact(
    hidden: mx.array,
    head: mx.array,
    loss_mask: mx.array,
    w: np.ndarray,
    *,
    softcap: float,
    temperature: float,
) -> tuple[float, np.ndarray]:
    """KL of dense targets w (n, V) and its gradient in hidden, in numpy float64."""
    h = np.array(hidden, np.float64)
    matrix = np.array(head, np.float64)
    raw = h @ matrix.T
    z = softcap * np.tanh(raw / softcap) if softcap else raw
    soft = z / temperature
    log_q = soft - np.logaddexp.reduce(soft, axis=1, keepdims=True)
    mask = np.array(loss_mask, np.float64)[:, None]
    log_w = np.log(np.maximum(w, 1e-300))
    value = float((mask * np.where(w > 0, w * (log_w - log_q), 0.0)).sum())
    slope = mask * (np.exp(log_q) - w) / temperature
    if softcap:
        slope = slope * (1.0 - np.square(z / softcap))
    return value, slope @ matrix


@pytest.mark.parametrize(
    ("softcap", "temperature"), [(0.0, 1.0), (3.0, 1.0), (0.0, 2.5), (3.0, 2.0)]
)
@pytest.mark.usefixtures("policy")
def test_the_loss_is_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, softcap: float, temperature: float
) -> None:
    """700 tokens in slabs of 256, with positions that do not count and fillers that repeat."""
    monkeypatch.setattr(slab_losses, "LOGIT_BYTES", 1)
    keys = mx.random.split(mx.random.key(0), 4)
    hidden = mx.random.normal((11, 24), key=keys[0])
    head = mx.random.normal((700, 24), key=keys[1])
    teacher = mx.random.normal((11, 700), key=keys[2])
    mask = (mx.random.uniform(shape=(11,), key=keys[3]) < 0.7).astype(mx.float32)
    ids = mx.argsort(-teacher, axis=1)[:, :40]
    weights = mx.softmax(mx.take_along_axis(teacher, ids, axis=1), axis=1)
    dense = np.zeros((11, 700))
    np.put_along_axis(dense, np.array(ids), np.array(weights, np.float64), axis=1)
    ids = mx.concatenate([ids, mx.zeros((11, 3), ids.dtype)], axis=1)
    weights = mx.concatenate([weights, mx.zeros((11, 3))], axis=1)
    how = {"softcap": softcap, "temperature": temperature}
    want, slope = exact(hidden, head, mask, dense, **how)
    sizes = list[int]()
    value, gradient = sparse_kl_gradients(hidden, in_slabs(head, sizes), mask, ids, weights, **how)
    assert sizes == 2 * [256, 256, 188]
    assert value.item() == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), slope, atol=1e-5)


def test_the_loss_by_pencil() -> None:
    """Student 1/2, 1/4, 1/4. Target 1/2, 1/2, -: KL = ln 2 / 2. A position of weight 0 has none."""
    head = mx.log(mx.array([[2.0], [1.0], [1.0]]))
    ids = mx.array([[0, 1, 0]] * 2)
    weights = mx.array([[0.5, 0.5, 0.0]] * 2)
    value, gradient = sparse_kl_gradients(
        mx.ones((2, 1)), in_slabs(head), mx.array([1.0, 0.0]), ids, weights
    )
    assert value.item() == pytest.approx(np.log(2) / 2, abs=1e-6)
    assert gradient[1].item() == 0.0


@pytest.mark.parametrize("change", [lambda h: h * 1000, lambda h: h * float("nan")])
def test_a_certain_student_has_a_finite_loss_and_one_of_no_numbers_has_none(
    change: Callable[[mx.array], mx.array],
) -> None:
    """Logits 1,000 apart, so that shares underflow to 0: no NaN; where there is one, it is seen."""
    hidden = change(mx.random.normal((4, 8), key=mx.random.key(0)))
    head = mx.random.normal((30, 8), key=mx.random.key(1))
    value, gradient = sparse_kl_gradients(
        hidden, in_slabs(head), mx.ones(4), mx.arange(4)[:, None], mx.ones((4, 1))
    )
    numbers = mx.isfinite(hidden).all().item()
    assert mx.isfinite(value).item() == numbers == mx.isfinite(gradient).all().item()
    assert not numbers or value.item() > 0
