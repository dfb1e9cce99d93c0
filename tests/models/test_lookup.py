"""The gradient of an embedding, in a fixed order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.models import lookup


def slope(ids: mx.array, above: mx.array, table: mx.array) -> mx.array:
    """d sum(above * table[ids]) / d table."""
    return mx.grad(lambda t: (lookup.rows(t, ids) * above).sum())(table)


@pytest.mark.parametrize(
    ("shape", "vocab"), [((1,), 1), ((3, 7), 5), ((4, 64), 300), ((2, 3, 5), 5)]
)
def test_the_gradient_is_the_sum_by_id(shape: tuple[int, ...], vocab: int) -> None:
    """float64 in numpy, to 1e-6 of the largest; rows that nobody asked for get zero; the rows
    looked up are MLX's.
    """
    rng = np.random.default_rng(sum(shape))
    ids = rng.integers(0, vocab, shape)
    above = rng.normal(size=(*shape, 6)).astype(np.float32)
    table = mx.random.normal((vocab, 6), key=mx.random.key(1))
    assert mx.array_equal(lookup.rows(table, mx.array(ids)), table[mx.array(ids)])
    wanted = np.zeros((vocab, 6))
    np.add.at(wanted, ids.reshape(-1), above.reshape(-1, 6).astype(np.float64))
    got = np.array(slope(mx.array(ids), mx.array(above), table))
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert (got[np.setdiff1d(np.arange(vocab), ids)] == 0).all()


def test_sums_go_by_pairs() -> None:
    """2**24 + 1 + 1 + 1 in float32 is (2**24 + 1) + (1 + 1), not one after the other, which stays
    at 2**24: so the sum is not made where MLX scatters rows, in whatever order.
    """
    ids = mx.array([3, 1, 3, 3, 3])
    above = mx.array([[2.0**24], [5.0], [1.0], [1.0], [1.0]])
    assert slope(ids, above, mx.zeros((4, 1)))[:, 0].tolist() == [0.0, 5.0, 0.0, 2.0**24 + 2]


def test_the_head_may_be_the_same_matrix() -> None:
    """A tied embedding's gradient is that of the lookup and of the head together, compiled or not
    (1e-6).
    """
    table = mx.random.normal((11, 4), key=mx.random.key(2))
    ids = mx.array([[1, 5, 1], [5, 5, 10]])

    def loss(t: mx.array, look: object) -> mx.array:
        return mx.square(look(t, ids) @ t.T).sum()  # type: ignore[operator]

    want = mx.grad(lambda t: loss(t, lambda t, i: t[i]))(table)
    ours = mx.grad(lambda t: loss(t, lookup.rows))
    for made in (ours(table), mx.compile(ours)(table)):
        assert mx.abs(made - want).max().item() < 1e-6 * mx.abs(want).max().item()


def test_half_precision_is_summed_in_float32() -> None:
    """300 ones to a bfloat16 row: 300, where bfloat16 sums stop at 256."""
    ids = mx.zeros((300,), mx.int32)
    got = slope(ids, mx.ones((300, 2), mx.bfloat16), mx.zeros((2, 2), mx.bfloat16))
    assert got.dtype == mx.bfloat16 and got.tolist() == [[300.0, 300.0], [0.0, 0.0]]
