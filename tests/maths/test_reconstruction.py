"""Least squares on streamed sums, against numpy's lstsq in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import reconstruction
from mis_mlx.maths.reconstruction import HeldOut, NormalEquations, remaining_error

F = 7
D = 4
N = 90


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (N, F), missing outputs (N, D), weights (N,)."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(N, F)).astype(np.float32)
    missing = rng.normal(size=(N, D)).astype(np.float32)
    weights = rng.uniform(0.2, 3.0, N).astype(np.float32)
    return inputs, missing, weights


def sums(
    inputs: np.ndarray, missing: np.ndarray, weights: np.ndarray, parts: int = 3
) -> NormalEquations:
    """The sums of all tokens, added in parts."""
    made = NormalEquations(F, D)
    for at in np.array_split(np.arange(len(inputs)), parts):
        part = mx.array(inputs[at])
        products = made.products(part, mx.array(missing[at]), mx.array(weights[at]))
        made.add(*products)
    return made


def judging(inputs: np.ndarray, missing: np.ndarray, weights: np.ndarray, kind: int = 0) -> HeldOut:
    """These tokens, as they judge a fit."""
    return HeldOut.of(mx.array(inputs), mx.array(missing), mx.array(weights), kind)


def weighted(
    inputs: np.ndarray, missing: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, missing outputs), every token times its weight, in float64."""
    wide = weights[:, None].astype(np.float64)
    return inputs * wide, missing * wide


def test_against_lstsq() -> None:
    """Noise too: the weighted least squares solution, and the share of the error it leaves."""
    tokens = draw()
    inputs, missing = weighted(*tokens)
    wanted, *_ = np.linalg.lstsq(inputs, missing, rcond=None)
    error = np.square(missing - inputs @ wanted).sum()
    share = error / np.square(missing).sum()

    update = sums(*tokens).update(0.0)
    remaining = remaining_error([judging(*tokens)], update)

    np.testing.assert_allclose(update, wanted.T, atol=1e-5)
    assert remaining == pytest.approx(share, abs=1e-6)
    assert 0 < remaining < 1


def test_the_ridge_is_the_documented_one() -> None:
    """lstsq with sqrt(ridge * mean(diag G)) rows added below gives the same U."""
    tokens = draw(1)
    inputs, missing = weighted(*tokens)
    gram = inputs.T @ inputs
    extra = np.sqrt(0.3 * np.trace(gram) / F) * np.eye(F)
    damped = np.vstack([inputs, extra])
    goals = np.vstack([missing, np.zeros((F, D))])
    wanted, *_ = np.linalg.lstsq(damped, goals, rcond=None)

    update = sums(*tokens).update(0.3)

    np.testing.assert_allclose(update, wanted.T, atol=1e-5)


