"""Least squares on streamed sums, against numpy's lstsq in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths.reconstruction import NormalEquations

F, D, N = 7, 4, 90


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (N, F), missing outputs (N, D), weights (N,)."""
    r = np.random.default_rng(seed)
    a, miss, w = r.normal(size=(N, F)), r.normal(size=(N, D)), r.uniform(0.2, 3.0, N)
    return a.astype(np.float32), miss.astype(np.float32), w.astype(np.float32)


def fit(a: np.ndarray, r: np.ndarray, w: np.ndarray, parts: int = 3) -> NormalEquations:
    """The sums of all tokens, added in parts."""
    made = NormalEquations(F, D)
    for at in np.array_split(np.arange(N), parts):
        made.add(*made.products(mx.array(a[at]), mx.array(r[at]), mx.array(w[at])))
    return made


def test_against_lstsq() -> None:
    """Noise too: the weighted least squares solution, and the share of the error it leaves."""
    a, r, w = draw()
    update, left = fit(a, r, w).solve(0.0)
    wide = w[:, None].astype(np.float64)
    want, *_ = np.linalg.lstsq(a * wide, r * wide, rcond=None)
    np.testing.assert_allclose(update, want.T, atol=1e-5)
    error = np.square(wide * (r - a @ want)).sum() / np.square(wide * r).sum()
    assert left == pytest.approx(error, abs=1e-6) and 0 < left < 1


def test_the_ridge_is_the_documented_one() -> None:
    """lstsq with sqrt(ridge * mean(diag G)) rows added below gives the same U."""
    a, r, w = draw(1)
    wide = w[:, None].astype(np.float64)
    gram = (a * wide).T @ (a * wide)
    extra = np.sqrt(0.3 * np.trace(gram) / F) * np.eye(F)
    want, *_ = np.linalg.lstsq(np.vstack([a * wide, extra]), np.vstack([r * wide, np.zeros((F, D))]), rcond=None)
    np.testing.assert_allclose(fit(a, r, w).solve(0.3)[0], want.T, atol=1e-5)


def test_parts_merge_in_any_order() -> None:
    """One batch or five, forwards or backwards: the same update (float32 products, float64 sums)."""
    a, r, w = draw(2)
    one = fit(a, r, w, 1).solve(0.1)[0]
    np.testing.assert_allclose(fit(a, r, w, 5).solve(0.1)[0], one, atol=1e-6)
    np.testing.assert_allclose(fit(a[::-1], r[::-1], w[::-1], 5).solve(0.1)[0], one, atol=1e-6)


def test_a_direction_never_seen_stays() -> None:
    """Input 3 is always 0: its column of the update is exactly 0 with a ridge, and nothing is left undefined."""
    a, r, w = draw(3)
    a[:, 3] = 0
    update, _ = fit(a, r, w).solve(0.1)
    assert (update[:, 3] == 0).all() and np.isfinite(update).all()


def test_nothing_missing_nothing_changed() -> None:
    """r = 0: zero update, and the error that remains is called 1, not 0/0."""
    a, r, w = draw()
    update, left = fit(a, 0 * r, w).solve(0.1)
    assert (update == 0).all() and left == 1.0
