"""Forward KL in chunks, its gradient and its memory; eq. (2)'s halny factor."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import losses

N, D, D_T, V = 13, 8, 6, 40


def problem(n: int = N, vocab: int = V) -> dict[str, mx.array]:
    """Random hidden states, heads and a learn mask with holes."""
    keys = mx.random.split(mx.random.key(7), 4)
    return {
        "student": mx.random.normal((n, D), key=keys[0]),
        "head": mx.random.normal((vocab, D), key=keys[1]),
        "teacher": mx.random.normal((n, D_T), key=keys[2]),
        "teacher_head": mx.random.normal((vocab, D_T), key=keys[3]),
        "learn": mx.array([float(i % 3 != 1) for i in range(n)]),
    }


def chunked(p: dict[str, mx.array], temperature: float, rows: int | None) -> tuple[mx.array, list[mx.array]]:
    """kl_sum and its gradients in student and head."""

    def loss(student: mx.array, head: mx.array) -> mx.array:
        return losses.kl_sum(
            student, head, p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"], temperature, rows
        )

    return mx.value_and_grad(loss, argnums=(0, 1))(p["student"], p["head"])


def plain(p: dict[str, mx.array], temperature: float) -> tuple[mx.array, list[mx.array]]:
    """The formula as it is written, differentiated by MLX."""
    z_t = p["teacher"] @ p["teacher_head"].T / temperature

    def loss(student: mx.array, head: mx.array) -> mx.array:
        z_s = student @ head.T / temperature
        log_t = z_t - mx.logsumexp(z_t, axis=-1, keepdims=True)
        log_s = z_s - mx.logsumexp(z_s, axis=-1, keepdims=True)
        return ((mx.exp(log_t) * (log_t - log_s)).sum(axis=-1) * p["learn"]).sum()

    return mx.value_and_grad(loss, argnums=(0, 1))(p["student"], p["head"])


@pytest.mark.parametrize(("temperature", "rows"), [(1.0, 1), (1.0, None), (2.0, 4), (2.0, 13)])
def test_chunked_kl_is_the_plain_formula(temperature: float, rows: int | None) -> None:
    """Value and both gradients equal autodiff of whole logits (1e-5), however the positions are cut; where learn is 0
    the gradient is exactly 0, elsewhere it is not."""
    p = problem()
    value, gradients = chunked(p, temperature, rows)
    wanted, wanted_gradients = plain(p, temperature)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-5)
    assert np.array_equal(np.abs(np.array(gradients[0])).sum(axis=1) > 0, np.array(p["learn"]) == 1)


@pytest.mark.parametrize(("c", "temperature", "rows"), [(0.25, 1.0, 4), (0.5, 2.0, None), (1.0, 1.0, None)])
def test_cross_entropy_is_the_plain_formula(c: float, temperature: float, rows: int | None) -> None:
    """(1 - c) KL + c CE: value and both gradients equal autodiff of whole logits to 1e-5."""
    p, labels = problem(), mx.random.randint(0, V, (N,), key=mx.random.key(3))
    z_t = p["teacher"] @ p["teacher_head"].T / temperature

    def got(student: mx.array, head: mx.array) -> mx.array:
        return losses.kl_sum(
            student, head, p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"], temperature, rows,
            labels=labels, cross_entropy=c,
        )  # fmt: skip

    def wanted(student: mx.array, head: mx.array) -> mx.array:
        z = student @ head.T
        a, b = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (z_t, z / temperature))
        ce = mx.logsumexp(z, axis=-1) - mx.take_along_axis(z, labels[:, None], axis=-1)[:, 0]
        return (((1 - c) * (mx.exp(a) * (a - b)).sum(axis=-1) + c * ce) * p["learn"]).sum()

    both = (mx.value_and_grad(f, (0, 1))(p["student"], p["head"]) for f in (got, wanted))
    values, gradients = zip(*both, strict=True)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-5)


def test_cross_entropy_by_pencil() -> None:
    """Two tokens, teacher 3 : 1, student 1 : 1, the text says the first: KL 0.75 ln 1.5 + 0.25 ln 0.5, CE ln 2."""
    one, head = mx.array([[1.0]]), mx.array([[0.0], [0.0]])
    label, two_logits = mx.array([0]), mx.array([[np.log(3.0)], [0.0]])

    def kl(student: mx.array, **options: Any) -> mx.array:
        return losses.kl_sum(student, head, one, lambda h: h @ two_logits.T, mx.array([1.0]), **options)

    forward = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    mixed = kl(one, labels=label, cross_entropy=0.25).item()
    assert mixed == pytest.approx(0.75 * forward + 0.25 * np.log(2), abs=1e-6)


def test_a_frozen_head_changes_neither_value_nor_the_students_gradient() -> None:
    """Bit for bit those with the head trained; and three times the loss has three times the gradient."""
    p = problem()

    def loss(student: mx.array, head: mx.array, frozen: bool) -> mx.array:
        return 3.0 * losses.kl_sum(
            student, head, p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"], 2.0, 4, frozen
        )

    (a, got), (b, want) = (mx.value_and_grad(loss)(p["student"], p["head"], frozen) for frozen in (True, False))
    assert a.item() == b.item() and mx.array_equal(got, want)
    np.testing.assert_allclose(np.array(got), 3 * np.array(chunked(p, 2.0, 4)[1][0]), rtol=1e-6)
    nothing = mx.grad(loss, argnums=1)(p["student"], p["head"], True)
    assert not mx.any(nothing).item()


def test_a_frozen_head_has_no_gradient_in_memory() -> None:
    """A head far larger than a chunk's logits: frozen, the peak stays under one more copy of it; trained, not."""
    vocab, rows, n, over = 8192, 8, 16, []
    wide = mx.random.normal((vocab, 512), key=mx.random.key(0))
    student = mx.random.normal((n, 512), key=mx.random.key(1))
    p = problem(n, vocab)
    mx.eval(wide, student, p)
    for frozen in (True, False):

        def loss(student: mx.array, frozen: bool = frozen) -> mx.array:
            return losses.kl_sum(
                student, wide, p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"], 1.0, rows, frozen
            )

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss)(student))
        over.append(mx.get_peak_memory() - before > wide.nbytes)
    assert over == [False, True]


