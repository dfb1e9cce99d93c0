"""Check kernels at the sizes of the default run, where a GPU takes others than at small ones.

Metal changes its kernel for softmax and logsumexp above 4,096 columns, sorts above 2,048 numbers in
several blocks, and multiplies large matrices otherwise than small ones. The witness is numpy in
float64, on some rows of a large result. Every check returns (error, the largest error that passes).
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.checks.kernels import (
    ROUNDING,
    Check,
    Compared,
    Found,
    TypedCheck,
    check_within,
    chunked,
    exact_attention,
    exact_kl,
    exact_rms_norm,
    in_both_types,
    kl_inputs,
    random_normal,
    relative_error,
    softmax,
    to_float64,
)
from mis_mlx.maths import losses
from mis_mlx.models.architectures import modules

VOCAB = 24_576  # half of the default teacher's tokens
ALL_TOKENS = 49_152
HIDDEN = 576
TOKENS = 512
QUERY_HEADS = 9
KEY_HEADS = 3
HEAD_SIZE = 64
SEEN = 32  # rows of a large result that numpy makes, too


def _sampled_tokens() -> np.ndarray:
    """SEEN token ids, spread evenly over the vocabulary."""
    return np.linspace(0, VOCAB - 1, SEEN).astype(int)


def softmax_of_a_vocabulary() -> Found:
    """Check softmax and logsumexp over 24,576 and 49,152 columns, in float32 as all losses use."""
    outputs = list[mx.array]()
    expected = list[np.ndarray]()
    for columns in (VOCAB, ALL_TOKENS):
        logits = 4 * random_normal(columns, SEEN, columns)
        probabilities, log = softmax(to_float64(logits))
        log_sums = to_float64(logits)[:, 0] - log[:, 0]
        outputs += [mx.softmax(logits, axis=-1), mx.logsumexp(logits, axis=-1)]
        expected += [probabilities, log_sums]
    # a sum of 49,152; MLX's CPU is off by 8e-5
    return relative_error(outputs, expected), 25 * ROUNDING[mx.float32]


def large_product(dtype: mx.Dtype) -> Found:
    """Check logits of 128 positions under a head (24,576, 576), in `dtype` and widened to float32.

    The error is a share of what each of the two may be off."""
    hidden = random_normal(0, 128, HIDDEN, dtype=dtype)
    head = random_normal(1, VOCAB, HIDDEN, dtype=dtype)
    expected = to_float64(hidden[:SEEN]) @ to_float64(head).T
    plain = (hidden @ head.T)[:SEEN]
    widened = losses.wide_product(hidden, head)[:SEEN]
    plain_share = relative_error(plain, expected) / ROUNDING[dtype]
    widened_share = relative_error(widened, expected) / ROUNDING[mx.float32]
    return max(plain_share, widened_share), 1.0


@check_within(1)
def head_gradient(dtype: mx.Dtype) -> Compared:
    """Check the gradient of a head, added by `addmm`.

    A transposed (128, 24,576) times (128, 576) is added to (24,576, 576)."""
    gradient = random_normal(0, 128, VOCAB, dtype=dtype)
    hidden = random_normal(1, 128, HIDDEN, dtype=dtype)
    before = random_normal(2, VOCAB, HIDDEN, dtype=dtype)
    rows = _sampled_tokens()
    expected = to_float64(before)[rows] + to_float64(gradient)[:, rows].T @ to_float64(hidden)
    total = mx.addmm(before, gradient.T, hidden)
    return total[mx.array(rows)], expected


@check_within(1)
def long_attention(dtype: mx.Dtype) -> Compared:
    """Check causal attention of 9 query heads over 3 key heads at 512 tokens.

    Both kernels are checked: the fused one, and the one that training uses, of which MLX takes
    gradients."""
    query_shape = (1, QUERY_HEADS, TOKENS, HEAD_SIZE)
    key_shape = (1, KEY_HEADS, TOKENS, HEAD_SIZE)
    queries = random_normal(0, *query_shape, dtype=dtype)
    keys = random_normal(1, *key_shape, dtype=dtype)
    values = random_normal(2, *key_shape, dtype=dtype)
    expected = exact_attention(queries, keys, values)
    attend = partial(mx.fast.scaled_dot_product_attention, scale=1 / 8, mask="causal")
    (trained,), _ = mx.vjp(attend, [queries, keys, values], [mx.ones_like(queries)])
    fused = attend(queries, keys, values)
    return [fused, trained], [expected, expected]


@check_within(5)
def chunked_losses(dtype: mx.Dtype) -> Compared:
    """Check the KL of a whole vocabulary in chunks, and its gradients in states and head."""
    inputs = kl_inputs(dtype, positions=48, width=HIDDEN, vocab=VOCAB, divisor=24)
    teacher_logits = partial(losses.wide_product, head=inputs[-1])
    value, states_grad, head_grad = chunked(inputs, teacher_logits, rows=20)
    rows = _sampled_tokens()
    sampled = head_grad[mx.array(rows)]
    return [value, states_grad, sampled], exact_kl(inputs, rows)


def sorting() -> Found:
    """Check sorting of 49,152 numbers a row: values, their order, and the 1,024 largest.

    The error is the share of numbers that are wrong; none may be."""
    x = random_normal(0, 4, ALL_TOKENS)
    exact = np.sort(np.array(x), axis=1)
    order = mx.argsort(x, axis=-1)
    ordered = mx.take_along_axis(x, order, axis=-1)
    largest = mx.sort(mx.topk(x, 1024, axis=-1), axis=-1)
    wrong = [
        np.array(mx.sort(x, axis=-1)) != exact,
        np.array(ordered) != exact,
        np.array(largest) != exact[:, -1024:],
    ]
    return float(max(differs.mean() for differs in wrong)), 0.0


@check_within(2)  # sums of 576
def packed_matrix(dtype: mx.Dtype) -> Compared:
    """Check products with a 4-bit matrix (4,608, 576), of 40 rows and of one."""
    x = random_normal(0, 40, HIDDEN, dtype=dtype)
    layer = nn.Linear(HIDDEN, 8 * HIDDEN, bias=False)
    layer.weight = random_normal(1, 8 * HIDDEN, HIDDEN, dtype=dtype)
    layer = layer.to_quantized(64, 4)
    outputs = [layer(x)[:SEEN], layer(x[:1])]
    expected = to_float64(x[:SEEN]) @ to_float64(modules.dense_weight(layer)).T
    return outputs, [expected, expected[:1]]


@check_within(1)
def wide_norm(dtype: mx.Dtype) -> Compared:
    """Check RMSNorm over 576 and 8,192 columns."""
    outputs = list[mx.array]()
    expected = list[np.ndarray]()
    for columns in (HIDDEN, 8192):
        x = 3 * random_normal(columns, SEEN, columns, dtype=dtype)
        weight = random_normal(1, columns, dtype=dtype)
        outputs.append(mx.fast.rms_norm(x, weight, 1e-5))
        expected.append(exact_rms_norm(x, weight))
    return outputs, expected


BY_TYPE: dict[str, TypedCheck] = {
    "logits, 128 x 24,576": large_product,
    "gradient of a head, 24,576 x 576": head_gradient,
    "attention, 512 tokens": long_attention,
    "KL of 24,576 tokens, gradients": chunked_losses,
    "packed products, 4,608 x 576": packed_matrix,
    "RMSNorm of 576 and 8,192": wide_norm,
}
CHECKS: dict[str, Check] = {
    **in_both_types(BY_TYPE),
    "softmax of 24,576 and 49,152": softmax_of_a_vocabulary,
    "sorting 49,152, errors": sorting,
}
