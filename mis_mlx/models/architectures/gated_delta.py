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
    product = identity - strict
    product = product @ (identity + second)
    return product @ (identity + fourth)


def unit_lower_inverse(strict: mx.array) -> mx.array:
    """(I + L)^-1 for strictly lower triangular L (..., C, C); C is 8 times a power of two.

    Pairs of neighbouring diagonal blocks become one: the part below is -L22^-1 L21 L11^-1.
    """
    count = strict.shape[-1] // BASE
    squares = []
    for i in range(count):
        squares.append(_square(strict, i, i, BASE))
    stacked = mx.stack(squares, axis=-3)
    inverses = _inverse_of_small(stacked)
    size = BASE
    while size < strict.shape[-1]:
        pairs = strict.shape[-1] // (2 * size)
        corners = []
        for i in range(pairs):
            row = 2 * i + 1
            column = 2 * i
            corners.append(_square(strict, row, column, size))
        below = mx.stack(corners, axis=-3)
        first = inverses[..., 0::2, :, :]
        second = inverses[..., 1::2, :, :]
        corner = -(second @ below @ first)
        zeros = mx.zeros_like(first)
        upper = mx.concatenate([first, zeros], axis=-1)
        lower = mx.concatenate([corner, second], axis=-1)
        inverses = mx.concatenate([upper, lower], axis=-2)
        size *= 2
    return inverses[..., 0, :, :]


def _square(matrix: mx.array, row: int, column: int, size: int) -> mx.array:
    """The block of this size at (row, column) of blocks."""
    top = row * size
    left = column * size
    rows = slice(top, top + size)
    columns = slice(left, left + size)
    return matrix[..., rows, columns]


def _chunk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """(y (B, H, C, V), the state behind the chunk) of a chunk.

    q, k (B, H, C, K), v (B, H, C, V), log_g and beta (B, H, C), state (B, H, V, K); float32.
    """
    size = q.shape[2]
    keys_across = k.swapaxes(-1, -2)
    state_across = state.swapaxes(-1, -2)
    # logarithm of what is left of the state at each token
    total = mx.cumsum(log_g, axis=-1)
    decay = mx.exp(total)[..., None]
    # what is left at token i of what token j put in; later ones are cut off before exp overflows
    ones = mx.ones((size, size), mx.bool_)
    lower = mx.tril(ones)
    differences = total[..., :, None] - total[..., None, :]
    visible = mx.where(lower, differences, -mx.inf)
    left = mx.exp(visible)
    # what each token learns, which depends on what the tokens before it have learned
    products = k @ keys_across
    weighted = products * left * beta[..., None]
    strict = mx.tril(weighted, -1)
    inverse = unit_lower_inverse(strict)
    decayed_keys = decay * k
    known = decayed_keys @ state_across
    lacks = beta[..., None] * (v - known)
    updates = inverse @ lacks
    # outputs: of the state before the chunk, and of what its tokens have learned
    decayed_queries = decay * q
    from_state = decayed_queries @ state_across
    scores = (q @ keys_across) * left
    y = from_state + scores @ updates
    rest = total[..., -1:] - total
    left_at_end = mx.exp(rest)[..., None]
    learned = updates.swapaxes(-1, -2) @ (left_at_end * k)
    after = decay[..., -1:, :] * state + learned
    return y, after


# keeps a chunk's inputs, and computes the rest again on the way back
_again = mx.checkpoint(_chunk)


def _step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """`_chunk` of one token."""
    kept = mx.exp(log_g)[..., None]
    decayed = kept * state
    known = k @ decayed.swapaxes(-1, -2)
    lacks = v - known
    update = beta[..., None] * lacks
    after = decayed + update.swapaxes(-1, -2) @ k
    y = q @ after.swapaxes(-1, -2)
    return y, after


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
    arrays = []
    for array in (q, k, v, log_g, beta):
        wide = array.astype(mx.float32)
        arrays.append(wide.swapaxes(1, 2))
    if state is None:
        sizes = (batch, heads, v.shape[-1], width)
        state = mx.zeros(sizes, mx.float32)
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
        pieces: Any = []
        for array in arrays:
            piece = array[:, :, start : start + count]
            pieces.append(_padded(piece, size))
        pieces.append(state)
        y, state = _again(*pieces)
        parts.append(y[:, :, :count])
    joined = mx.concatenate(parts, axis=2)
    return joined.swapaxes(1, 2), state


