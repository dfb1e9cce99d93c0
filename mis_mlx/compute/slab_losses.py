"""The KL to sparse targets, by slabs of the vocabulary: the head is never there whole.

A head (V, D) comes in slabs (some tokens, D), twice: first for the logits of the targets and the
logsumexp over the vocabulary, then for the gradient. So neither the head nor logits (n, V) of all
tokens exist at once.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx

from mis_mlx.compute import quick_exp
from mis_mlx.maths import losses

LOGIT_BYTES = 2**24  # of float32 logits (n, some tokens) at a time
HEAD_BYTES = 2**26  # of a float32 head (some tokens, D) at a time: few positions have few logits
TINY = 1e-37  # stands for 0 under a logarithm; a normal float32
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
    temperature: float = 1.0,
    seen: Seen = lambda start, p, slope: None,
) -> tuple[mx.array, mx.array]:
    """(sum over positions of KL(w || softmax(z / T)) in nats, its gradient in hidden), evaluated.

    hidden: (n, D); the gradient, too. slabs(rows): the head, which is frozen, from its first token
    on; z are its logits, `losses.apply_softcap`. loss_mask: (n,), 0 leaves a position out. ids,
    weights: (n, m), the tokens of the target w and their shares, which sum to 1; entries of weight
    0 fill a row up. seen: is shown every slab's probabilities, by the sums of weights.

    Equation (2) has no T^2 factor, so there is none here: the gradient is (p_s - w) / T per logit.
    For w of `slab_draws.sample` it is that of the full KL in expectation; the value is larger by a
    constant, E KL(w || p_t), which no student can lower.
    """
    wide = hidden.astype(mx.float32)
    rows = slab_rows(len(hidden), hidden.shape[1], LOGIT_BYTES)
    chosen = mx.zeros(ids.shape)
    lse = mx.full(len(hidden), -mx.inf)
    for start, part in slabs(rows):
        z = losses.apply_softcap(wide @ part.T, softcap) / temperature
        top = z.max(axis=1)
        powers = quick_exp.exp(z - top[:, None]).sum(axis=1)
        here, places = _places(ids, start, len(part))
        chosen = mx.where(here, mx.take_along_axis(z, places, axis=1), chosen)
        lse = mx.logaddexp(lse, top + mx.log(powers))
        mx.eval(chosen, lse)
        del part, z  # before the next slab is read
    log_w = mx.log(mx.maximum(weights, TINY))  # finite at 0, so that 0 log 0 is 0
    kl = (weights * (log_w - chosen + lse[:, None])).sum(axis=1)
    loss = (kl * loss_mask).sum()
    gradient = mx.zeros_like(wide)
    total = weights.sum(axis=1)
    row = mx.arange(len(hidden))[:, None]
    for start, part in slabs(rows):
        z = losses.apply_softcap(wide @ part.T, softcap)
        slope = losses.softcap_gradient(z, softcap) if softcap else None
        p = quick_exp.exp(z / temperature - lse[:, None]) * total[:, None]
        seen(start, p, slope)
        here, places = _places(ids, start, len(part))
        # `add`, not an assignment: a row's fillers may repeat an id.
        p = p.at[row, places].add(mx.where(here, -weights, 0.0))
        if slope is not None:
            p = p * slope
        gradient = gradient + (p * (loss_mask / temperature)[:, None]) @ part
        mx.eval(gradient)
        del part, z, p, slope
    mx.eval(loss)
    return loss, gradient.astype(hidden.dtype)


def _places(ids: mx.array, start: int, count: int) -> tuple[mx.array, mx.array]:
    """(which ids (n, m) are among `count` tokens from `start` on, their places there, else 0)."""
    places = ids - start
    here = (places >= 0) & (places < count)
    return here, mx.where(here, places, 0)