def test_wide_layers_are_solved_in_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 beyond `WIDE` inputs: the update of float64 to its precision, and the same share of
    the error.
    """
    fit = sums(*draw())
    wanted = fit.update(0.1)
    monkeypatch.setattr(reconstruction, "WIDE", F - 1)
    wide = sums(*draw())
    tokens = [judging(*draw())]

    update = wide.update(0.1)

    for array in (wide.gram, wide.cross, update):
        assert array.dtype == np.float32
    assert fit.gram.dtype != np.float32
    np.testing.assert_allclose(update, wanted, atol=1e-5)
    assert remaining_error(tokens, update) == pytest.approx(
        remaining_error(tokens, wanted), abs=1e-5
    )


def test_parts_merge_in_any_order() -> None:
    """One batch or five, forwards or backwards: the same update (float32 products, float64
    sums).
    """
    tokens = draw(2)
    reversed_tokens = [array[::-1] for array in tokens]

    one = sums(*tokens, parts=1).update(0.1)
    forwards = sums(*tokens, parts=5).update(0.1)
    backwards = sums(*reversed_tokens, parts=5).update(0.1)

    np.testing.assert_allclose(forwards, one, atol=1e-6)
    np.testing.assert_allclose(backwards, one, atol=1e-6)


def test_a_direction_never_seen_stays() -> None:
    """Input 3 is always 0: its column of the update is exactly 0 with a ridge, and nothing is left
    undefined.
    """
    inputs, missing, weights = draw(3)
    inputs[:, 3] = 0

    update = sums(inputs, missing, weights).update(0.1)

    assert (update[:, 3] == 0).all()
    assert np.isfinite(update).all()


def test_nothing_missing_nothing_changed() -> None:
    """r = 0: zero update, and the error that remains is called 1, not 0/0."""
    inputs, missing, weights = draw()
    nothing = 0 * missing

    update = sums(inputs, nothing, weights).update(0.1)

    assert (update == 0).all()
    assert remaining_error([judging(inputs, nothing, weights)], update) == 1.0


def test_the_ridge_is_the_one_that_leaves_least_held_out() -> None:
    """Of four by numpy, tried on tokens that no solution saw; the update is then that of all
    tokens.
    """
    inputs, noise, weights = draw(4)
    slope = np.linspace(-0.5, 0.5, F * D).reshape(F, D)
    missing = (inputs @ slope + noise).astype(np.float32)  # something to be learned, and noise
    wide_inputs, wide_missing = weighted(inputs, missing, weights)
    ridges = (1e-3, 0.1, 1.0, 1e3)
    seen = np.s_[:12]
    judge = np.s_[12:40]

    def by_hand(ridge: float, at: slice) -> np.ndarray:
        rows = wide_inputs[at]
        gram = rows.T @ rows
        damped = gram + ridge * np.trace(gram) / F * np.eye(F)
        cross = rows.T @ wide_missing[at]
        return np.asarray(np.linalg.solve(damped, cross))

    def left_by_hand(update: np.ndarray) -> float:
        goal = wide_missing[judge]
        error = np.square(goal - wide_inputs[judge] @ update).sum()
        return float(error / np.square(goal).sum())

    shares = [left_by_hand(by_hand(ridge, seen)) for ridge in ridges]
    best = int(np.argmin(shares))
    assert 0 < best < len(ridges) - 1
    assert shares[best] < 1 < shares[0]
    wanted = by_hand(ridges[best], np.s_[:40])

    fit = sums(inputs[seen], missing[seen], weights[seen])
    held_out = judging(inputs[judge], missing[judge], weights[judge])
    update, remaining = fit.best_update([held_out], ridges)

    assert remaining == pytest.approx(shares[best], abs=1e-6)
    np.testing.assert_allclose(update, wanted.T, atol=1e-5)


def test_noise_is_not_learned() -> None:
    """Nothing to be learned, fewer tokens than inputs: no update, and 1 is left."""
    inputs, missing, weights = draw(5)
    few = (inputs[:5], missing[:5], weights[:5])
    fit = sums(*few)
    judge = judging(inputs[5:], -missing[5:], weights[5:])
    by_heart = remaining_error([judging(*few)], fit.update(0.1))

    update, held_out = fit.best_update([judge], (0.1, 1.0))

    assert by_heart < 0.9
    assert held_out == 1.0
    assert not update.any()


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

    both = remaining_error([first, second], update)

    assert remaining_error([first], update) == pytest.approx(1 / 4)
    assert remaining_error([second], update) == pytest.approx(9 / 4)
    assert both == pytest.approx(7 / 4)
    assert remaining_error([second, first], update) == both
    assert remaining_error([*halves, many], update) == pytest.approx(7 / 4)


def test_a_kind_without_an_error_is_left_as_it_is() -> None:
    """Nothing is missing there: 1, as where nothing is done; the other kind's quarter makes (5/8 +
    1) / 2.
    """
    update = np.array([[0.5]])
    quarter = ones([[2.0]], [[2.0]], kind=0)
    whole = ones([[0.0]], [[0.0]], kind=1)

    assert remaining_error([quarter, whole], update) == pytest.approx(13 / 16)


def test_weights_count_in_what_is_left() -> None:
    """By pencil: of weight 3 a token's 4 and 1 are 36 and 9; with a lost one of weight 1, 10 of 37
    are left.
    """
    inputs = mx.array([[2.0], [0.0]])
    missing = mx.array([[2.0], [1.0]])
    tokens = HeldOut.of(inputs, missing, mx.array([3.0, 1.0]))

    assert remaining_error([tokens], np.array([[0.5]])) == pytest.approx(10 / 37)


def test_what_serves_one_kind_and_spoils_the_other_is_not_chosen() -> None:
    """Nine tokens of ten want +1, a second kind wants -1. Every ridge leaves less of all tokens
    together; of the kinds, each counted alike, none does: nothing is changed.
    """
    rng = np.random.default_rng(6)
    often = rng.normal(size=(90, 2)).astype(np.float32)
    seldom = rng.normal(size=(10, 2)).astype(np.float32)
    weight = np.ones(90, np.float32)

    wanted = often[:, :1]

    def fitted() -> NormalEquations:
        equations = NormalEquations(2, 1)
        products = equations.products(mx.array(often), mx.array(wanted), mx.ones(90))
        equations.add(*products)
        return equations

    most = judging(often, wanted, weight, kind=0)
    few = judging(seldom, -seldom[:, :1], weight[:10], kind=0)
    few_of_another_kind = few._replace(kind=1)

    one_kind, left_of_one = fitted().best_update([most, few])
    spoiled, left_of_spoiled = fitted().best_update([most, few_of_another_kind])

    assert one_kind[0, 0] > 0.3
    assert left_of_one < 1
    assert not spoiled.any()
    assert left_of_spoiled == 1.0


def test_the_ridge_is_the_one_for_both_kinds() -> None:
    """One input of mean square 1 that the fit answers with 1 / (1 + ridge). One kind wants 1, the
    other 1/2. Alone, each has the ridge nearest to that; together the worse one counts most, and
    neither of these is taken.
    """
    fit = NormalEquations(1, 1)
    products = fit.products(mx.ones((8, 1)), mx.ones((8, 1)), mx.ones(8))
    fit.add(*products)
    ridges = (1e-6, 0.5, 1.5)  # updates of 1, 2/3 and 0.4
    wants_all = ones([[1.0]], [[1.0]], kind=0)
    wants_less = ones([[1.0]], [[0.5]], kind=1)

    chosen = list[float]()
    for held_out in ([wants_all], [wants_less], [wants_all, wants_less]):
        shares = [remaining_error(held_out, fit.update(ridge)) for ridge in ridges]
        update, least = fit.best_update(held_out, ridges, with_held_out=False)
        assert least == pytest.approx(min(shares), abs=1e-6)
        chosen.append(round(float(update[0, 0]), 3))

    assert chosen == [1.0, 0.4, 0.667]
    # By pencil: (1 - u)^2 and ((0.5 - u) / 0.5)^2 at u = 1, 2/3, 0.4 are 0, 1/9, 0.36 and 1, 1/9,
    # 0.04.
    both = [remaining_error([wants_all, wants_less], np.array([[u]])) for u in (1.0, 2 / 3, 0.4)]
    assert both == pytest.approx([(0.5 + 1) / 2, 1 / 9, (0.2 + 0.36) / 2], abs=1e-6)
