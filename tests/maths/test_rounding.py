"""Rounding by hand, against the paper's formula with explicit inverses, and never worse than to the
nearest value.
"""

from __future__ import annotations

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import gptq, rounding
from mis_mlx.maths.gptq import PANEL
from mis_mlx.types import MisError

KINDS = [(32, 4), (64, 4), (64, 8)]
SHARES = {3: 0.7423, 4: 0.8179, 5: 0.8232, 6: 0.8495, 8: 0.8779}  # left by fitted grids


def correlated(seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (48, size) float32 and the gram matrix of 300 inputs that go together and have a
    mean.
    """
    rng = np.random.default_rng(seed)
    apart = rng.normal(size=(300, size))
    mixing = rng.normal(size=(size, size))
    mean = rng.normal(size=size)
    inputs = apart @ mixing * 0.1 + mean
    weight = rng.normal(size=(48, size)).astype(np.float32)
    return weight, inputs.T @ inputs


def error(
    weight: np.ndarray, packed: rounding.Packed, gram: np.ndarray, group: int, bits: int
) -> float:
    """trace((W - Q) G (W - Q)^T)."""
    rounded = np.array(rounding.values(packed, group, bits), np.float64)
    left = weight - rounded
    return float((left * (left @ gram)).sum())


def by_gptq(
    weight: np.ndarray, gram: np.ndarray, group: int, bits: int, *, fit: bool = True
) -> rounding.Packed:
    """A matrix (out, in), rounded with a gram matrix that stays as it is."""
    factor = gptq.factorize(gram.copy())
    return gptq.rounded([mx.array(weight)], factor, group, bits, fit=fit)[0]


def integers(packed: mx.array, bits: int) -> np.ndarray:
    """(out, in) integers of a packed matrix, taken apart bit by bit."""
    shifts = bits * np.arange(32 // bits, dtype=np.uint32)
    shifted = np.array(packed)[..., None] >> shifts
    found = shifted & (2**bits - 1)
    return found.reshape(len(found), -1)


def test_by_hand() -> None:
    """Values 0, 1 ... 15; inputs 0 and 1 go together: 3.4 becomes 3, and what that lacks takes 5.35
    to 5.55, so to 6.

    The error is 0.4^2 + 0.65^2 - 0.4 * 0.65 = 0.3225; rounded alone it is 0.4^2 + 0.35^2 + 0.4 *
    0.35 = 0.4225.
    """
    gram = np.eye(32)
    gram[0, 1] = gram[1, 0] = 0.5
    weight = np.zeros((1, 32), np.float32)
    weight[0, :3] = (3.4, 5.35, 15.0)

    alone = rounding.nearest(mx.array(weight), 32, 4)
    made = by_gptq(weight, gram, 32, 4, fit=False)

    assert rounding.values(alone, 32, 4)[0, :3].tolist() == [3, 5, 15]
    assert rounding.values(made, 32, 4)[0, :3].tolist() == [3, 6, 15]
    assert error(weight, made, gram=gram, group=32, bits=4) == pytest.approx(0.3225, abs=1e-6)
    assert error(weight, alone, gram=gram, group=32, bits=4) == pytest.approx(0.4225, abs=1e-6)


@pytest.mark.parametrize("size", [128, 600, 1100])
@pytest.mark.parametrize(("dtype", "near"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_the_factor(size: int, dtype: type[np.floating], near: float) -> None:
    """N D N^T is the damped gram matrix, in panels too; what lies below is not read."""
    _, gram = correlated(0, size)
    damped = gram + 0.01 * np.trace(gram) / size * np.eye(size)
    upper = np.triu(gram).astype(dtype)

    factor = gptq.factorize(upper + np.tril(np.full_like(upper, np.nan), -1))

    assert factor.feedback.dtype == factor.costs.dtype == dtype
    n = np.triu(factor.feedback, 1).astype(np.float64) + np.eye(size)
    made = n @ np.diag(factor.costs.astype(np.float64)) @ n.T
    np.testing.assert_allclose(made, damped, atol=near * np.abs(damped).max())


def test_a_factor_that_needs_more_damping() -> None:
    """A matrix that is not positive definite, as float32 may leave one, gets a factor all the same;
    columns in other panels keep theirs.
    """
    gram = np.eye(700, dtype=np.float32)
    gram[0, 1] = 1.5
    factor = gptq.factorize(gram)
    assert np.isfinite(np.triu(factor.feedback)).all()
    assert (factor.costs > 0).all()
    np.testing.assert_allclose(factor.costs[-PANEL:], 1.01, rtol=1e-6)


def test_a_gram_that_no_damping_helps() -> None:
    """Sums that are not finite end in a sentence that names a flag, not in a loop."""
    gram = np.eye(4)
    gram[0, 1] = np.inf
    with pytest.raises(MisError, match="--q-method round"):
        gptq.factorize(gram)


def test_matrices_share_rows_and_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three matrices in slices of 7 rows are what each is alone."""
    weight, gram = correlated(5)
    wanted = [by_gptq(part, gram, 64, 3) for part in np.split(weight, [10, 15])]
    monkeypatch.setattr(gptq, "PART", 7 * 128)
    parts = [mx.array(part) for part in np.split(weight, [10, 15])]
    made = gptq.rounded(parts, gptq.factorize(gram.copy()), 64, 3)
    for found, one in zip(made, wanted, strict=True):
        for a, b in zip(found, one, strict=True):
            assert a.shape == b.shape and (a == b).all()


@pytest.mark.parametrize(("group", "bits"), KINDS)
@pytest.mark.parametrize(
    ("gram", "fit"),
    [
        (np.eye(128), True),
        (np.eye(128), False),
        (np.zeros((128, 128)), False),
        (np.diag(np.arange(1.0, 129)), False),
    ],
)
def test_without_correlation_it_is_plain_rounding(
    group: int, bits: int, gram: np.ndarray, fit: bool
) -> None:
    """Bit for bit: integers, scales, biases, their types; also on fitted grids, where all columns
    count alike.
    """
    weight, _ = correlated(1)
    made = by_gptq(weight, gram, group, bits, fit=fit)
    plain = (rounding.fitted if fit else rounding.nearest)(mx.array(weight), group, bits)
    for found, wanted in zip(made, plain, strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert (found == wanted).all()


def by_inverses(weight: np.ndarray, gram: np.ndarray, group: int) -> np.ndarray:
    """The same integers by the formula of Optimal Brain Surgeon, the inverse taken anew for every
    column: (out, in).
    """
    w = weight.astype(np.float64)
    size = len(gram)
    done = []
    damped = gram + 0.01 * np.trace(gram) / size * np.eye(size)
    for j in range(size):
        if j % group == 0:
            part = mx.array(w[:, j : j + group].astype(np.float32))
            _, scales, biases = mx.quantize(part, group_size=group, bits=4)
            scale = np.array(scales)[:, 0]
            bias = np.array(biases)[:, 0]
        column = w[:, j].astype(np.float32)
        chosen = np.clip(np.rint((column - bias) / scale), 0, 15)
        done.append(chosen)
        stored_scale = scale.astype(np.float16).astype(np.float64)
        stored_bias = bias.astype(np.float16).astype(np.float64)
        meant = chosen * stored_scale + stored_bias
        inverse = np.linalg.inv(damped[j:, j:])
        lacking = (w[:, j] - meant) / inverse[0, 0]
        w[:, j:] -= np.outer(lacking, inverse[0])
    return np.stack(done, axis=1)


def test_against_explicit_inverses() -> None:
    """No Cholesky factor, no blocks: every one of 48 x 128 integers is the same, in both group
    sizes.
    """
    weight, gram = correlated(3)
    for group in (32, 64):
        packed, _, _ = by_gptq(weight, gram, group, 4, fit=False)
        wanted = by_inverses(weight, gram, group)
        assert (integers(packed, 4) == wanted).all()


@pytest.mark.parametrize("bits", rounding.CANDIDATE_BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_fitted_grids_leave_less_error(group: int, bits: int) -> None:
    """Of normal weights at most 93 % of MLX's squared error, 85 % at 3 and 4 bits; never more in a
    group.

    In groups of 64 as much as when this was written: all ranges are tried, and refined twice.
    """
    weight = mx.array(np.random.default_rng(5).normal(size=(64, 256)).astype(np.float32))
    errors = []
    for packed in (
        rounding.nearest(weight, group, bits),
        rounding.fitted(weight, group, bits),
    ):
        left = weight - rounding.values(packed, group, bits)
        errors.append(np.array(mx.square(left)).reshape(64, -1, group).sum(axis=-1))
    plain, fitted = errors
    most = 0.85 if bits < 5 else 0.93
    assert fitted.sum() < most * plain.sum()
    assert (fitted <= 1.0001 * plain).all()
    share = rounding.fit_share(weight, group, bits)
    assert share == pytest.approx(fitted.sum() / plain.sum(), rel=1e-3)
    if group == 64:
        assert share == pytest.approx(SHARES[bits], abs=1e-3)


def test_fitted_integers_are_packed_as_mlx_packs_them() -> None:
    """In every number of bits the integers that MLX unpacks are those of the grid."""
    weight = mx.array(np.random.default_rng(6).normal(size=(8, 128)).astype(np.float32))
    for bits in rounding.CANDIDATE_BITS:
        packed, scales, biases = rounding.fitted(weight, 64, bits)
        levels = np.array(rounding.unpacked(packed, bits))
        scale, bias = (np.repeat(np.array(a, np.float32), 64, axis=1) for a in (scales, biases))
        assert np.abs(levels * scale + bias - np.array(weight)).max() < 3 * scale.max()
        assert levels.max() == 2**bits - 1 and levels.min() == 0
        ones = mx.ones(scales.shape)
        by_mlx = mx.dequantize(packed, ones, ones - 1, group_size=64, bits=bits)
        assert (np.array(by_mlx) == levels).all()


def test_a_group_of_equal_weights_stays_as_it_is() -> None:
    """Zeros, and one value in all places, which no range can be cut off of."""
    weight = mx.concatenate([mx.zeros((1, 64)), mx.full((1, 64), 0.75)])
    for bits in rounding.CANDIDATE_BITS:
        values = rounding.values(rounding.fitted(weight, 64, bits), 64, bits)
        assert mx.abs(values - weight).max().item() < 1e-6


def test_weights_beyond_float16_are_refused() -> None:
    """In a sentence."""
    weight = mx.full((2, 64), 70_000.0)
    with pytest.raises(MisError):
        rounding.fitted(weight, 64, 4)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_large_matrix_is_opened_where_it_stays(bits: int) -> None:
    """As `values` has it, without a second copy of it in numpy's memory."""
    packed = mx.quantize(mx.random.normal((4096, 256), key=mx.random.key(bits)), 64, bits)
    wanted = rounding.values(packed, 64, bits)
    mx.eval(wanted)
    tracemalloc.start()
    found = rounding.dequantized(packed, 64, bits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mx.array_equal(found, wanted)
    assert peak < found.nbytes // 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_stochastic_rounding_is_right_in_the_mean(dtype: mx.Dtype) -> None:
    """An eighth of the way to the next number: an eighth goes there. What fits stays, 0 too."""
    start = mx.array([1.0, -0.75, 0.0, 3e-3]).astype(dtype).astype(mx.float32)
    key = mx.random.key(3)
    assert mx.array_equal(rounding.stochastic(start, dtype, key).astype(mx.float32), start)
    spacing = mx.finfo(dtype).eps
    for factor in (1.0, -1.0):
        many = mx.full((40_000,), factor * (1.0 + spacing / 8))
        found = rounding.stochastic(many, dtype, key).astype(mx.float32)
        moved = mx.abs(found) - 1.0
        assert set(moved.tolist()) == {0.0, spacing}
        assert float(moved.mean()) == pytest.approx(spacing / 8, rel=0.05)
    assert mx.array_equal(
        rounding.stochastic(many, dtype, key), rounding.stochastic(many, dtype, key)
    )
