"""Some rows of a text that is too large to be held, drawn in one pass by equal chance."""

import heapq
import random
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

WHOLE_BYTES = 16 * 2**20  # a text up to this is used whole
# Of a larger one a run draws what it visits, but so much at least, which is enough to count tokens
# in, and so much at most: a longer training sees its rows again.
LEAST_DRAWN_BYTES = 4 * 2**20
MOST_DRAWN_BYTES = 64 * 2**20
TOKEN_BYTES = 8  # of a line, for a token that is visited: twice what English has
MIB = 2**20
T = TypeVar("T")


class Drawn(NamedTuple, Generic[T]):
    """Items of a text in their order, and how many there were of which size in all."""

    items: list[T]
    nbytes: int
    total: int
    total_bytes: int

    def note(self, name: str) -> list[str]:
        """The sentence on what was left out, if anything was."""
        if len(self.items) == self.total:
            return []
        share = f"{len(self.items):,} of {self.total:,} rows"
        size = f"{self.nbytes / MIB:.1f} of {self.total_bytes / MIB:.1f} MiB"
        return [f"{name}: {share} are drawn, {size}"]


def drawn_bytes(tokens: int) -> int:
    """How much a run draws of a text that is too large to be used whole. tokens: that it visits."""
    wanted = TOKEN_BYTES * tokens
    wanted = max(wanted, LEAST_DRAWN_BYTES)
    return min(wanted, MOST_DRAWN_BYTES)


def drawn(
    items: Iterable[tuple[T, int]],
    most_bytes: int,
) -> Drawn[T]:
    """All items of up to WHOLE_BYTES; else as many as have `most_bytes`, drawn by chance.

    items: with the size of each. Every item has the same chance, wherever it stands. The same ones
    are drawn each time; a larger draw holds a smaller one. No more is held than is kept, and
    WHOLE_BYTES.
    """
    whole_bytes = max(WHOLE_BYTES, most_bytes)
    chance = random.Random(0)  # the same sequence in every version of Python
    # The item with the largest random number comes first, and goes first.
    kept: list[tuple[float, int, T, int]] = []
    nbytes = 0
    total = 0
    total_bytes = 0

    def leave(limit: int) -> int:
        """Drop items as long as the others have the bytes of the limit."""
        left = nbytes
        while len(kept) > 1:
            *_, size = kept[0]
            if left - size < limit:
                break
            heapq.heappop(kept)
            left -= size
        return left

    for item, size in items:
        total += 1
        total_bytes += size
        key = -chance.random()
        if nbytes >= whole_bytes and key < kept[0][0]:
            continue
        heapq.heappush(kept, (key, total, item, size))
        nbytes += size
        if nbytes > whole_bytes:
            nbytes = leave(whole_bytes)
    if total_bytes > whole_bytes:
        nbytes = leave(most_bytes)
    kept.sort(key=lambda entry: entry[1])
    chosen = [entry[2] for entry in kept]
    return Drawn(chosen, nbytes, total, total_bytes)