def _padded(array: mx.array, size: int) -> mx.array:
    """(B, H, n, ...) with zeros behind, to `size` tokens."""
    missing = size - array.shape[2]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[2] = (0, missing)
    return mx.pad(array, widths)


def behind_earlier(rows: mx.array, cache: Any, reach: int) -> mx.array:
    """(B, reach + T, D): rows (B, T, D) behind those that mlx-lm's cache has, or behind zeros.

    cache: as in `remember`; None: the text begins with these rows.
    """
    earlier = None if cache is None else cache[0]
    if earlier is None:
        batch, _, channels = rows.shape
        earlier = mx.zeros((batch, reach, channels), rows.dtype)
    return mx.concatenate([earlier, rows], axis=1)


def convolved(rows: mx.array, kernel: mx.array, length: int) -> mx.array:
    """A causal convolution of each channel: the last `length` of rows (B, n, D); kernel (D, w).

    Before those rows stand the w - 1 that the first of them sees.
    """
    width = kernel.shape[1]
    total = rows[:, :length] * kernel[:, 0]
    for shift in range(1, width):
        end = shift + length
        shifted = rows[:, shift:end]
        total = total + shifted * kernel[:, shift]
    return total


def remember(cache: Any, rows: mx.array, reach: int) -> None:
    """Put the last `reach` of the rows (B, n, D) into mlx-lm's cache."""
    cache[0] = mx.contiguous(rows[:, rows.shape[1] - reach :])


def _for_value_heads(
    layer: Any,
    module: ModuleType,
    q: mx.array,
    k: mx.array,
) -> tuple[mx.array, mx.array]:
    """Normalised queries and keys (B, T, H, K), of those of fewer heads."""
    scale = layer.head_k_dim**-0.5
    q, k = module.normalize_qk(q, k, inv_scale=scale, eps=1e-6)
    repeats = layer.num_v_heads // layer.num_k_heads
    if repeats > 1:
        q = mx.repeat(q, repeats, axis=2)
        k = mx.repeat(k, repeats, axis=2)
    return q, k


@cache
def _layer(module: ModuleType) -> Any:
    """mlx-lm's layer of this module, with the rule in chunks."""

    class DeltaNet(module.GatedDeltaNet):  # type: ignore[misc, name-defined]
        """mlx-lm's weights, and its function: (B, T, D) -> (B, T, D)."""

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            """mask: None, for no text begins behind others. cache: an ArraysCache(2)."""
            length = x.shape[1]
            joined = self.in_proj_qkv(x)
            reach = self.conv_kernel_size - 1
            rows = behind_earlier(joined, cache, reach)
            kernel = self.conv1d.weight[..., 0]
            mixed = nn.silu(convolved(rows, kernel, length))
            ends = [self.key_dim, 2 * self.key_dim]
            q, k, v = mx.split(mixed, ends, axis=-1)
            by_head = (-1, self.head_k_dim)
            q = mx.unflatten(q, -1, by_head)
            k = mx.unflatten(k, -1, by_head)
            v = mx.unflatten(v, -1, (-1, self.head_v_dim))
            q, k = _for_value_heads(self, module, q=q, k=k)
            beta, log_g = self._gates(x)
            before = None
            if cache is not None:
                before = cache[1]
            y, state = delta_rule(q, k, v, log_g=log_g, beta=beta, state=before)
            if cache is not None:
                remember(cache, rows, reach)
                cache[1] = state
            z = self.in_proj_z(x)
            z = mx.unflatten(z, -1, (-1, self.head_v_dim))
            out = self.norm(y.astype(x.dtype), z)
            flat = mx.flatten(out, 2)
            return self.out_proj(flat)  # type: ignore[no-any-return]

        def _gates(self, x: mx.array) -> tuple[mx.array, mx.array]:
            """(what each head learns of a token, the logarithm of what it keeps): (B, T, H)."""
            learned = self.in_proj_b(x)
            beta = mx.sigmoid(learned)
            wide = self.A_log.astype(mx.float32)
            rate = mx.exp(wide)
            steps = self.in_proj_a(x) + self.dt_bias
            return beta, -rate * nn.softplus(steps)

    return DeltaNet


def block(module: ModuleType, args: Any, i: int) -> nn.Module:
    """Block i of mlx-lm, of random weights. module: mlx_lm.models.qwen3_5."""
    made: nn.Module = module.DecoderLayer(args, layer_idx=i)
    if made.is_linear:
        made.linear_attn = _layer(module)(args)
    return made