def test_memory_is_bounded_by_the_chunk() -> None:
    """Eight times the positions at the same chunk size: the peak grows by hidden states, not by logits.

    Bound: 24 tensors of a chunk's logits, because each chunk has five alive and MLX prepares up to three
    chunks ahead of the one it computes (15.5 were measured); both heads and their gradients; 8 copies of the
    hidden states. The teacher's logits of all positions at once would alone be over it.
    """
    vocab, rows, peaks = 8192, 16, []
    for n in (128, 1024):
        p = problem(n, vocab)
        mx.eval(list(p.values()))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(chunked(p, 1.0, rows))
        peaks.append(mx.get_peak_memory() - before)
        bound = 24 * rows * vocab * 4 + 4 * vocab * D * 4 + 8 * n * D * 4
        assert peaks[-1] < bound
    assert n * vocab * 4 > bound
    assert peaks[1] < 1.5 * peaks[0]


def test_cross_entropy_takes_no_more_memory() -> None:
    """Its softmax and labels come on top, so its chunks are smaller: at T = 2, where it needs most, the peak is no
    higher than that of plain KL, whatever the number of positions."""
    vocab, n = 8192, 1024
    p, peaks = problem(n, vocab), []
    labels = mx.random.randint(0, vocab, (n,), key=mx.random.key(3))
    for c in (0.0, 0.5):

        def loss(student: mx.array, head: mx.array, c: float = c) -> mx.array:
            options = {"labels": labels, "cross_entropy": c} if c else {}
            return losses.kl_sum(
                student, head, p["teacher"], lambda h: h @ p["teacher_head"].T, p["learn"], 2.0, **options
            )

        mx.eval(p, labels)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss, (0, 1))(p["student"], p["head"]))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] <= 1.02 * peaks[0]


def test_chunk_rows_by_pencil() -> None:
    """256 MiB hold five float32 rows of 49,152 tokens 273 times, capped to 256; of 1,000,000 tokens 13 times."""
    assert losses.chunk_rows(49_152) == 256
    assert losses.chunk_rows(1_000_000) == 13
    assert losses.chunk_rows(50_000_000) == 8  # never fewer: a chunk has its cost


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_softmax_lse_against_float64(shift: float) -> None:
    """softmax and logsumexp of large logits neither overflow nor drift (relative float32 rounding)."""
    z = np.random.default_rng(0).normal(0, 20, (6, 300)).astype(np.float32) + np.float32(shift)
    p, lse = losses.softmax_lse(mx.array(z))
    wide = z.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.exp(wide - top).sum(-1)
    np.testing.assert_allclose(np.array(lse), top[:, 0] + np.log(total), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.array(p), np.exp(wide - top) / total[:, None], atol=1e-6)


def test_reference_by_pencil() -> None:
    """Two tokens, teacher 3 : 1, student 1 : 1: losses ln 4/3 and ln 2, KL = 0.75 ln 1.5 + 0.25 ln 0.5."""
    reference = losses.Reference(mx.array([[np.log(3.0), 0.0]]), mx.array([0]))
    nll, kl, top1 = reference.compare(mx.array([[0.0, 0.0]]))
    assert reference.nll().item() == pytest.approx(np.log(4 / 3), abs=1e-6)
    assert nll.item() == pytest.approx(np.log(2), abs=1e-6)
    assert kl.item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6)
    assert top1.item() == 1.0
    assert reference.compare(mx.array([[0.0, 1.0]]))[2].item() == 0.0


def test_halny_factor_is_clipped_and_repeats() -> None:
    """15 °C of spread are the full 0.15; no wind is exactly 1; a storm (sigma 10) stays within ±0.15; a seed and step
    always meet the same wind, others another."""
    assert (losses.halny_sigma(None), losses.halny_sigma(5.0)) == (0.0, pytest.approx(0.05))
    assert losses.halny_factor(0.0, 0, 5) == 1.0
    storm = [losses.halny_factor(10.0, 0, step) for step in range(50)]
    assert min(storm) == pytest.approx(0.85) and max(storm) == pytest.approx(1.15)
    breeze = [losses.halny_factor(0.05, 3, step) for step in range(400)]
    assert breeze == [losses.halny_factor(0.05, 3, step) for step in range(400)]
    assert len(set(breeze)) > 390
    assert losses.halny_factor(0.05, 4, 0) != breeze[0]
    assert np.std(breeze) == pytest.approx(0.05, abs=0.01) and np.mean(breeze) == pytest.approx(1.0, abs=0.01)
