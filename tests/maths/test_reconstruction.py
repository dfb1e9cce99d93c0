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


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_against_lstsq(ridge: float) -> None:
    """Weighted least squares with sqrt(ridge * mean(diag G)) rows added below, and the share of the
    error that the solution leaves.
    """
    tokens = draw()
    inputs, missing = weighted(*tokens)
    extra = np.sqrt(ridge * np.trace(inputs.T @ inputs) / F) * np.eye(F)
    goals = np.vstack([missing, np.zeros((F, D))])
    wanted, *_ = np.linalg.lstsq(np.vstack([inputs, extra]), goals, rcond=None)
    share = np.square(missing - inputs @ wanted).sum() / np.square(missing).sum()

    update = sums(*tokens).update(ridge)

    np.testing.assert_allclose(update, wanted.T, atol=1e-5)
    assert remaining_error([judging(*tokens)], update) == pytest.approx(share, abs=1e-6)
    assert 0 < share < 1


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
    one = sums(*tokens, parts=1).update(0.1)
    for some in (tokens, [array[::-1] for array in tokens]):
        np.testing.assert_allclose(sums(*some, parts=5).update(0.1), one, atol=1e-6)


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


def test_what_is_left_by_pencil() -> None:
    """An update of 1/2 takes 4 to 1 of one kind (a quarter is left), and 4 to 9 of the other (9/4).
    The mean of both is 5/4, the worse one 9/4: their middle is 7/4, whichever window of a kind
    holds its tokens, and however many. A kind that misses nothing counts 1. Of weight 3 a token's 4
    and 1 are 36 and 9; with a lost one of weight 1, 10 of 37 are left.
    """
    update = np.array([[0.5]])
    first = ones([[2.0]], [[2.0]], kind=0)
    second = ones([[2.0]], [[-2.0]], kind=7)
    halves = [ones([[1.0]], [[1.0]], kind=0) for _ in range(9)]
    many = ones([[2.0]] * 6, [[-2.0]] * 6, kind=7)
    nothing = ones([[0.0]], [[0.0]], kind=1)
    uneven = HeldOut.of(mx.array([[2.0], [0.0]]), mx.array([[2.0], [1.0]]), mx.array([3.0, 1.0]))
    for held_out, left in (
        ([first], 1 / 4),
        ([second], 9 / 4),
        ([first, second], 7 / 4),
        ([second, first], 7 / 4),
        ([*halves, many], 7 / 4),
        ([first, nothing], 13 / 16),
        ([uneven], 10 / 37),
    ):
        assert remaining_error(held_out, update) == pytest.approx(left)
