"""Sparse targets of a teacher whose head (V, D) comes in slabs of tokens.

A sweep over the slabs finds the likeliest tokens of every position and what the others have
together; a second one draws from the others. So neither the head nor logits (n, V) of all tokens
exist at once, and any number of windows share both readings of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mis_mlx.compute import slab_losses
from mis_mlx.maths.losses import Logits
from mis_mlx.types import MisError

LOGIT_BYTES = 2**22  # of float32 logits (n, some tokens) at a time
# Of a logit while its slab is sorted and summed: as it came, the next window's, beside the
# likeliest, its place in the order, its power, and a running sum in float64
LOGIT_ITEM = 4 + 4 + 4 + 8 + 8 + 8
Slabs = Callable[[], Iterator[tuple[int, Logits]]]  # (first token, logits of a slab's tokens)
Target = tuple[np.ndarray, np.ndarray, np.ndarray]  # sizes, ids, shares of a window


def slab_rows(positions: int, width: int) -> int:
    """Tokens of a slab for windows of so many positions (n, width)."""
    return slab_losses.slab_rows(positions, width, LOGIT_BYTES)


def slab_bytes(positions: int, width: int, vocab: int) -> int:
    """What a slab takes: its part of the head, as read and in float32, and its logits at work."""
    rows = min(slab_rows(positions, width), vocab)
    return rows * (2 * 4 * width + LOGIT_ITEM * positions)


def state_bytes(top: int, count: int) -> int:
    """What a position keeps between slabs: its likeliest tokens, and its draws."""
    return top * (4 + 8) + count * (8 + 8) + 6 * 8


def sample(
    windows: Sequence[mx.array],
    slabs: Slabs,
    count: int,
    seed: int,
    first: Sequence[int],
    *,
    top: int = 0,
) -> list[Target]:
    """A sparse target for each position: its `top` likeliest tokens, and `count` of the others.

    The likeliest have their probability in softmax(logits). Of the others, tokens are drawn with
    replacement by their probability, and share what the others have together (arXiv 2503.16870).
    So the target is an unbiased estimate of the softmax, and sums to 1.

    windows: hidden states (n, D) of each, of positions number `first` and up. slabs(): the head,
    from its first token on, whenever it is called. Returns for each window sizes (n,), the number
    of tokens of each position; ids and shares (sum of sizes,): one position's after another's, ids
    rising. A position's draws depend on its number and the seed alone, whatever is beside it:
    Philox is a function of a counter. MisError when logits are not numbers.
    """
    drafts = [
        _Draft(len(hidden), count, seed, number, top)
        for hidden, number in zip(windows, first, strict=True)
    ]
    for start, number, z in _of_windows(windows, slabs):
        drafts[number].rank(start, z)
    for start, number, z in _of_windows(windows, slabs):
        drafts[number].draw(start, z)
    return [draft.targets() for draft in drafts]


def _of_windows(windows: Sequence[mx.array], slabs: Slabs) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first token, number of a window, its logits (n, some tokens)), slab by slab.

    MLX computes the next window's while numpy works on these.
    """
    for start, logits in slabs():
        lazy = [logits(hidden) for hidden in windows]
        for number in range(len(windows)):
            for z in lazy[:2]:
                mx.async_eval(z)
            yield start, number, np.array(lazy.pop(0))


