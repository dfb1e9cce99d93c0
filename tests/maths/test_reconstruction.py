"""Least squares on streamed sums, against numpy's lstsq in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import reconstruction
from mis_mlx.maths.reconstruction import HeldOut, NormalEquations, left

F = 7
D = 4
N = 90


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (N, F), missing outputs (N, D), weights (N,)."""
    r = np.random.default_rng(seed)
    a = r.normal(size=(N, F))
    miss = r.normal(size=(N, D))
    w = r.uniform(0.2, 3.0, N)
    return a.astype(np.float32), miss.astype(np.float32), w.astype(np.float32)


def sums(a: np.ndarray, r: np.ndarray, w: np.ndarray, parts: int = 3) -> NormalEquations:
    """The sums of all tokens, added in parts."""
    made = NormalEquations(F, D)
    for at in np.array_split(np.arange(len(a)), parts):
        made.add(*made.products(mx.array(a[at]), mx.array(r[at]), mx.array(w[at])))
    return made


def judging(a: np.ndarray, r: np.ndarray, w: np.ndarray, kind: int = 0) -> HeldOut:
    """These tokens, as they judge a fit."""
    return HeldOut.of(mx.array(a), mx.array(r), mx.array(w), kind)


def test_against_lstsq() -> None:
    """Noise too: the weighted least squares solution, and the share of the error it leaves."""
    a, r, w = draw()
    fit = sums(a, r, w)
    update = fit.update(0.0)
    remaining = left([judging(a, r, w)], update)
    wide = w[:, None].astype(np.float64)
    want, *_ = np.linalg.lstsq(a * wide, r * wide, rcond=None)
    np.testing.assert_allclose(update, want.T, atol=1e-5)
    error = np.square(wide * (r - a @ want)).sum() / np.square(wide * r).sum()
    assert remaining == pytest.approx(error, abs=1e-6) and 0 < remaining < 1


def test_the_ridge_is_the_documented_one() -> None:
    """lstsq with sqrt(ridge * mean(diag G)) rows added below gives the same U."""
    a, r, w = draw(1)
    wide = w[:, None].astype(np.float64)
    gram = (a * wide).T @ (a * wide)
    extra = np.sqrt(0.3 * np.trace(gram) / F) * np.eye(F)
    want, *_ = np.linalg.lstsq(
        np.vstack([a * wide, extra]), np.vstack([r * wide, np.zeros((F, D))]), rcond=None
    )
    np.testing.assert_allclose(sums(a, r, w).update(0.3), want.T, atol=1e-5)


