"""Log-probabilities in chunks and their memory; eq. (2)'s halny factor."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

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


def test_chunk_rows_by_pencil() -> None:
    """256 MiB hold five float32 rows of 49,152 tokens 273 times, capped to 256; of 1,000,000 tokens
    13 times; never fewer than 8: a chunk has its cost.
    """
    assert [losses.chunk_rows(vocab) for vocab in (49_152, 1_000_000, 50_000_000)] == [256, 13, 8]


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


def test_no_fresh_head_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's gradient is added up in parts: no product of a chunk makes a (V, D) array, and the
    sum is the one that whole products give.
    """
    hidden = mx.random.normal((12, 8), key=mx.random.key(0))
    head = mx.random.normal((50, 8), key=mx.random.key(1))

    def work(h: mx.array, w: mx.array) -> mx.array:
        return losses.token_logps(h, w, mx.arange(12), rows=5).sum()

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
