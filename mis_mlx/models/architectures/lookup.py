"""Rows of an embedding by token id, with a gradient that has the same bits at every run."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


@mx.custom_function
def rows(table: mx.array, ids: mx.array) -> mx.array:
    """table (V, D), ids (...) -> (..., D).

    The gradient is summed in a fixed order, so it has the same bits at every run. MLX's own adds
    rows up with atomic operations on a GPU, in whatever order they come.
    """
    return table[ids]


@rows.vjp
def _rows_vjp(
    primals: list[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    """The gradient (V, D) of the table, in float32 until it is cast to the table's type.

    Rows of the cotangent are sorted by id. In each turn a row adds the row `reach` behind it if
    that has the same id; reach is 1, 2, 4 ..., so a row holds the sum of 1, 2, 4 ... rows. In the
    end the first row of each id holds the id's whole sum. The others become zeros, which may be
    added to it in any order.
    """
    table, ids = primals
    count = ids.size
    flat_ids = ids.reshape(-1).astype(mx.int64)
    # Sort keys without ties, so that equal ids stay in their order.
    keys = flat_ids * count + mx.arange(count, dtype=mx.int64)
    order = mx.argsort(keys)
    sorted_ids = flat_ids[order]
    sums = cotangent.reshape(count, -1).astype(mx.float32)[order]
    reach = 1
    while reach < count:
        same_id = sorted_ids[reach:] == sorted_ids[:-reach]
        behind = mx.where(same_id[:, None], sums[reach:], 0.0)
        sums = mx.concatenate([sums[:-reach] + behind, sums[-reach:]])
        reach *= 2
    differs = sorted_ids[1:] != sorted_ids[:-1]
    is_first = mx.concatenate([mx.array([True]), differs])
    grads = mx.where(is_first[:, None], sums, 0.0).astype(table.dtype)
    return mx.zeros_like(table).at[sorted_ids].add(grads), mx.zeros_like(ids)


class Embedding(nn.Embedding):
    """nn.Embedding, ids (...) -> (..., D), with a gradient that has the same bits at every run."""

    def __call__(self, ids: mx.array) -> mx.array:
        vectors: Any = rows(self.weight, ids)
        return vectors