def test_wide_layers_are_solved_in_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 beyond `WIDE` inputs: the update of float64 to its precision, and the same share of
    the error.
    """
    fit = sums(*draw())
    monkeypatch.setattr(reconstruction, "WIDE", F - 1)
    wide = sums(*draw())
    update = wide.update(0.1)
    assert (
        {a.dtype for a in (wide.gram, wide.cross, update)}
        == {np.dtype(np.float32)}
        != {fit.gram.dtype}
    )
    np.testing.assert_allclose(update, want := fit.update(0.1), atol=1e-5)
    tokens = [judging(*draw())]
    assert left(tokens, update) == pytest.approx(left(tokens, want), abs=1e-5)


def test_parts_merge_in_any_order() -> None:
    """One batch or five, forwards or backwards: the same update (float32 products, float64
    sums).
    """
    a, r, w = draw(2)
    one = sums(a, r, w, 1).update(0.1)
    np.testing.assert_allclose(sums(a, r, w, 5).update(0.1), one, atol=1e-6)
    np.testing.assert_allclose(sums(a[::-1], r[::-1], w[::-1], 5).update(0.1), one, atol=1e-6)


def test_a_direction_never_seen_stays() -> None:
    """Input 3 is always 0: its column of the update is exactly 0 with a ridge, and nothing is left
    undefined.
    """
    a, r, w = draw(3)
    a[:, 3] = 0
    update = sums(a, r, w).update(0.1)
    assert (update[:, 3] == 0).all() and np.isfinite(update).all()


def test_nothing_missing_nothing_changed() -> None:
    """r = 0: zero update, and the error that remains is called 1, not 0/0."""
    a, r, w = draw()
    fit = sums(a, 0 * r, w)
    update = fit.update(0.1)
    assert (update == 0).all() and left([judging(a, 0 * r, w)], update) == 1.0


def test_the_ridge_is_the_one_that_leaves_least_held_out() -> None:
    """Of four by numpy, tried on tokens that no solution saw; the update is then that of all
    tokens.
    """
    a, r, w = draw(4)
    wide = w[:, None].astype(np.float64)
    ridges = (1e-3, 0.1, 1.0, 1e3)
    seen = np.s_[:12]
    judge = np.s_[12:40]

    def by_hand(ridge: float, at: slice) -> np.ndarray:
        rows = (a * wide)[at].astype(np.float64)
        gram = rows.T @ rows
        damped = gram + ridge * np.trace(gram) / F * np.eye(F)
        return np.asarray(np.linalg.solve(damped, rows.T @ (r * wide)[at]))

    def left_by_hand(update: np.ndarray) -> float:
        missing = (r * wide)[judge]
        return float(
            np.square(missing - (a * wide)[judge] @ update).sum() / np.square(missing).sum()
        )

    r[:] = a @ np.linspace(-0.5, 0.5, F * D).reshape(F, D) + r  # something to be learned, and noise
    shares = [left_by_hand(by_hand(ridge, seen)) for ridge in ridges]
    best = int(np.argmin(shares))
    assert 0 < best < len(ridges) - 1 and shares[best] < 1 < shares[0]
    update, held_out = sums(a[seen], r[seen], w[seen]).judged(
        [judging(a[judge], r[judge], w[judge])], ridges
    )
    assert held_out == pytest.approx(shares[best], abs=1e-6)
    np.testing.assert_allclose(update, by_hand(ridges[best], np.s_[:40]).T, atol=1e-5)


def test_noise_is_not_learned() -> None:
    """Nothing to be learned, fewer tokens than inputs: no update, and 1 is left."""
    a, r, w = draw(5)
    fit = sums(a[:5], r[:5], w[:5])
    judge = judging(a[5:], -r[5:], w[5:])
    assert left([judging(a[:5], r[:5], w[:5])], fit.update(0.1)) < 0.9  # by heart
    update, held_out = fit.judged([judge], (0.1, 1.0))
    assert held_out == 1.0 and not update.any()


def ones(inputs: list[list[float]], missing: list[list[float]], kind: int) -> HeldOut:
    """Tokens of weight 1."""
    return HeldOut.of(mx.array(inputs), mx.array(missing), mx.ones(len(inputs)), kind)


def test_what_is_left_of_two_kinds_by_pencil() -> None:
    """An update of 1/2 takes 4 to 1 of one kind (a quarter is left), and 4 to 9 of the other (9/4).
    The mean of both is 5/4, the worse one 9/4: their middle is 7/4, whichever window of a kind
    holds its tokens, and however many.
    """
    update = np.array([[0.5]])
    first = ones([[2.0]], [[2.0]], kind=0)
    second = ones([[2.0]], [[-2.0]], kind=7)
    halves = [ones([[1.0]], [[1.0]], kind=0) for _ in range(9)]
    many = ones([[2.0]] * 6, [[-2.0]] * 6, kind=7)

    assert left([first], update) == pytest.approx(1 / 4)
    assert left([second], update) == pytest.approx(9 / 4)
    assert left([first, second], update) == left([second, first], update) == pytest.approx(7 / 4)
    assert left([*halves, many], update) == pytest.approx(7 / 4)


def test_a_kind_without_an_error_is_left_as_it_is() -> None:
    """Nothing is missing there: 1, as where nothing is done; the other kind's quarter makes (5/8 +
    1) / 2.
    """
    whole = ones([[0.0]], [[0.0]], kind=1)
    assert left([ones([[2.0]], [[2.0]], kind=0), whole], np.array([[0.5]])) == pytest.approx(
        13 / 16
    )


def test_weights_count_in_what_is_left() -> None:
    """By pencil: of weight 3 a token's 4 and 1 are 36 and 9; with a lost one of weight 1, 10 of 37
    are left.
    """
    tokens = HeldOut.of(mx.array([[2.0], [0.0]]), mx.array([[2.0], [1.0]]), mx.array([3.0, 1.0]))
    assert left([tokens], np.array([[0.5]])) == pytest.approx(10 / 37)


def test_what_serves_one_kind_and_spoils_the_other_is_not_chosen() -> None:
    """Nine tokens of ten want +1, a second kind wants -1. Every ridge leaves less of all tokens
    together; of the kinds, each counted alike, none does: nothing is changed.
    """
    rng = np.random.default_rng(6)
    often = rng.normal(size=(90, 2)).astype(np.float32)
    seldom = rng.normal(size=(10, 2)).astype(np.float32)
    weight = np.ones(90, np.float32)

    def fitted(rows: np.ndarray, missing: np.ndarray) -> NormalEquations:
        equations = NormalEquations(2, 1)
        equations.add(*equations.products(mx.array(rows), mx.array(missing), mx.ones(len(rows))))
        return equations

    as_one = [
        judging(often, often[:, :1], weight, kind=0),
        judging(seldom, -seldom[:, :1], weight[:10], kind=0),
    ]
    as_two = [as_one[0], as_one[1]._replace(kind=1)]

    one_kind, left_of_one = fitted(often, often[:, :1]).judged(as_one)
    spoiled, left_of_spoiled = fitted(often, often[:, :1]).judged(as_two)

    assert one_kind[0, 0] > 0.3 and left_of_one < 1
    assert not spoiled.any() and left_of_spoiled == 1.0


def test_the_ridge_is_the_one_for_both_kinds() -> None:
    """One input of mean square 1 that the fit answers with 1 / (1 + ridge). One kind wants 1, the
    other 1/2. Alone, each has the ridge nearest to that; together the worse one counts most, and
    neither of these is taken.
    """
    fit = NormalEquations(1, 1)
    fit.add(*fit.products(mx.ones((8, 1)), mx.ones((8, 1)), mx.ones(8)))
    ridges = (1e-6, 0.5, 1.5)  # updates of 1, 2/3 and 0.4
    wants_all = ones([[1.0]], [[1.0]], kind=0)
    wants_less = ones([[1.0]], [[0.5]], kind=1)

    chosen = list[float]()
    for held_out in ([wants_all], [wants_less], [wants_all, wants_less]):
        shares = [left(held_out, fit.update(ridge)) for ridge in ridges]
        update, least = fit.judged(held_out, ridges, whole=False)
        assert least == pytest.approx(min(shares), abs=1e-6)
        chosen.append(round(float(update[0, 0]), 3))

    assert chosen == [1.0, 0.4, 0.667]
    # By pencil: (1 - u)^2 and ((0.5 - u) / 0.5)^2 at u = 1, 2/3, 0.4 are 0, 1/9, 0.36 and 1, 1/9,
    # 0.04.
    both = [left([wants_all, wants_less], np.array([[u]])) for u in (1.0, 2 / 3, 0.4)]
    assert both == pytest.approx([(0.5 + 1) / 2, 1 / 9, (0.2 + 0.36) / 2], abs=1e-6)
