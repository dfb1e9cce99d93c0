"""Rounding by hand, against the paper's formula with explicit inverses, and never worse than to the
nearest value.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import rounding

KINDS = [(32, 4), (64, 4), (64, 8)]


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
    made = rounding.compensated(weight, gram, 32, 4)

    assert rounding.values(alone, 32, 4)[0, :3].tolist() == [3, 5, 15]
    assert rounding.values(made, 32, 4)[0, :3].tolist() == [3, 6, 15]
    assert error(weight, made, gram=gram, group=32, bits=4) == pytest.approx(0.3225, abs=1e-6)
    assert error(weight, alone, gram=gram, group=32, bits=4) == pytest.approx(0.4225, abs=1e-6)


def test_the_factor() -> None:
    """Upper triangular, and U^T U times the damped gram matrix is 1; of no inputs at all it is the
    identity.
    """
    _, gram = correlated(0)
    damped = gram + 0.01 * np.trace(gram) / 128 * np.eye(128)

    factor = rounding.inverse_factor(gram)
    of_nothing = rounding.inverse_factor(np.zeros((3, 3)))

    assert (np.tril(factor, -1) == 0).all()
    # float64, condition about 1e4
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(128), atol=1e-9)
    assert (of_nothing == np.eye(3)).all()


@pytest.mark.parametrize(("group", "bits"), KINDS)
@pytest.mark.parametrize("gram", [np.eye(128), np.zeros((128, 128)), np.diag(np.arange(1.0, 129))])
def test_without_correlation_it_is_plain_rounding(group: int, bits: int, gram: np.ndarray) -> None:
    """Bit for bit: integers, scales, biases, their types."""
    weight, _ = correlated(1)
    made = rounding.compensated(weight, gram, group, bits)
    plain = rounding.nearest(mx.array(weight), group, bits)
    for found, wanted in zip(made, plain, strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert (found == wanted).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("group", "bits"), KINDS)
def test_the_output_is_nearer_than_by_plain_rounding(seed: int, group: int, bits: int) -> None:
    """On inputs that correlate less than half of the squared error is left (0.23 to 0.31 when this
    was written).
    """
    weight, gram = correlated(seed)
    nearest = rounding.nearest(mx.array(weight), group, bits)
    compensated = rounding.compensated(weight, gram, group, bits)

    plain = error(weight, nearest, gram=gram, group=group, bits=bits)
    ours = error(weight, compensated, gram=gram, group=group, bits=bits)

    assert ours < plain / 2


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
        packed, _, _ = rounding.compensated(weight, gram, group, 4)
        wanted = by_inverses(weight, gram, group)
        assert (integers(packed, 4) == wanted).all()


@pytest.mark.parametrize(("group", "bits"), KINDS)
def test_what_is_packed_is_what_was_chosen(group: int, bits: int) -> None:
    """mx.dequantize gives integer * scale + bias to the last bit; scales and biases are float16 as
    stored.
    """
    weight, gram = correlated(4)

    made = rounding.compensated(weight, gram, group, bits)

    packed, scales, biases = made
    assert packed.dtype == mx.uint32
    assert scales.dtype == biases.dtype == mx.float16
    scale = np.repeat(np.array(scales, np.float64), group, axis=1)
    bias = np.repeat(np.array(biases, np.float64), group, axis=1)
    chosen = (integers(packed, bits) * scale + bias).astype(np.float32)
    assert (np.array(rounding.values(made, group, bits)) == chosen).all()
