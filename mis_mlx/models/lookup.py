"""Rows of an embedding by token id, with a gradient that has the same bits at every run."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


@mx.custom_function
def rows(table: mx.array, ids: mx.array) -> mx.array:
    """table (V, D), ids (...) -> (..., D). The gradient is summed in a fixed order: the same bits
    at every run, where MLX's own adds rows up with atomic operations on a GPU, in whatever order
    they come.
    """
    return table[ids]


@rows.vjp
def _rows_vjp(
    primals: list[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    """Sorted by id, every row takes in those behind it that have its id: of 1, 2, 4 ... rows after
    each turn. Then the first of each id holds the sum, and the others go on as zeros, which may be
    added to it in any order.
    """
    table, ids = primals
    flat = ids.reshape(-1).astype(mx.int64)
    n = ids.size
    # keys without ties: equal ids stay in their order
    order = mx.argsort(flat * n + mx.arange(n, dtype=mx.int64))
    flat = flat[order]
    sums = cotangent.reshape(n, -1).astype(mx.float32)[order]
    reach = 1
    while reach < n:
        same = (flat[reach:] == flat[:-reach])[:, None]
        sums = mx.concatenate([sums[:-reach] + mx.where(same, sums[reach:], 0.0), sums[-reach:]])
        reach *= 2
    first = mx.concatenate([mx.array([True]), flat[1:] != flat[:-1]])
    found = mx.where(first[:, None], sums, 0.0).astype(table.dtype)
    return mx.zeros_like(table).at[flat].add(found), mx.zeros_like(ids)


class Embedding(nn.Embedding):
    """nn.Embedding, ids (...) -> (..., D), with a gradient that has the same bits at every run."""

    def __call__(self, ids: mx.array) -> mx.array:
        found: Any = rows(self.weight, ids)
        return found
