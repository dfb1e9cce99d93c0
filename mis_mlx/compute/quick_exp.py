"""Softmax, attention and SiLU of a block on a CPU, by an exponential that is quicker than MLX's.

On x86 MLX's CPU back end computes exp number by number with six calls into the C library, 17 ns
each; there sigmoid and softmax took more of a block's time than its matrix products. Its power is
one call, 5 ns, of the same precision: exp is e to the power x here. Other last bits come of it.
What learns goes through as well. Metal, and every type but float32, keep MLX's own functions
(hottest.py at bd583ffb has the profile).
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mis_mlx.compute import precision

# Queries of attention at a time, all their scores being in memory; of causal attention, later keys
# than theirs are not looked at.
ROWS = 32
HIDDEN_SCORE = -3.4028235e38  # float32's least, as MLX hides a key: a row without keys sees all


def is_quicker(x: mx.array) -> bool:
    """Whether the functions here take the place of MLX's for an array like this one."""
    return x.dtype == mx.float32 and precision.numpy_is_quicker()


def exp(x: mx.array) -> mx.array:
    """e to x (...); lazy. To be differentiated are `softmax` and `sigmoid` alone."""
    if is_quicker(x):
        return mx.power(mx.array(math.e), x)
    return mx.exp(x)


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + exp(-x))


@_sigmoid.vjp
def _sigmoid_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * (output * (1.0 - output))


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x) of x (...) float32; lazy."""
    return _sigmoid(x)  # type: ignore[return-value]


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    shares = exp(x - x.max(axis=-1, keepdims=True))
    return shares * (1.0 / shares.sum(axis=-1, keepdims=True))


@_softmax.vjp
def _softmax_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    weighted = cotangent * output
    return weighted - output * weighted.sum(axis=-1, keepdims=True)


def softmax(x: mx.array) -> mx.array:
    """The softmax over the last axis of x (..., n) float32; lazy."""
    return _softmax(x)  # type: ignore[return-value]


def softmax_lse(z: mx.array) -> tuple[mx.array, mx.array]:
    """softmax(z) and logsumexp(z) over the last axis, for one exponential a number; lazy."""
    top = z.max(axis=-1, keepdims=True)
    shares = exp(z - top)
    total = shares.sum(axis=-1, keepdims=True)
    return shares * (1.0 / total), (top + mx.log(total))[..., 0]


def logsumexp(z: mx.array) -> mx.array:
    """logsumexp over the last axis of z (..., n): (...); lazy."""
    top = z.max(axis=-1, keepdims=True)
    return (top + mx.log(exp(z - top).sum(axis=-1, keepdims=True)))[..., 0]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU of `gate` times x, both (...) float32; lazy."""
    return gate * sigmoid(gate) * x


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """Attention (B, H, L, E) of queries (B, H, L, D) to keys (B, K, S, D), values (B, K, S, E).

    Lazy, all float32; K divides H. mask: None; "causal", of which the last query sees all keys; or
    an array that broadcasts to (B, H, L, S): True where a query sees a key, or added to scores.
    """
    batch, heads, length, width = queries.shape
    _, kinds, places, _ = keys.shape
    # Heads that share keys lie side by side: (B, K, H / K, L, D) meets (B, K, 1, D, S).
    grouped = queries.reshape(batch, kinds, heads // kinds, length, width)
    across = keys[:, :, None].swapaxes(-1, -2)
    shared = values[:, :, None]
    added = None
    if isinstance(mask, str):
        added = _later(min(ROWS, length), places)
    elif mask is not None:
        added = _added(mask, (*grouped.shape[:-1], places))
    outputs = list[mx.array]()
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        asking = grouped[..., start:stop, :]
        if outputs:  # MLX would compute the scores of many rows before it used any
            asking = mx.depends(asking, outputs[-1])
        seen = places
        if isinstance(mask, str):
            seen = places - length + stop
        scores = (asking * scale) @ across[..., :seen]
        if added is not None:
            scores = scores + _of_rows(added, start, stop, seen)
        outputs.append(softmax(scores) @ shared[..., :seen, :])
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-2)
    return joined.reshape(batch, heads, length, -1)


def _later(rows: int, columns: int) -> mx.array:
    """(rows, columns) that hides from each of the last rows the keys that come after it."""
    last = mx.arange(columns - rows, columns)
    return mx.where(mx.arange(columns) > last[:, None], HIDDEN_SCORE, 0.0)


def _of_rows(added: mx.array, start: int, stop: int, seen: int) -> mx.array:
    """What is added to the scores of these rows and their first keys.

    added: `_later`, whose end is that of any rows; or of all rows, or one for all, (B, K, ., L, S).
    """
    if added.ndim == 2:
        return added[start - stop :, added.shape[1] - seen :]
    if added.shape[-2] == 1:
        return added
    return added[..., start:stop, :]


def _added(mask: mx.array, shape: tuple[int, ...]) -> mx.array:
    """What a mask adds to scores of this shape (B, K, H / K, L, S)."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, HIDDEN_SCORE)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mx.unflatten(mask, 1, shape[1:3])


def swiglu_or(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """mlx-lm's `swiglu(gate, x)`: ours where it is quicker, else `stock`."""

    def chosen(gate: mx.array, x: mx.array) -> mx.array:
        if is_quicker(gate) and is_quicker(x):
            return swiglu(gate, x)
        return stock(gate, x)

    return chosen


def attention_or(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """mlx-lm's `scaled_dot_product_attention`: ours where it is quicker, else `stock`.

    `stock` has packed keys, and sinks.
    """

    def chosen(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        plain = sinks is None and not hasattr(cache, "bits")
        if plain and is_quicker(queries) and is_quicker(keys):
            return attention(queries, keys, values, scale=scale, mask=mask)
        return stock(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    return chosen
