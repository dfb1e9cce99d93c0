"""One interface for losses: value and gradients by MLX and by numpy, beside float64 and pencil."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import host_losses, precision, streams, token_losses
from mis_mlx.compute.token_losses import Footprint, LossGradients, TokenLoss
from mis_mlx.maths import losses
from mis_mlx.types import MisError
from tests.conftest import files_up_to

Doubles = tuple[float, np.ndarray, np.ndarray]  # value, gradients in hidden states and head


@pytest.fixture(params=["cpu", "metal"])
def back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """numpy, or MLX: by the policy."""
    monkeypatch.setenv(precision.POLICY, request.param)
    return str(request.param)


def drawn(*shape: int, seed: int) -> mx.array:
    """Normal numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed))


def doubles(array: mx.array) -> np.ndarray:
    """In float64."""
    return np.array(array).astype(np.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def exact_kl(
    hidden: mx.array,
    head: mx.array,
    target: mx.array,
    teacher_head: mx.array,
    loss_mask: mx.array,
    *,
    temperature: float,
    softcap: float,
) -> Doubles:
    """KL and its gradients in numpy float64, by the chain rule on whole logits."""
    h = doubles(hidden)
    w = doubles(head)
    raw = h @ w.T
    z = softcap * np.tanh(raw / softcap) if softcap else raw
    p = softmax(doubles(target) @ doubles(teacher_head).T / temperature)
    q = softmax(z / temperature)
    weights = doubles(loss_mask)[:, None]
    value = float((weights * p * (np.log(p) - np.log(q))).sum())
    slope = weights * (q - p) / temperature
    if softcap:
        slope *= 1.0 - np.square(z / softcap)
    return value, slope @ w, slope.T @ h


def assert_near(found: LossGradients, want: Doubles, places: float = 1e-5) -> None:
    """Value and gradients, as far as there are any, to this part of the largest."""
    value, *grads = want
    assert float(found.value) == pytest.approx(value, rel=places)
    for ours, theirs in zip(found[1:], grads, strict=True):
        if ours is not None:
            largest = np.abs(theirs).max()
            np.testing.assert_allclose(np.array(ours), theirs, atol=places * largest)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (2.5, 0.0), (1.0, 3.0)])
@pytest.mark.parametrize(("n", "vocab"), [(13, 40), (300, 20)])
def test_kl_to_a_teacher(
    back_end: str, n: int, vocab: int, temperature: float, softcap: float, *, frozen_head: bool
) -> None:
    """On both back ends beside float64; 300 positions are two chunks."""
    hidden = drawn(n, 16, seed=1)
    head = drawn(vocab, 16, seed=2)
    target = drawn(n, 8, seed=3)
    teacher_head = drawn(vocab, 8, seed=4)
    loss_mask = (mx.random.uniform(shape=(n,), key=mx.random.key(5)) < 0.7).astype(mx.float32)
    loss = token_losses.teacher_kl(
        lambda head: lambda states: states @ teacher_head.T,
        temperature=temperature,
        softcap=softcap,
    )
    assert bool(loss.by_numpy) == (back_end == "cpu")
    found = loss.gradients(hidden, head, loss_mask, target, frozen_head=frozen_head)
    want = exact_kl(
        hidden,
        head,
        target,
        teacher_head,
        loss_mask=loss_mask,
        temperature=temperature,
        softcap=softcap,
    )
    assert (found.head is None) == frozen_head
    assert_near(found, want)


