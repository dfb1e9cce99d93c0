"""Least squares on streamed sums, against numpy's lstsq in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import reconstruction
from mis_mlx.maths.reconstruction import NormalEquations

F, D, N = 7, 4, 90


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (N, F), missing outputs (N, D), weights (N,)."""
    r = np.random.default_rng(seed)
    a, miss, w = r.normal(size=(N, F)), r.normal(size=(N, D)), r.uniform(0.2, 3.0, N)
    return a.astype(np.float32), miss.astype(np.float32), w.astype(np.float32)


def sums(a: np.ndarray, r: np.ndarray, w: np.ndarray, parts: int = 3) -> NormalEquations:
    """The sums of all tokens, added in parts."""
    made = NormalEquations(F, D)
    for at in np.array_split(np.arange(len(a)), parts):
        made.add(*made.products(mx.array(a[at]), mx.array(r[at]), mx.array(w[at])))
    return made


def test_against_lstsq() -> None:
    """Noise too: the weighted least squares solution, and the share of the error it leaves."""
    a, r, w = draw()
    fit = sums(a, r, w)
    left = fit.left(update := fit.update(0.0))
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
    np.testing.assert_allclose(sums(a, r, w).update(0.3), want.T, atol=1e-5)


def test_wide_layers_are_solved_in_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 beyond `WIDE` inputs: the update of float64 to its precision, and the same share of the error."""
    fit = sums(*draw())
    monkeypatch.setattr(reconstruction, "WIDE", F - 1)
    wide = sums(*draw())
    update = wide.update(0.1)
    assert {a.dtype for a in (wide.gram, wide.cross, update)} == {np.dtype(np.float32)} != {fit.gram.dtype}
    np.testing.assert_allclose(update, want := fit.update(0.1), atol=1e-5)
    assert wide.left(update) == pytest.approx(fit.left(want), abs=1e-5)


def test_parts_merge_in_any_order() -> None:
    """One batch or five, forwards or backwards: the same update (float32 products, float64 sums)."""
    a, r, w = draw(2)
    one = sums(a, r, w, 1).update(0.1)
    np.testing.assert_allclose(sums(a, r, w, 5).update(0.1), one, atol=1e-6)
    np.testing.assert_allclose(sums(a[::-1], r[::-1], w[::-1], 5).update(0.1), one, atol=1e-6)


def test_a_direction_never_seen_stays() -> None:
    """Input 3 is always 0: its column of the update is exactly 0 with a ridge, and nothing is left undefined."""
    a, r, w = draw(3)
    a[:, 3] = 0
    update = sums(a, r, w).update(0.1)
    assert (update[:, 3] == 0).all() and np.isfinite(update).all()


def test_nothing_missing_nothing_changed() -> None:
    """r = 0: zero update, and the error that remains is called 1, not 0/0."""
    a, r, w = draw()
    fit = sums(a, 0 * r, w)
    left = fit.left(update := fit.update(0.1))
    assert (update == 0).all() and left == 1.0


def test_the_ridge_is_the_one_that_leaves_least_held_out() -> None:
    """Of four by numpy, tried on tokens that no solution saw; the update is then that of all tokens."""
    a, r, w = draw(4)
    wide, ridges = w[:, None].astype(np.float64), (1e-3, 0.1, 1.0, 1e3)
    seen, judge = np.s_[:12], np.s_[12:40]

    def by_hand(ridge: float, at: slice) -> np.ndarray:
        rows = (a * wide)[at].astype(np.float64)
        gram = rows.T @ rows
        damped = gram + ridge * np.trace(gram) / F * np.eye(F)
        return np.asarray(np.linalg.solve(damped, rows.T @ (r * wide)[at]))

    def left(update: np.ndarray) -> float:
        missing = (r * wide)[judge]
        return float(np.square(missing - (a * wide)[judge] @ update).sum() / np.square(missing).sum())

    r[:] = a @ np.linspace(-0.5, 0.5, F * D).reshape(F, D) + r  # something to be learned, and noise
    shares = [left(by_hand(ridge, seen)) for ridge in ridges]
    best = int(np.argmin(shares))
    assert 0 < best < len(ridges) - 1 and shares[best] < 1 < shares[0]
    update, held_out = sums(a[seen], r[seen], w[seen]).judged(sums(a[judge], r[judge], w[judge]), ridges)
    assert held_out == pytest.approx(shares[best], abs=1e-6)
    np.testing.assert_allclose(update, by_hand(ridges[best], np.s_[:40]).T, atol=1e-5)


def test_noise_is_not_learned() -> None:
    """Nothing to be learned, fewer tokens than inputs: no update, and 1 is left."""
    a, r, w = draw(5)
    fit, judge = sums(a[:5], r[:5], w[:5]), sums(a[5:], -r[5:], w[5:])
    assert fit.left(fit.update(0.1)) < 0.9  # by heart
    update, held_out = fit.judged(judge, (0.1, 1.0))
    assert held_out == 1.0 and not update.any()
