"""Forward KL in chunks, its gradient and its memory; eq. (2)'s halny factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute.token_losses import Footprint
from mis_mlx.maths import losses

N = 13
D = 8
D_T = 6
V = 40
Problem = dict[str, mx.array]


def problem(n: int = N, vocab: int = V) -> Problem:
    """Random hidden states, heads and a learn mask with holes."""
    keys = mx.random.split(mx.random.key(7), 4)
    return {
        "student": mx.random.normal((n, D), key=keys[0]),
        "head": mx.random.normal((vocab, D), key=keys[1]),
        "teacher": mx.random.normal((n, D_T), key=keys[2]),
        "teacher_head": mx.random.normal((vocab, D_T), key=keys[3]),
        "learn": mx.array([float(i % 3 != 1) for i in range(n)]),
    }


def gradients(loss: Callable[..., mx.array], p: Problem) -> tuple[mx.array, list[mx.array]]:
    """A loss of student and head, and its gradients in both."""
    return mx.value_and_grad(loss, argnums=(0, 1))(p["student"], p["head"])


def ours(p: Problem, **options: Any) -> Callable[[mx.array, mx.array], mx.array]:
    """kl_sum of this problem."""

    def loss(student: mx.array, head: mx.array) -> mx.array:
        return losses.kl_sum(
            student,
            head,
            teacher=p["teacher"],
            teacher_logits=lambda h: h @ p["teacher_head"].T,
            loss_mask=p["learn"],
            **options,
        )

    return loss


def plain(p: Problem, temperature: float) -> Callable[[mx.array, mx.array], mx.array]:
    """KL as it is written, on whole logits."""

    def log_softmax(logits: mx.array) -> mx.array:
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    log_t = log_softmax(p["teacher"] @ p["teacher_head"].T / temperature)

    def loss(student: mx.array, head: mx.array) -> mx.array:
        log_s = log_softmax(student @ head.T / temperature)
        kl = (mx.exp(log_t) * (log_t - log_s)).sum(axis=-1)
        return (kl * p["learn"]).sum()

    return loss


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that MLX takes at most for it, beyond those that are there."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(("temperature", "rows"), [(1.0, 1), (1.0, None), (2.0, 4), (2.0, 13)])
def test_the_chunked_loss_is_the_plain_formula(temperature: float, rows: int | None) -> None:
    """Value and both gradients equal autodiff of whole logits (1e-5), however the positions are
    cut; where learn is 0 the gradient is exactly 0, elsewhere it is not.
    """
    p = problem()
    loss = ours(p, temperature=temperature, rows=rows)

    value, found = gradients(loss, p)
    wanted_value, wanted = gradients(plain(p, temperature), p)

    assert value.item() == pytest.approx(wanted_value.item(), rel=1e-5)
    for gradient, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(gradient), np.array(expected), rtol=1e-5, atol=1e-5)
    taught = np.abs(np.array(found[0])).sum(axis=1) > 0
    assert np.array_equal(taught, np.array(p["learn"]) == 1)


def test_a_frozen_head_changes_neither_value_nor_the_students_gradient() -> None:
    """Bit for bit those with the head trained; and three times the loss has three times the
    gradient.
    """
    p = problem()
    loss = ours(p, temperature=2.0, rows=4)
    of_frozen = ours(p, temperature=2.0, rows=4, frozen_head=True)

    trained, (want, _) = gradients(loss, p)
    frozen, (got, nothing) = gradients(of_frozen, p)
    _, (three, _) = gradients(lambda student, head: 3.0 * loss(student, head), p)

    assert frozen.item() == trained.item()
    assert mx.array_equal(got, want)
    assert not mx.any(nothing).item()
    np.testing.assert_allclose(np.array(three), 3 * np.array(want), rtol=1e-6)


def test_a_frozen_head_has_no_gradient_in_memory() -> None:
    """A head far larger than a chunk's logits: frozen, the peak stays under one more copy of it;
    trained, not.
    """
    vocab = 8192
    n = 16
    wide = mx.random.normal((vocab, 512), key=mx.random.key(vocab))
    student = mx.random.normal((n, 512), key=mx.random.key(n))
    p = problem(n, vocab)
    mx.eval(wide, student, p)

    def peak(frozen: bool) -> int:
        loss = ours(p, rows=8, frozen_head=frozen)
        gradient = mx.value_and_grad(lambda h: loss(h, wide))
        return peak_of(lambda: gradient(student))

    assert peak(True) <= wide.nbytes < peak(False)


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="a CPU's arrays are counted")
@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_tokens_as_targets_take_what_is_planned(chunks: int) -> None:
    """Of a frozen head, beside the hidden states and their gradient."""
    vocab = 32_768
    n = chunks * losses.chunk_rows(vocab)
    student = mx.random.normal((n, D), key=mx.random.key(1))
    head = mx.random.normal((vocab, D), key=mx.random.key(2))
    tokens = mx.random.randint(0, vocab, (n, 4), key=mx.random.key(3))
    shares = mx.full((n, 4), 0.25)
    mx.eval(student, head, tokens, shares)

    def loss(hidden: mx.array) -> mx.array:
        return losses.sampled_kl_sum(hidden, head, mx.ones((n,)), tokens, shares, frozen_head=True)

    taken = peak_of(lambda: mx.value_and_grad(loss)(student))
    planned = Footprint().logit_bytes(vocab, n, student_alone=True)
    assert taken <= planned + 8 * student.nbytes


def test_memory_is_bounded_by_the_chunk() -> None:
    """Eight times the positions at the same chunk size: the peak grows by hidden states, not by
    logits.

    Bound: 24 tensors of a chunk's logits, because each chunk has five alive and MLX prepares up to
    three chunks ahead of the one it computes (15.5 were measured); both heads and their gradients;
    8 copies of the hidden states. The teacher's logits of all positions at once would alone be over
    it.
    """
    vocab = 8192
    rows = 16
    peaks = []
    for n in (128, 1024):
        p = problem(n, vocab)
        mx.eval(p)
        peaks.append(peak_of(lambda p=p: gradients(ours(p, rows=rows), p)))
        chunk = rows * vocab * 4
        heads = 4 * vocab * D * 4
        hidden = n * D * 4
        bound = 24 * chunk + heads + 8 * hidden
        assert peaks[-1] < bound
    assert n * vocab * 4 > bound
    assert peaks[1] < 1.5 * peaks[0]


def test_chunk_rows_by_pencil() -> None:
    """256 MiB hold five float32 rows of 49,152 tokens 273 times, capped to 256; of 1,000,000 tokens
    13 times; never fewer than 8: a chunk has its cost.
    """
    assert [losses.chunk_rows(vocab) for vocab in (49_152, 1_000_000, 50_000_000)] == [256, 13, 8]


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_softmax_lse_against_float64(shift: float) -> None:
    """softmax and logsumexp of large logits neither overflow nor drift (relative float32
    rounding).
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 20, (6, 300)).astype(np.float32) + np.float32(shift)
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    powers = np.exp(wide - top)
    total = powers.sum(-1, keepdims=True)
    wanted_lse = (top + np.log(total))[:, 0]

    p, lse = losses.softmax_lse(mx.array(logits))

    np.testing.assert_allclose(np.array(lse), wanted_lse, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.array(p), powers / total, atol=1e-6)