def test_kl_by_pencil(back_end: str) -> None:
    """Two tokens, teacher 3 : 1, student 1 : 1: KL = 0.75 ln 1.5 + 0.25 ln 0.5, and the gradient in
    the logits is (0.5 - 0.75, 0.5 - 0.25). A position of weight 0 has none.
    """
    hidden = mx.array([[1.0, 0.0], [1.0, 0.0]])
    head = mx.array([[2.0, 5.0], [2.0, 7.0]])  # logits 2 and 2
    teacher_logits = mx.array([[np.log(3.0), 0.0], [0.0, 0.0]])
    loss = token_losses.teacher_kl(lambda head: lambda states: states * 1.0)
    found = loss.gradients(hidden, head, mx.array([1.0, 0.0]), teacher_logits)
    value = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    # d/dh = -0.25 (2, 5) + 0.25 (2, 7); d/dw = (-0.25, 0.25) x (1, 0)
    hidden_grad = np.array([[0.0, 0.5], [0.0, 0.0]])
    head_grad = np.array([[-0.25, 0.0], [0.25, 0.0]])
    assert_near(found, (value, hidden_grad, head_grad))


def test_sampled_targets(back_end: str) -> None:
    """KL to a target of two tokens a position, beside float64."""
    hidden = drawn(5, 16, seed=1)
    head = drawn(9, 16, seed=2)
    ids = mx.array([[0, 1], [8, 3], [2, 2], [4, 0], [7, 6]])
    shares = mx.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.1, 0.9], [0.6, 0.4]])
    mask = mx.array([1.0, 1.0, 0.0, 1.0, 2.0])
    targets = [ids, shares]
    found = TokenLoss(losses.sampled_kl_sum).gradients(hidden, head, mask, *targets)
    h = doubles(hidden)
    w = doubles(head)
    q = softmax(h @ w.T)
    dense = np.zeros_like(q)
    for row, (tokens, parts) in enumerate(zip(ids.tolist(), shares.tolist(), strict=True)):
        for token, part in zip(tokens, parts, strict=True):
            dense[row, token] += part
    weights = doubles(mask)[:, None]
    inner = np.where(dense > 0, dense * np.log(np.maximum(dense, 1e-300) / q), 0.0)
    slope = weights * (q - dense)
    assert_near(found, (float((weights * inner).sum()), slope @ w, slope.T @ h))


# ---- through a model

Model = Callable[[mx.array, mx.array], mx.array]


