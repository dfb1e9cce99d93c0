"""Kernels at the sizes of the default run, where a GPU takes others than at small ones: (found, the
most allowed).

Metal changes its kernel for softmax and logsumexp above 4,096 columns, sorts above 2,048 numbers in
several blocks, and multiplies large matrices otherwise than small ones. Witness: numpy in float64,
of some rows of a large result.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.checks.kernels import ROUNDING, Found, drawn, off, softmax, wide
from mis_mlx.maths import losses
from mis_mlx.models import load

VOCAB = 24_576  # half of the default teacher's tokens
ALL_TOKENS = 49_152
HIDDEN = 576
TOKENS = 512
QUERY_HEADS = 9
KEY_HEADS = 3
HEAD_SIZE = 64
SEEN = 32  # rows of a large result that numpy makes, too


def softmax_of_a_vocabulary() -> Found:
    """softmax and logsumexp over 24,576 and 49,152 columns, in float32, as all losses take them."""
    found = list[mx.array]()
    want = list[np.ndarray]()
    for columns in (VOCAB, ALL_TOKENS):
        z = 4 * drawn(columns, SEEN, columns)
        exact, log = softmax(wide(z))
        found += [mx.softmax(z, axis=-1), mx.logsumexp(z, axis=-1)]
        want += [exact, wide(z)[:, 0] - log[:, 0]]
    return off(found, want), 25 * ROUNDING[mx.float32]  # a sum of 49,152; MLX's CPU is off by 8e-5


def large_product(dtype: mx.Dtype) -> Found:
    """Logits of 128 positions: a head (24,576, 576), not widened and widened."""
    hidden = drawn(0, 128, HIDDEN, dtype=dtype)
    head = drawn(1, VOCAB, HIDDEN, dtype=dtype)
    want = wide(hidden[:SEEN]) @ wide(head).T
    plain = off((hidden @ head.T)[:SEEN], want) / ROUNDING[dtype]
    widened = off(losses.wide_product(hidden, head)[:SEEN], want) / ROUNDING[mx.float32]
    return max(plain, widened), 1.0  # shares of what each may be off


def head_gradient(dtype: mx.Dtype) -> Found:
    """A transposed (128, 24,576) times (128, 576), added to (24,576, 576): the gradient of a head,
    by `addmm`.
    """
    gradient = drawn(0, 128, VOCAB, dtype=dtype)
    hidden = drawn(1, 128, HIDDEN, dtype=dtype)
    before = drawn(2, VOCAB, HIDDEN, dtype=dtype)
    rows = np.linspace(0, VOCAB - 1, SEEN).astype(int)
    want = wide(before)[rows] + wide(gradient)[:, rows].T @ wide(hidden)
    found = mx.addmm(before, gradient.T, hidden)
    return off(found[mx.array(rows)], want), ROUNDING[dtype]


def long_attention(dtype: mx.Dtype) -> Found:
    """Causal attention of 9 heads over 3 at 512 tokens: fused, and as training computes it, of
    which MLX takes gradients.
    """
    sizes = (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    q, k, v = (
        drawn(seed, 1, heads, TOKENS, HEAD_SIZE, dtype=dtype) for seed, heads in enumerate(sizes)
    )
    mask = np.triu(np.full((TOKENS, TOKENS), -np.inf), 1)
    each = QUERY_HEADS // KEY_HEADS
    scores = wide(q) @ np.repeat(wide(k), each, axis=1).swapaxes(-1, -2) / 8 + mask
    want = softmax(scores)[0] @ np.repeat(wide(v), each, axis=1)
    work = partial(mx.fast.scaled_dot_product_attention, scale=1 / 8, mask="causal")
    (trained,), _ = mx.vjp(work, [q, k, v], [mx.ones_like(q)])
    return off([work(q, k, v), trained], [want, want]), ROUNDING[dtype]


def chunked_losses(dtype: mx.Dtype) -> Found:
    """KL of a whole vocabulary in chunks, its gradients in states and head."""
    student = drawn(0, 48, HIDDEN, dtype=dtype)
    head = (drawn(1, VOCAB, HIDDEN) / 24).astype(dtype)
    teacher = drawn(2, 48, HIDDEN, dtype=dtype)
    theirs = (drawn(3, VOCAB, HIDDEN) / 24).astype(dtype)
    logits = partial(losses.wide_product, head=theirs)
    work = mx.value_and_grad(
        lambda h, w: losses.kl_sum(h, w, teacher, logits, mx.ones(48), rows=20), [0, 1]
    )
    value, (of_student, of_head) = work(student, head)
    p, log_p = softmax(wide(teacher) @ wide(theirs).T)
    q, log_q = softmax(wide(student) @ wide(head).T)
    rows = np.linspace(0, VOCAB - 1, SEEN).astype(int)
    want = [np.sum(p * (log_p - log_q)), (q - p) @ wide(head), (q - p)[:, rows].T @ wide(student)]
    return off([value, of_student, of_head[mx.array(rows)]], want), 5 * ROUNDING[dtype]


def sorting() -> Found:
    """Sorted values and their order, 49,152 to a row; the 1,024 largest. A share of them that is
    wrong.
    """
    x = drawn(0, 4, ALL_TOKENS)
    exact = np.sort(np.array(x), axis=1)
    order = mx.argsort(x, axis=-1)
    top = mx.sort(mx.topk(x, 1024, axis=-1), axis=-1)
    wrong = [
        np.array(mx.sort(x, axis=-1)) != exact,
        np.array(mx.take_along_axis(x, order, axis=-1)) != exact,
        np.array(top) != exact[:, -1024:],
    ]
    return float(max(each.mean() for each in wrong)), 0.0


def packed_matrix(dtype: mx.Dtype) -> Found:
    """Products with a 4-bit matrix (4,608, 576), of 40 rows and of one."""
    x = drawn(0, 40, HIDDEN, dtype=dtype)
    layer = nn.Linear(HIDDEN, 8 * HIDDEN, bias=False)
    layer.weight = drawn(1, 8 * HIDDEN, HIDDEN, dtype=dtype)
    layer = layer.to_quantized(64, 4)
    want = wide(x[:SEEN]) @ wide(load.dense_weight(layer)).T
    # sums of 576
    return off([layer(x)[:SEEN], layer(x[:1])], [want, want[:1]]), 2 * ROUNDING[dtype]


def wide_norm(dtype: mx.Dtype) -> Found:
    """RMSNorm over 576 and 8,192 columns."""
    found = list[mx.array]()
    want = list[np.ndarray]()
    for columns in (HIDDEN, 8192):
        x = 3 * drawn(columns, SEEN, columns, dtype=dtype)
        w = drawn(1, columns, dtype=dtype)
        mean = np.square(wide(x)).mean(axis=-1, keepdims=True)
        found.append(mx.fast.rms_norm(x, w, 1e-5))
        want.append(wide(x) / np.sqrt(mean + 1e-5) * wide(w))
    return off(found, want), ROUNDING[dtype]


BY_TYPE: dict[str, Callable[[mx.Dtype], Found]] = {
    "logits, 128 x 24,576": large_product,
    "gradient of a head, 24,576 x 576": head_gradient,
    "attention, 512 tokens": long_attention,
    "KL of 24,576 tokens, gradients": chunked_losses,
    "packed products, 4,608 x 576": packed_matrix,
    "RMSNorm of 576 and 8,192": wide_norm,
}
TYPES = {"float32": mx.float32, "float16": mx.float16}
CHECKS: dict[str, Callable[[], Found]] = {
    **{
        f"{name}, {kind}": partial(work, dtype)
        for kind, dtype in TYPES.items()
        for name, work in BY_TYPE.items()
    },
    "softmax of 24,576 and 49,152": softmax_of_a_vocabulary,
    "sorting 49,152, wrong": sorting,
}
