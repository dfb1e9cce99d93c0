"""How the next tokens of texts are drawn: each text with random numbers of its own.

So a text depends on its prompt and its seed, not on the texts that are written beside it, nor on
how many these are. All texts of a step are drawn in one batch. Axes: n texts, V tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision

LIKELIEST = 1024  # tokens among which a CPU looks for a nucleus first
BITS = 30  # of a probability as a float32: those above are 0
PARTS = 16  # of a row of probabilities, which one kernel compares and adds up
# Of texts that a model in half precision draws: kept ones of another version are not used.
HALF_VERSION = 2


class Sampling(NamedTuple):
    """temperature: 0 takes the likeliest token. top_p: only from the `nucleus`; 1: from all."""

    temperature: float
    top_p: float = 1.0


GREEDILY = Sampling(0.0)


class Draws:
    """The random numbers of texts that are being written.

    seeds: one a text, by its number; None: its tokens are taken greedily; none are needed where all
    are.
    """

    def __init__(self, sampling: Sampling = GREEDILY, seeds: Sequence[int | None] = ()):
        self._sampling = sampling
        self._keys: mx.array | None = None
        self._greedy = {number for number, seed in enumerate(seeds) if seed is None}
        if sampling.temperature and len(self._greedy) < len(seeds):
            keys = [mx.random.key(seed or 0) for seed in seeds]
            self._keys = mx.stack(keys)

    def __call__(
        self,
        log_probs: mx.array,
        texts: Sequence[int],
    ) -> mx.array:
        """The next tokens (n,) of these texts, by number, from log-probabilities (n, V); lazy."""
        if self._keys is None:
            return mx.argmax(log_probs, axis=-1)
        drawn = [place for place, text in enumerate(texts) if text not in self._greedy]
        if len(drawn) == len(texts):
            return self._drawn(log_probs, texts)
        tokens = mx.argmax(log_probs, axis=-1)
        if drawn:
            rows = mx.array(drawn)
            tokens[rows] = self._drawn(log_probs[rows], [texts[place] for place in drawn])
        return tokens

    def _drawn(self, log_probs: mx.array, texts: Sequence[int]) -> mx.array:
        """The tokens of texts that have random numbers."""
        sampling = self._sampling
        if log_probs.dtype != mx.float32:
            # They were normalized in half precision, up to 6 % off in bfloat16: enough for a
            # nucleus of 0.95 to take in the whole vocabulary.
            log_probs = log_probs.astype(mx.float32)
            log_probs = log_probs - mx.logsumexp(log_probs, axis=-1, keepdims=True)
        if sampling.top_p < 1.0:
            log_probs = nucleus(log_probs, sampling.top_p)
        logits = log_probs / sampling.temperature
        keys = self._next_keys(texts)
        return categorical(logits, keys)

    def _next_keys(self, texts: Sequence[int]) -> mx.array:
        """A key (n, 2) for a draw of each of these texts."""
        assert self._keys is not None
        rows = mx.array(list(texts))
        before = self._keys[rows]
        pairs = mx.vmap(mx.random.split)(before)
        self._keys[rows] = pairs[:, 1]
        # In memory of their own: random numbers are drawn of keys whose parts lie side by side.
        return mx.contiguous(pairs[:, 0])


def half_version(dtype: mx.Dtype) -> dict[str, int]:
    """What the key of kept texts says of a writer that computes in `dtype`; {} of float32."""
    return {} if dtype == mx.float32 else {"half_draws": HALF_VERSION}


def categorical(
    logits: mx.array,
    keys: mx.array,
) -> mx.array:
    """Tokens (n,) drawn from softmax(logits), (n, V), each row by its own key of (n, 2).

    By the inverse of the cumulative distribution, which takes one random number a row. They are the
    tokens that `mx.random.categorical` draws of a row alone. In float32: a running sum in half
    precision soon stands still, and everything behind is never drawn.
    """
    logits = logits.astype(mx.float32)
    shares = mx.vmap(_uniform)(keys)
    top = logits.max(axis=-1, keepdims=True)
    weights = mx.exp(logits - top)
    below = mx.cumsum(weights, axis=-1)
    whole = below[:, -1:]
    wanted = shares[:, None] * whole
    passed = below <= wanted
    tokens = passed.sum(axis=-1)
    # Rounded up to the whole, a share would pass the last token too.
    last = logits.shape[-1] - 1
    tokens = mx.minimum(tokens, mx.array(last))
    return tokens.astype(mx.uint32)


def _uniform(key: mx.array) -> mx.array:
    return mx.random.uniform(key=key)


def nucleus(
    log_probs: mx.array,
    top_p: float,
) -> mx.array:
    """Log-probabilities (n, V) of the smallest set of tokens with `top_p` together, else -inf.

    The same as mlx-lm's sampler (Holtzman et al., arXiv 1904.09751), before any temperature. No
    whole vocabulary is sorted, which would take as long as a pass of a small model.
    """
    if precision.numpy_is_quicker():
        values = log_probs
        least = _least_by_sorting(log_probs, top_p)
    else:
        values = mx.exp(log_probs.astype(mx.float32))
        least = _least_by_halving(values, top_p)
    return mx.where(values < least, -mx.inf, log_probs)


def _least_by_sorting(
    log_probs: mx.array,
    top_p: float,
) -> mx.array:
    """The least log-probability in the nucleus of every row: (n, 1).

    Only the LIKELIEST tokens of a row are sorted, or all if these have less than `top_p`.
    """
    vocab = log_probs.shape[-1]
    count = min(LIKELIEST, vocab)
    least, together = _least_of(log_probs, top_p, count)
    enough = np.array(together) >= top_p
    if count == vocab or enough.all():
        return least
    lacking = np.flatnonzero(~enough)
    rows = mx.array(lacking)
    others, _ = _least_of(log_probs[rows], top_p, vocab)
    least[rows] = others
    return least


def _least_of(
    log_probs: mx.array,
    top_p: float,
    count: int,
) -> tuple[mx.array, mx.array]:
    """Of the `count` likeliest the least in the nucleus (n, 1), and the probability of all (n,)."""
    likeliest = mx.topk(log_probs, count, axis=-1)
    likeliest = mx.sort(likeliest, axis=-1)
    wide = likeliest.astype(mx.float32)
    probabilities = mx.exp(wide)
    # The probability of all likelier tokens together.
    above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    inside = mx.where(above < top_p, likeliest, mx.inf)
    least = inside.min(axis=-1, keepdims=True)
    return least, probabilities.sum(axis=-1)


@mx.compile
def _least_by_halving(
    probabilities: mx.array,
    top_p: float,
) -> mx.array:
    """The least probability (n, 1) in the nucleus of rows (n, V), for a GPU, on which a part of a
    sort is a whole one.

    A token is in the nucleus if all likelier ones have less than `top_p` together. That holds from
    some probability on, which is looked for among the bits of a float: those of floats that are not
    negative rise with them. A pass over the probabilities is two kernels: one compares, and adds up
    the parts of a row, the other adds up the sixteenth that it wrote.
    """
    rows, vocab = probabilities.shape
    whole = mx.pad(probabilities, [(0, 0), (0, -vocab % PARTS)])
    parts = whole.reshape(rows, PARTS, -1)
    bits = mx.full((rows, 1), 2 ** (BITS - 1) - 1, mx.int32)
    for place in reversed(range(BITS)):
        bound = bits.view(mx.float32)
        sums = [mx.where(parts[:, k] > bound, parts[:, k], 0.0) for k in range(PARTS)]
        while len(sums) > 1:
            sums = [one + other for one, other in zip(sums[::2], sums[1::2], strict=True)]
        above = sums[0].sum(axis=-1, keepdims=True)
        step = 2**place // 2
        bits = bits + mx.where(above < top_p, -step, max(step, 1))
    return bits.view(mx.float32)
