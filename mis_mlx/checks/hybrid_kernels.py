"""Compare what hybrids compute in place of attention with numpy in float64, gradients included."""

import mlx.core as mx
import numpy as np

from mis_mlx.checks.kernels import (
    Check,
    Compared,
    check_within,
    in_both_types,
    random_normal,
    to_float64,
)
from mis_mlx.models.architectures import gated_delta, hybrid

TOKENS = 24
CHANNELS = 64
WIDTH = 3


@check_within(2)  # one rounding for what is mixed, one for the products behind it
def short_convolution(dtype: mx.Dtype) -> Compared:
    """Check the short convolution of gated inputs, and its gradients in inputs and kernel."""
    layer = hybrid.ShortConv(CHANNELS, WIDTH)
    gated = random_normal(0, 2, TOKENS, CHANNELS, dtype=dtype)
    kernel = random_normal(1, CHANNELS, WIDTH, 1, dtype=dtype)
    above = random_normal(2, 2, TOKENS, CHANNELS, dtype=dtype)

    def mixed(gated: mx.array, kernel: mx.array) -> mx.array:
        layer.conv.weight = kernel
        return layer.after(gated, None)

    outputs, grads = mx.vjp(mixed, [gated, kernel], [above])
    weights = to_float64(kernel)[..., 0]
    rows = np.pad(to_float64(gated), [(0, 0), (WIDTH - 1, 0), (0, 0)])
    later = np.pad(to_float64(above), [(0, 0), (0, WIDTH - 1), (0, 0)])
    forward = np.zeros((2, TOKENS, CHANNELS))
    at_rows = np.zeros((2, TOKENS, CHANNELS))
    at_kernel = np.zeros((CHANNELS, WIDTH))
    for k in range(WIDTH):
        shifted = rows[:, k : k + TOKENS]
        forward += shifted * weights[:, k]
        back = WIDTH - 1 - k
        at_rows += later[:, back : back + TOKENS] * weights[:, k]
        at_kernel[:, k] = (shifted * to_float64(above)).sum(axis=(0, 1))
    return [outputs[0], *grads], [forward, at_rows, at_kernel[..., None]]


def exact_delta_rule(arrays: list[np.ndarray], above: np.ndarray) -> list[np.ndarray]:
    """[y, gradients in q, k, v, log g and beta] token by token, in float64.

    q, k (T, H, K), v (T, H, V), log g and beta (T, H); above (T, H, V): cotangents of y.
    """
    q, k, v, log_g, beta = arrays
    length, heads, width = q.shape
    states = [np.zeros((heads, v.shape[-1], width))]
    updates = []
    outputs = []
    for t in range(length):
        decayed = np.exp(log_g[t])[:, None, None] * states[-1]
        lacks = v[t] - np.einsum("hvk,hk->hv", decayed, k[t])
        updates.append(lacks)
        state = decayed + np.einsum("hv,hk->hvk", beta[t][:, None] * lacks, k[t])
        states.append(state)
        outputs.append(np.einsum("hvk,hk->hv", state, q[t]))
    grads = [np.zeros_like(array) for array in arrays]
    at_state = np.zeros_like(states[0])
    for t in reversed(range(length)):
        at_state = at_state + np.einsum("hv,hk->hvk", above[t], q[t])
        grads[0][t] = np.einsum("hvk,hv->hk", states[t + 1], above[t])
        decay = np.exp(log_g[t])[:, None, None]
        decayed = decay * states[t]
        at_update = np.einsum("hvk,hk->hv", at_state, k[t])
        grads[4][t] = (at_update * updates[t]).sum(axis=-1)
        at_lack = beta[t][:, None] * at_update
        grads[2][t] = at_lack
        from_update = np.einsum("hvk,hv->hk", at_state, beta[t][:, None] * updates[t])
        grads[1][t] = from_update - np.einsum("hvk,hv->hk", decayed, at_lack)
        at_decayed = at_state - np.einsum("hv,hk->hvk", at_lack, k[t])
        grads[3][t] = (at_decayed * decayed).sum(axis=(1, 2))
        at_state = decay * at_decayed
    return [np.stack(outputs), *grads]


@check_within(5)  # sums over a chunk, and a triangular system
def delta_rule(dtype: mx.Dtype) -> Compared:
    """Check the gated delta rule over 100 tokens, a chunk and a part of one, and its gradients."""
    shape = (1, 100, 2)
    q, k, v = (random_normal(seed, *shape, 32, dtype=dtype) for seed in (0, 1, 2))
    q = q / 32
    squares = mx.square(k.astype(mx.float32)).sum(axis=-1, keepdims=True)
    k = k * mx.rsqrt(squares).astype(dtype)
    log_g = -0.1 * mx.abs(random_normal(3, *shape, dtype=dtype))
    beta = mx.sigmoid(random_normal(4, *shape, dtype=dtype))
    above = random_normal(5, *shape, 32)
    arrays = [q, k, v, log_g, beta]
    outputs, grads = mx.vjp(lambda *a: [gated_delta.delta_rule(*a)[0]], arrays, [above])
    expected = exact_delta_rule([to_float64(array[0]) for array in arrays], to_float64(above[0]))
    return [array[0] for array in (*outputs, *grads)], expected


CHECKS: dict[str, Check] = in_both_types(
    {
        "short convolution, gradients": short_convolution,
        "gated delta rule, gradients": delta_rule,
    }
)
