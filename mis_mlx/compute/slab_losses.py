"""The KL to sparse targets where the head is too large to be there whole: in slabs of tokens.

A head (V, D) comes in slabs (some tokens, D), twice: first for the logits of the targets and the
logsumexp over the vocabulary, then for the gradient. So neither the head nor logits (n, V) of all
tokens exist at once.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision
from mis_mlx.compute.host_losses import view
from mis_mlx.maths import losses

LOGIT_BYTES = 2**24  # of float32 logits (n, some tokens) at a time
HEAD_BYTES = 2**26  # of a float32 head (some tokens, D) at a time: few positions have few logits
Slabs = Callable[[int], Iterator[tuple[int, mx.array]]]  # tokens of a slab -> (first, (tokens, D))
# Sees of each slab its first token, the probabilities (n, tokens) and the softcap's slopes there.
Seen = Callable[[int, mx.array, mx.array | None], None]


def slab_rows(positions: int, width: int, logit_bytes: int) -> int:
    """Tokens of a slab for so many positions. width: D. logit_bytes: of their float32 logits."""
    return max(256, min(logit_bytes // (4 * positions), HEAD_BYTES // (4 * width)))


def slab_bytes(positions: int, width: int, vocab: int) -> int:
    """What a slab takes: its part of the head, as read and in float32, and logits in flight."""
    rows = min(slab_rows(positions, width, LOGIT_BYTES), vocab)
    return 4 * rows * (2 * width + 4 * positions)


def sparse_kl_gradients(
    hidden: mx.array,
    slabs: Slabs,
    loss_mask: mx.array,
    ids: mx.array,
    weights: mx.array,
    *,
    softcap: float = 0.0,
    seen: Seen = lambda start, p, slope: None,
) -> tuple[mx.array, mx.array]:
    """(the sum in nats, its gradient in hidden (n, D)) of `losses.sampled_kl_sum`, evaluated.

    The head is frozen. slabs(rows): the head, from its first token on. loss_mask: (n,). ids,
    weights: (n, m). seen: is shown every slab's probabilities, by the sums of weights.
    """
    wide = hidden.astype(mx.float32)
    rows = slab_rows(len(hidden), hidden.shape[1], LOGIT_BYTES)
    targets = np.array(ids)
    w = np.array(weights, np.float32)
    chosen, lse = _first_sweep(wide, slabs(rows), targets, softcap=softcap)
    mask = np.array(loss_mask, np.float32)
    log_w = np.log(np.maximum(w, losses.TINY))  # finite at 0, so that 0 log 0 is 0
    kl = (w * (log_w - chosen + lse[:, None])).sum(axis=1)
    loss = float(kl.astype(np.float64) @ mask)
    gradient = mx.zeros_like(wide)
    total = w.sum(axis=1)
    for start, part in slabs(rows):
        z = losses.apply_softcap(wide @ part.T, softcap)
        slope = losses.softcap_gradient(z, softcap) if softcap else None
        p = _exp(z - mx.array(lse)[:, None]) * mx.array(total)[:, None]
        seen(start, p, slope)
        row, column = np.nonzero((targets >= start) & (targets < start + len(part)))
        if len(row):
            places = mx.array(targets[row, column] - start)
            p = p.at[mx.array(row), places].add(-mx.array(w[row, column]))
        if slope is not None:
            p = p * slope
        gradient = gradient + (p * loss_mask[:, None]) @ part
        mx.eval(gradient)
    return mx.array(loss), gradient.astype(hidden.dtype)


def _first_sweep(
    hidden: mx.array, slabs: Iterator[tuple[int, mx.array]], targets: np.ndarray, *, softcap: float
) -> tuple[np.ndarray, np.ndarray]:
    """(logits of the targets (n, m), logsumexp over the vocabulary (n,))."""
    chosen = np.zeros(targets.shape, np.float32)
    lse = np.full(len(targets), -np.inf)
    for start, part in slabs:
        z = losses.apply_softcap(hidden @ part.T, softcap)
        top = z.max(axis=1)
        here = (targets >= start) & (targets < start + len(part))
        columns = mx.array(np.where(here, targets - start, 0))
        found = mx.take_along_axis(z, columns, axis=1)
        mx.eval(top, found)
        chosen = np.where(here, np.array(found), chosen)
        total = _exp(z - top[:, None]).sum(axis=1)
        lse = np.logaddexp(lse, np.array(top) + np.log(np.array(total)))
    return chosen, lse.astype(np.float32)


def _exp(z: mx.array) -> mx.array:
    """e to z (n, v), which is used up: numpy is seven times as quick as MLX on a CPU."""
    if not precision.numpy_is_quicker():
        return mx.exp(z)
    powers = view(z)
    np.exp(powers, out=powers)
    return z