class _Draft:
    """The targets of n positions while slabs go by: `rank` sees all of them, then `draw` does."""

    def __init__(self, n: int, count: int, seed: int, first: int, top: int):
        blocks = -(-count // 4)  # one step of Philox's counter makes four numbers
        random = np.random.Generator(np.random.Philox(key=seed, counter=first * blocks))
        # Whole steps of the counter for every position: its draws do not depend on the others'.
        self._uniform = np.sort(random.random((n, 4 * blocks))[:, :count], axis=1)
        self._drawn = np.full((n, count), -1, np.int64)
        self._count = top
        self._likeliest = np.zeros((n, 0), np.int64)
        self._values = np.zeros((n, 0), np.float32)  # logits of these
        self._highest = np.full(n, -np.inf)
        self._rest = np.zeros(n)  # powers of the others' logits above the highest, added up
        self._passed = np.zeros(n)  # of these, as far as `draw` has come
        self._last = np.zeros(n, np.int64)  # the last of the others that has any share

    def rank(self, start: int, z: np.ndarray) -> None:
        """Take the logits (n, v) of tokens `start` and up."""
        highest = np.maximum(self._highest, z.max(axis=1))
        if not np.isfinite(highest).all():
            raise MisError(
                "the teacher's logits are not numbers: it overflows in this precision, use another "
                "teacher"
            )
        # In float64: in float32 a running sum would drift over a whole vocabulary.
        self._rest *= np.exp(self._highest - highest)
        self._highest = highest
        values = np.concatenate([self._values, z], axis=1)
        split = max(0, values.shape[1] - self._count)
        order = np.argpartition(values, min(split, values.shape[1] - 1), axis=1)
        left = np.take_along_axis(values, order[:, :split], axis=1)
        self._rest += _powers(left, highest).sum(axis=1, dtype=np.float64)
        kept = order[:, split:]
        known = self._likeliest.shape[1]
        before = np.pad(self._likeliest, ((0, 0), (0, 1)))
        ids = np.take_along_axis(before, np.minimum(kept, known), axis=1)
        self._likeliest = np.where(kept < known, ids, kept - known + start)
        self._values = np.take_along_axis(values, kept, axis=1)

    def draw(self, start: int, z: np.ndarray) -> None:
        """Take the same logits again, and draw from those that are not among the likeliest."""
        powers = _powers(z, self._highest)
        row, column = np.nonzero(
            (self._likeliest >= start) & (self._likeliest < start + z.shape[1])
        )
        powers[row, self._likeliest[row, column] - start] = 0.0
        sums = powers.cumsum(axis=1, dtype=np.float64)
        sums += self._passed[:, None]
        wanted = self._uniform * self._rest[:, None]
        due = (self._drawn < 0) & (wanted < sums[:, -1:])
        for position in np.flatnonzero(due.any(axis=1)):
            found = np.searchsorted(sums[position], wanted[position, due[position]], side="right")
            self._drawn[position, due[position]] = found + start
        some = sums[:, -1] > self._passed
        last = z.shape[1] - 1 - (powers[:, ::-1] > 0).argmax(axis=1)
        self._last = np.where(some, last + start, self._last)
        self._passed = sums[:, -1].copy()  # a view would keep the whole slab for every window

    def targets(self) -> Target:
        """Sizes, ids and shares, when all slabs were drawn from."""
        exact = _powers(self._values, self._highest).astype(np.float64)
        total = exact.sum(axis=1) + self._rest
        exact /= total[:, None]
        rest = self._rest / total
        # Two sums of the same powers differ by their rounding: what the second one missed.
        drawn = np.where(self._drawn < 0, self._last[:, None], self._drawn)
        positions = zip(exact, rest, drawn, self._likeliest, strict=True)
        targets = [self._target(*position) for position in positions]
        sizes = np.array([len(ids) for ids, _ in targets])
        ids = np.concatenate([ids for ids, _ in targets])
        shares = np.concatenate([shares for _, shares in targets])
        return sizes, ids, shares.astype(np.float32)

    def _target(
        self, exact: np.ndarray, rest: float, drawn: np.ndarray, likeliest: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One position's (ids, shares)."""
        ids = likeliest
        shares = exact
        if rest:
            distinct, repeats = np.unique(drawn, return_counts=True)
            ids = np.concatenate([likeliest, distinct])
            shares = np.concatenate([exact, repeats * (rest / len(drawn))])
        order = np.argsort(ids)
        return ids[order], shares[order]


def _powers(z: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """e to z (n, v) above the highest (n,)."""
    return np.exp(z - highest[:, None].astype(np.float32))