def through(loss: TokenLoss, windows: int, head_index: int | None) -> list[np.ndarray]:
    """[value, gradients of body and head, of a further output too] of a model of two layers."""
    tokens = drawn(windows, 6, 12, seed=1)
    body = drawn(12, 8, seed=2)
    head = drawn(20, 8, seed=3)
    target = drawn(windows * 6, 20, seed=4)
    mask = mx.ones(windows * 6)

    def forward(body: mx.array, head: mx.array) -> list[mx.array]:
        hidden = loss.map_windows(lambda x: mx.tanh(x @ body), tokens)
        return [hidden.reshape(-1, 8), head, body.sum(axis=0)]

    of_sum = mx.arange(8).astype(mx.float32)
    value, grads = loss.vjp(
        forward,
        [body, head],
        mask,
        [target],
        width=8,
        windows=windows,
        head_index=head_index,
        cotangents=[of_sum],
    )
    loss.evaluate(grads, windows)
    return [np.array(value), *map(np.array, grads)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("head_index", [None, 1])
def test_gradients_through_a_model(
    back_end: str,
    monkeypatch: pytest.MonkeyPatch,
    windows: int,
    head_index: int | None,
    count: int,
) -> None:
    """Beside the chain rule in float64: body, head unless it is frozen, a further output; windows
    whole and side by side.
    """
    monkeypatch.setattr(streams, "count", lambda: count)
    loss = token_losses.teacher_kl(lambda head: lambda states: states * 1.0)
    value, body_grad, head_grad = through(loss, windows, head_index)

    x = doubles(drawn(windows, 6, 12, seed=1)).reshape(-1, 12)
    body = doubles(drawn(12, 8, seed=2))
    head = doubles(drawn(20, 8, seed=3))
    hidden = np.tanh(x @ body)
    p = softmax(doubles(drawn(windows * 6, 20, seed=4)))
    q = softmax(hidden @ head.T)
    slope = q - p
    below = (slope @ head) * (1.0 - np.square(hidden))
    want_body = x.T @ below + np.arange(8)
    want_head = slope.T @ hidden if head_index else np.zeros_like(head)
    assert value == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    np.testing.assert_allclose(body_grad, want_body, atol=1e-5 * np.abs(want_body).max())
    np.testing.assert_allclose(head_grad, want_head, atol=1e-5 * np.abs(slope.T @ hidden).max())


def test_no_array_of_the_graph_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numpy computes, every array that the trainer holds keeps its numbers, and no file is
    left.
    """
    monkeypatch.setenv(precision.POLICY, "cpu")
    monkeypatch.setattr(tempfile, "tempdir", None)
    held: list[tuple[mx.array, np.ndarray]] = []
    whole = host_losses.kl_gradients

    def watched(*arrays: mx.array, **named: object) -> tuple[float, mx.array, mx.array | None]:
        for array in arrays[:3]:
            held.append((array, np.array(array)))
        return whole(*arrays, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(host_losses, "kl_gradients", watched)
    before = set(Path(tempfile.gettempdir()).glob("mis_mlx-*.npy"))
    through(token_losses.teacher_kl(lambda head: lambda states: states * 1.0), 2, 1)
    assert len(held) == 3
    for array, numbers in held:
        np.testing.assert_array_equal(np.array(array), numbers)
    assert set(Path(tempfile.gettempdir()).glob("mis_mlx-*.npy")) <= before


def test_a_full_disk_is_an_error_and_not_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The gradient's file cannot be made, or grows no further: the step fails, with the folder and
    what to do.
    """
    monkeypatch.setenv(precision.POLICY, "cpu")
    loss = token_losses.teacher_kl(lambda head: lambda states: states * 1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with files_up_to(200), pytest.raises(MisError, match="set TMPDIR") as refused:
        through(loss, 1, None)
    assert str(tmp_path) in str(refused.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(MisError, match="/nowhere/at/all"):
        through(loss, 1, None)


def test_gradients_of_drawn_tokens(back_end: str) -> None:
    """By pencil: softmax of logits ln 3 and 0 is 3/4 and 1/4; and beside float64."""
    z = mx.array([[float(np.log(3.0)), 0.0], [float(np.log(3.0)), 0.0]])
    found = token_losses.likelihood_gradients(z, mx.array([0, 1]))
    np.testing.assert_allclose(np.array(found), [[0.25, -0.25], [-0.75, 0.75]], atol=1e-6)
    logits = drawn(300, 40, seed=1)
    tokens = mx.arange(300) % 40
    want = -softmax(doubles(logits))
    want[np.arange(300), np.array(tokens)] += 1.0
    found = token_losses.likelihood_gradients(logits, tokens)
    np.testing.assert_allclose(np.array(found), want, atol=1e-6)


# ---- what it holds


def test_logits_by_pencil() -> None:
    """Of 32,768 tokens a chunk has 256 positions. numpy: student and teacher of one; MLX: five
    arrays of three chunks, or eight where the student stands alone; a GPU: those, or what its
    commands in flight hold.
    """
    chunk = 256 * 32_768 * 4
    host = Footprint(on_host=True)
    assert losses.chunk_rows(32_768) == 256
    assert host.logit_bytes(32_768, 10_000) == 2 * chunk
    assert host.logit_bytes(32_768, 64) == 2 * 64 * 32_768 * 4
    assert Footprint().logit_bytes(32_768, 64) == 5 * chunk
    assert Footprint().logit_bytes(32_768, 10_000) == 15 * chunk
    assert Footprint().logit_bytes(32_768, 64, student_alone=True) == 5 * chunk
    assert Footprint().logit_bytes(32_768, 10_000, student_alone=True) == 8 * chunk
    assert Footprint(gpu=True).logit_bytes(32_768, 64) == 12 * chunk
    assert Footprint(gpu=True).logit_bytes(32_768, 10_000) == 15 * chunk
