"""The gated delta rule of Qwen 3.5's blocks, in chunks, with a gradient of little memory.

mlx-lm goes token by token: S_t = g_t S_{t-1} + u_t k_t^T with u_t = b_t (v_t - g_t S_{t-1} k_t),
and y_t = S_t q_t. Its kernel for Metal has no gradient, and its fallback keeps a state of every
token. Here 64 tokens are computed together (arXiv 2412.06464), which needs the state of every 64th
token alone, and a chunk is computed again on the way back. Axes: B texts, T tokens, H value heads,
K and V channels of a key and a value, C tokens of a chunk.
"""

from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

CHUNK = 64
BASE = 8  # tokens whose triangular system is inverted by a short product


def _inverse_of_small(strict: mx.array) -> mx.array:
    """(I + L)^-1 for strictly lower triangular L (..., 8, 8): (I - L)(I + L^2)(I + L^4).

    L^8 is zero. In larger blocks the powers would grow, and their sum lose digits.
    """
    identity = mx.eye(BASE)
    second = strict @ strict
    fourth = second @ second
    return (identity - strict) @ (identity + second) @ (identity + fourth)


def unit_lower_inverse(strict: mx.array) -> mx.array:
    """(I + L)^-1 for strictly lower triangular L (..., C, C); C is 8 times a power of two.

    Pairs of neighbouring diagonal blocks become one: the part below is -L22^-1 L21 L11^-1.
    """
    count = strict.shape[-1] // BASE
    squares = [_square(strict, i, i, BASE) for i in range(count)]
    inverses = _inverse_of_small(mx.stack(squares, axis=-3))
    size = BASE
    while size < strict.shape[-1]:
        pairs = strict.shape[-1] // (2 * size)
        below = mx.stack([_square(strict, 2 * i + 1, 2 * i, size) for i in range(pairs)], axis=-3)
        first = inverses[..., 0::2, :, :]
        second = inverses[..., 1::2, :, :]
        corner = -(second @ below @ first)
        upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        lower = mx.concatenate([corner, second], axis=-1)
        inverses = mx.concatenate([upper, lower], axis=-2)
        size *= 2
    return inverses[..., 0, :, :]


def _square(matrix: mx.array, row: int, column: int, size: int) -> mx.array:
    """The block of this size at (row, column) of blocks."""
    rows = slice(row * size, (row + 1) * size)
    columns = slice(column * size, (column + 1) * size)
    return matrix[..., rows, columns]