def test_halny_factor_is_clipped_and_repeats() -> None:
    """No wind is exactly 1; a storm (sigma 10) stays within ±0.15; a seed and step
    always meet the same wind, others another."""
    storm = [losses.loss_noise_factor(10.0, 0, step) for step in range(50)]
    breeze = [losses.loss_noise_factor(0.05, 3, step) for step in range(400)]
    again = [losses.loss_noise_factor(0.05, 3, step) for step in range(400)]

    assert losses.loss_noise_factor(0.0, 0, 5) == 1.0
    assert min(storm) == pytest.approx(0.85)
    assert max(storm) == pytest.approx(1.15)
    assert breeze == again
    assert len(set(breeze)) > 390
    assert losses.loss_noise_factor(0.05, 4, 0) != breeze[0]
    assert np.std(breeze) == pytest.approx(0.05, abs=0.01)
    assert np.mean(breeze) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ["kl_sum", "token_logps"])
def test_no_fresh_head_a_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's gradient is added up in parts: no product of a chunk makes a (V, D) array, and the
    sum is the one that whole products give.
    """
    hidden = mx.random.normal((12, 8), key=mx.random.key(0))
    head = mx.random.normal((50, 8), key=mx.random.key(1))
    work = {
        "kl_sum": lambda h, w: losses.kl_sum(
            h, w, teacher=h, teacher_logits=lambda x: x @ head.T * 2, loss_mask=mx.ones(12), rows=5
        ),
        "token_logps": lambda h, w: losses.token_logps(h, w, mx.arange(12), rows=5).sum(),
    }[name]
    want = mx.grad(work, argnums=[0, 1])(hidden, head)
    made = list[int]()
    addmm = mx.addmm

    def watched(*arrays: mx.array) -> mx.array:
        made.append(arrays[0].size)
        return addmm(*arrays)

    monkeypatch.setattr(mx, "addmm", watched)
    monkeypatch.setattr(losses, "PART", 12 * 8)
    found = mx.grad(work, argnums=[0, 1])(hidden, head)
    assert made == [12 * 8, 12 * 8, 12 * 8, 12 * 8, 2 * 8] * 3
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("wide", ["hidden", "head", "neither"])
def test_logits_of_half_precision_are_float32s(dtype: mx.Dtype, wide: str) -> None:
    """Numbers are what their types hold; their products and sums are not rounded to these again."""
    p = problem()
    hidden = p["student"].astype(mx.float32 if wide == "hidden" else dtype)
    head = p["head"].astype(mx.float32 if wide == "head" else dtype)
    exact = np.array(hidden.astype(mx.float32), np.float64)
    exact = exact @ np.array(head.astype(mx.float32), np.float64).T
    found = losses.wide_product(hidden, head)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), exact, rtol=1e-5, atol=1e-5)


def test_the_halny_is_as_wide_as_the_air_spreads() -> None:
    """15 °C give the full 0.15, still air gives none."""
    assert losses.halny_sigma(15.0) == pytest.approx(0.15)
    assert losses.halny_sigma(0.0) == 0.0
