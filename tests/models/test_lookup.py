"""The gradient of an embedding, in a fixed order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.models.architectures import lookup


def slope(ids: mx.array, above: mx.array, table: mx.array) -> mx.array:
    """d sum(above * table[ids]) / d table."""

    def weighted_sum(matrix: mx.array) -> mx.array:
        found = lookup.rows(matrix, ids)
        return (found * above).sum()

    return mx.grad(weighted_sum)(table)


@pytest.mark.parametrize(
    ("shape", "vocab"), [((1,), 1), ((3, 7), 5), ((4, 64), 300), ((2, 3, 5), 5)]
)
def test_the_gradient_is_the_sum_by_id(shape: tuple[int, ...], vocab: int) -> None:
    """float64 in numpy, to 1e-6 of the largest; rows that nobody asked for get zero; the rows
    looked up are MLX's.
    """
    rng = np.random.default_rng(sum(shape))
    asked = rng.integers(0, vocab, shape)
    ids = mx.array(asked)
    above = rng.normal(size=(*shape, 6)).astype(np.float32)
    table = mx.random.normal((vocab, 6), key=mx.random.key(1))
    wanted = np.zeros((vocab, 6))
    rows = above.reshape(-1, 6).astype(np.float64)
    np.add.at(wanted, asked.reshape(-1), rows)
    unasked = np.setdiff1d(np.arange(vocab), asked)

    found = lookup.rows(table, ids)
    gradient = np.array(slope(ids, mx.array(above), table))

    assert mx.array_equal(found, table[ids])
    largest = np.abs(wanted).max()
    assert np.abs(gradient - wanted).max() <= 1e-6 * largest
    assert (gradient[unasked] == 0).all()


def test_sums_go_by_pairs() -> None:
    """2**24 + 1 + 1 + 1 in float32 is (2**24 + 1) + (1 + 1), not one after the other, which stays
    at 2**24: so the sum is not made where MLX scatters rows, in whatever order.
    """
    ids = mx.array([3, 1, 3, 3, 3])
    above = mx.array([[2.0**24], [5.0], [1.0], [1.0], [1.0]])
    table = mx.zeros((4, 1))

    gradient = slope(ids, above, table)

    assert gradient.tolist() == [[0.0], [5.0], [0.0], [2.0**24 + 2]]


def test_half_precision_is_summed_in_float32() -> None:
    """300 ones to a bfloat16 row: 300, where bfloat16 sums stop at 256."""
    ids = mx.zeros((300,), mx.int32)
    above = mx.ones((300, 2), mx.bfloat16)
    table = mx.zeros((2, 2), mx.bfloat16)

    gradient = slope(ids, above, table)

    assert gradient.dtype == mx.bfloat16
    assert gradient.tolist() == [[300.0, 300.0], [0.0, 0.0]]
