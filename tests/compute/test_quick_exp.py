"""Attention and SiLU by a quicker exponential: as exact as MLX's, forward and back."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.compute import quick_exp
from mis_mlx.models.architectures.stock import mlx_lm
from tests import peaks

SCALE = 0.25


def reference(queries, keys, values, mask):
    """Attention in float64 by numpy. mask: (L, S) or (B, 1, L, S) booleans."""
    q, k, v = (np.array(array, np.float64) for array in (queries, keys, values))
    times = q.shape[1] // k.shape[1]
    k = np.repeat(k, times, axis=1)
    v = np.repeat(v, times, axis=1)
    scores = np.where(mask, q @ k.swapaxes(-1, -2) * SCALE, -math.inf)
    scores -= scores.max(axis=-1, keepdims=True)
    shares = np.exp(scores)
    return shares / shares.sum(axis=-1, keepdims=True) @ v


def drawn(length, places):
    """Queries of four heads, keys and values of two."""
    mx.random.seed(0)
    queries = 2 * mx.random.normal((2, 4, length, 8))
    keys = mx.random.normal((2, 2, places, 8))
    values = mx.random.normal((2, 2, places, 6))
    return queries, keys, values


@pytest.mark.parametrize(("length", "places"), [(1, 1), (5, 5), (1, 40), (130, 130), (70, 200)])
def test_causal(length, places):
    arrays = drawn(length, places)
    sees = np.tril(np.ones((length, places), bool), k=places - length)
    found = quick_exp.attention(*arrays, scale=SCALE, mask="causal")
    np.testing.assert_allclose(found, reference(*arrays, sees), atol=3e-6)


def test_masks_that_are_arrays():
    arrays = drawn(70, 70)
    rows = np.arange(70)
    sees = (rows[:, None] >= rows) & (rows[:, None] < rows + 7)
    wanted = reference(*arrays, sees)
    of_rows = np.broadcast_to(sees, (2, 1, 70, 70))
    of_heads = np.broadcast_to(sees, (2, 4, 70, 70))
    for mask in (sees, of_rows, of_heads):
        found = quick_exp.attention(*arrays, scale=SCALE, mask=mx.array(mask))
        np.testing.assert_allclose(found, wanted, atol=3e-6)
        added = mx.where(mx.array(mask), 0.0, -mx.inf)
        found = quick_exp.attention(*arrays, scale=SCALE, mask=added)
        np.testing.assert_allclose(found, wanted, atol=3e-6)


def test_one_row_of_a_mask_is_of_all_rows():
    arrays = drawn(70, 50)
    sees = np.arange(50) > 9
    found = quick_exp.attention(*arrays, scale=SCALE, mask=mx.array(sees[None]))
    np.testing.assert_allclose(found, reference(*arrays, sees[None]), atol=3e-6)


@pytest.mark.parametrize("kind", ["none", "causal", "array"])
def test_long_texts_take_no_more_memory_than_by_mlx(kind):
    """Plans count on it: scores of all rows at once would be several times as much."""
    arrays = drawn(700, 700)
    masks = {"none": None, "causal": "causal", "array": mx.tril(mx.ones((700, 700), mx.bool_))}
    mx.eval(arrays, masks["array"])

    def peak(attention):
        with peaks.of_mlx() as found:
            mx.eval(attention(*arrays, scale=SCALE, mask=masks[kind]))
        return found.nbytes

    stock = peak(mx.fast.scaled_dot_product_attention)
    assert peak(quick_exp.attention) < stock


def test_a_row_that_sees_nothing_is_a_number():
    """Texts of a batch have room in front, whose rows nobody reads; NaN would spread."""
    arrays = drawn(3, 3)
    mask = mx.array(np.tril(np.ones((3, 3), bool), k=-1))
    found = quick_exp.attention(*arrays, scale=SCALE, mask=mask)
    stock = mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask=mask)
    np.testing.assert_allclose(found, stock, atol=3e-6)


def test_gradients_are_those_of_mlx():
    arrays = drawn(100, 100)
    pull = mx.random.normal((2, 4, 100, 6))

    def ours(*arrays):
        return quick_exp.attention(*arrays, scale=SCALE, mask="causal")

    def stock(*arrays):
        return mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask="causal")

    found = mx.vjp(ours, list(arrays), [pull])[1]
    wanted = mx.vjp(stock, list(arrays), [pull])[1]
    for ours_of, stock_of in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours_of, stock_of, atol=2e-5)


def test_swiglu_and_its_gradients():
    gate = mx.linspace(-80, 80, 1001)
    x = mx.random.normal(gate.shape)
    exact = np.array(gate, np.float64) / (1 + np.exp(-np.array(gate, np.float64))) * np.array(x)
    np.testing.assert_allclose(quick_exp.swiglu(gate, x), exact, rtol=1e-5, atol=1e-30)
    found = mx.vjp(quick_exp.swiglu, [gate, x], [x])[1]
    wanted = mx.vjp(lambda gate, x: nn.silu(gate) * x, [gate, x], [x])[1]
    for ours_of, stock_of in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours_of, stock_of, atol=1e-5)


def test_exp_is_as_exact_as_mlx():
    x = mx.linspace(-80, 80, 10_001)
    exact = np.exp(np.array(x, np.float64))

    def worst(found):
        return np.abs(np.array(found, np.float64) / exact - 1).max()

    assert worst(quick_exp.exp(x)) <= worst(mx.exp(x))


def test_blocks_compute_by_it_on_a_cpu_alone(monkeypatch):
    """The policy is asked when a block computes; half precision keeps MLX's functions."""
    base = mlx_lm("models.base")
    arrays = drawn(9, 9)

    def attended(arrays):
        return base.scaled_dot_product_attention(*arrays, cache=None, scale=SCALE, mask="causal")

    def stock(arrays):
        return mx.fast.scaled_dot_product_attention(*arrays, scale=SCALE, mask="causal")

    monkeypatch.setenv("MIS_MLX_POLICY", "cpu")
    ours = quick_exp.attention(*arrays, scale=SCALE, mask="causal")
    assert mx.array_equal(attended(arrays), ours)
    half = [array.astype(mx.float16) for array in arrays]
    assert mx.array_equal(attended(half), stock(half))
    monkeypatch.setenv("MIS_MLX_POLICY", "metal")
    assert mx.array_equal(attended(arrays), stock(arrays))
    assert not mx.array_equal(ours, stock(arrays))  # else nothing was tested above