def _chunk(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """(y (B, H, C, V), the state behind the chunk) of a chunk.

    q, k (B, H, C, K), v (B, H, C, V), log_g and beta (B, H, C), state (B, H, V, K); float32.
    """
    size = q.shape[2]
    total = mx.cumsum(log_g, axis=-1)  # logarithm of what is left of the state at each token
    lower = mx.tril(mx.ones((size, size), mx.bool_))
    # what is left at token i of what token j put in; later ones are cut off before exp overflows
    differences = total[..., :, None] - total[..., None, :]
    left = mx.exp(mx.where(lower, differences, -mx.inf))
    products = (k @ k.swapaxes(-1, -2)) * left * beta[..., None]
    inverse = unit_lower_inverse(mx.tril(products, -1))
    decay = mx.exp(total)[..., None]
    known = (decay * k) @ state.swapaxes(-1, -2)  # what the state already says
    updates = inverse @ (beta[..., None] * (v - known))
    y = (decay * q) @ state.swapaxes(-1, -2)
    y = y + ((q @ k.swapaxes(-1, -2)) * left) @ updates
    left_at_end = mx.exp(total[..., -1:] - total)[..., None]
    after = decay[..., -1:, :] * state + updates.swapaxes(-1, -2) @ (left_at_end * k)
    return y, after


_again = mx.checkpoint(
    _chunk
)  # keeps a chunk's inputs, and computes the rest again on the way back


def _step(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """`_chunk` of one token."""
    decayed = mx.exp(log_g)[..., None] * state
    known = k @ decayed.swapaxes(-1, -2)
    update = beta[..., None] * (v - known)
    after = decayed + update.swapaxes(-1, -2) @ k
    return q @ after.swapaxes(-1, -2), after


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """(y (B, T, H, V), the last state (B, H, V, K)), in float32.

    q, k (B, T, H, K), v (B, T, H, V), log_g and beta (B, T, H). state: before the first token;
    default: zeros. A token of beta 0 and log_g 0 leaves the state as it is.
    """
    batch, length, heads, width = q.shape
    arrays = [array.astype(mx.float32).swapaxes(1, 2) for array in (q, k, v, log_g, beta)]
    if state is None:
        state = mx.zeros((batch, heads, v.shape[-1], width), mx.float32)
    state = state.astype(mx.float32)
    if length == 1:
        given: Any = [*arrays, state]
        y, state = _step(*given)
        return y.swapaxes(1, 2), state
    parts = []
    for start in range(0, length, CHUNK):
        count = min(CHUNK, length - start)
        size = BASE
        while size < count:
            size *= 2
        pieces: Any = [_padded(array[:, :, start : start + count], size) for array in arrays]
        y, state = _again(*pieces, state)
        parts.append(y[:, :, :count])
    return mx.concatenate(parts, axis=2).swapaxes(1, 2), state


def _padded(array: mx.array, size: int) -> mx.array:
    """(B, H, n, ...) with zeros behind, to `size` tokens."""
    missing = size - array.shape[2]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[2] = (0, missing)
    return mx.pad(array, widths)


def convolved(rows: mx.array, kernel: mx.array, length: int) -> mx.array:
    """A causal convolution of each channel: the last `length` of rows (B, n, D); kernel (D, w).

    Before those rows stand the w - 1 that the first of them sees.
    """
    width = kernel.shape[1]
    total = rows[:, :length] * kernel[:, 0]
    for shift in range(1, width):
        total = total + rows[:, shift : shift + length] * kernel[:, shift]
    return total


def remember(cache: Any, rows: mx.array, reach: int) -> None:
    """Put the last `reach` of the rows (B, n, D) into mlx-lm's cache.

    A batch whose texts end at different places has their lengths in it.
    """
    new = rows.shape[1] - reach
    if cache.lengths is None:
        cache[0] = mx.contiguous(rows[:, new:])
        return
    ends = mx.clip(cache.lengths, 0, new)
    places = ends[:, None] + mx.arange(reach)
    cache[0] = mx.take_along_axis(rows, places[..., None], axis=1)


@cache
def _layer(module: ModuleType) -> Any:
    """mlx-lm's layer of this module, with the rule in chunks."""
    rule = module.normalize_qk

    class DeltaNet(module.GatedDeltaNet):  # type: ignore[misc, name-defined]
        """mlx-lm's weights, and its function: (B, T, D) -> (B, T, D)."""

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            """mask: (B, T), false for padding; None: there is none. cache: an ArraysCache(2)."""
            batch, length, _ = x.shape
            joined = self.in_proj_qkv(x)
            if mask is not None:
                joined = mx.where(mask[..., None], joined, 0)
            reach = self.conv_kernel_size - 1
            earlier = None if cache is None else cache[0]
            if earlier is None:
                earlier = mx.zeros((batch, reach, self.conv_dim), joined.dtype)
            rows = mx.concatenate([earlier, joined], axis=1)
            mixed = nn.silu(convolved(rows, self.conv1d.weight[..., 0], length))
            q, k, v = mx.split(mixed, [self.key_dim, 2 * self.key_dim], axis=-1)
            by_head = (-1, self.head_k_dim)
            q, k = rule(
                mx.unflatten(q, -1, by_head),
                mx.unflatten(k, -1, by_head),
                inv_scale=self.head_k_dim**-0.5,
                eps=1e-6,
            )
            repeats = self.num_v_heads // self.num_k_heads
            if repeats > 1:
                q = mx.repeat(q, repeats, axis=2)
                k = mx.repeat(k, repeats, axis=2)
            beta, log_g = self._gates(x, mask)
            y, state = delta_rule(
                q,
                k,
                mx.unflatten(v, -1, (-1, self.head_v_dim)),
                log_g,
                beta,
                None if cache is None else cache[1],
            )
            if cache is not None:
                remember(cache, rows, reach)
                cache[1] = state
                cache.advance(length)
            z = mx.unflatten(self.in_proj_z(x), -1, (-1, self.head_v_dim))
            out = self.norm(y.astype(x.dtype), z)
            return self.out_proj(mx.flatten(out, 2))  # type: ignore[no-any-return]

        def _gates(self, x: mx.array, mask: Any) -> tuple[mx.array, mx.array]:
            """(what each head learns of a token, the logarithm of what it keeps): (B, T, H)."""
            beta = mx.sigmoid(self.in_proj_b(x))
            rate = mx.exp(self.A_log.astype(mx.float32))
            log_g = -rate * nn.softplus(self.in_proj_a(x) + self.dt_bias)
            if mask is not None:
                beta = mx.where(mask[..., None], beta, 0)
                log_g = mx.where(mask[..., None], log_g, 0)
            return beta, log_g

    return DeltaNet


def block(module: ModuleType, args: Any, i: int) -> nn.Module:
    """Block i of mlx-lm, of random weights. module: mlx_lm.models.qwen3_5."""
    made: nn.Module = module.DecoderLayer(args, layer_idx=i)
    if made.is_linear:
        made.linear_attn = _layer(module)(args)
    return made
