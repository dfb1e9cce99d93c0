"""What is drawn for made-up texts and tasks: a number, an item, several items.

Only `random.Random(str).random()` is drawn from, whose sequence Python guarantees, so a seed means
the same under every version.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def between(rng: random.Random, low: int, high: int, step: int = 1) -> int:
    """One of low, low + step, ... up to and including high."""
    return low + step * int(rng.random() * ((high - low) // step + 1))


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items."""
    return items[int(rng.random() * len(items))]


def some(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items in drawn order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
