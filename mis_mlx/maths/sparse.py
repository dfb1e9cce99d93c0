"""Sparse targets: tokens sampled from a teacher (unbiased), and the forward KL against them.

As in maths/losses, the student's logits exist chunk by chunk, and the pass that forms the loss forms the gradient."""

import mlx.core as mx
import numpy as np

from mis_mlx.maths.losses import softmax_lse, sum_by_chunks
from mis_mlx.types import MisError

TINY = 1e-37  # stands for 0 under a logarithm; a normal float32


def sample(logits: mx.array, count: int, seed: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` tokens for each position, drawn from softmax(logits) with replacement (arXiv 2503.16870).

    logits: (n, V), of positions number `first` and up. Returns sizes (n,): how many distinct tokens each
    position got; ids and counts (sum of sizes,): those of one position after the other, ids rising.
    counts / count is an unbiased estimate of the softmax. The draws of a position depend on its number and
    the seed alone, however positions are cut into calls: Philox is a function of a counter."""
    blocks = -(-count // 4)  # one step of Philox's counter makes four numbers
    random = np.random.Generator(np.random.Philox(key=seed, counter=first * blocks))
    drawn = []
    uniform = np.sort(random.random((len(logits), 4 * blocks))[:, :count], axis=1)
    shares = np.array(mx.softmax(logits.astype(mx.float32), axis=-1))
    if not np.isfinite(shares[:, 0]).all():  # softmax spreads one NaN over its row
        raise MisError("the teacher's logits are not numbers: it overflows in this precision, use another teacher")
    for p, u in zip(shares, uniform, strict=True):
        cdf = np.cumsum(p, dtype=np.float64)  # in float32 it would drift over a whole vocabulary
        # u < 1, but u * total may round up to the total, which no token's share exceeds.
        u = np.minimum(u * cdf[-1], np.nextafter(cdf[-1], 0.0))
        drawn.append(np.unique(np.searchsorted(cdf, u, side="right"), return_counts=True))
    ids, counts = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return np.array([len(i) for i, _ in drawn]), ids, counts


def sampled_kl_sum(
    student: mx.array,
    head: mx.array,
    ids: mx.array,
    weights: mx.array,
    learn: mx.array,
    rows: int | None = None,
    frozen_head: bool = False,
) -> mx.array:
    """Sum over positions of KL(w || softmax(z_s)) in nats, differentiable in student and head.

    student: hidden states (n, D) and head: (V, D), z_s = student @ head.T.  ids, weights: (n, m), the tokens of the
    target w and their shares, which sum to 1; entries of weight 0 fill a row up. learn: (n,), 0 leaves a position out.
    frozen_head: no gradient for the head. For w = counts / N of `sample` the gradient, p_s - w per logit, is that of
    the full KL in expectation; the value is larger by a constant, E KL(w || p_t), which no student can lower."""

    def formula(z: mx.array, ids: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        p, lse = softmax_lse(z)
        log_w = mx.log(mx.maximum(w, TINY))  # finite at 0, so that 0 log 0 is 0
        kl = (w * (log_w - mx.take_along_axis(z, ids, axis=-1) + lse[:, None])).sum(axis=-1)
        row = mx.arange(len(z))[:, None]
        return kl, (p * w.sum(axis=-1, keepdims=True)).at[row, ids].add(-w)  # adds: a filled-up id may come twice

    return sum_by_chunks(formula, student, head, (ids, weights), learn, rows, frozen_head)
