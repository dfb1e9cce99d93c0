"""Small logic puzzles: who came in which order? Their one solution is found by trying all orders.

Knows no language and no row of data: a clue is a relation between places, 0 for whoever came first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from mis_mlx.disk.draws import some


@dataclass(frozen=True)
class Clue:
    """`kind` of one or two people, who are numbers. before: a came earlier than b; next: b right after a."""

    kind: Literal["before", "next", "not_first", "not_last"]
    a: int
    b: int = -1

    def holds(self, order: Sequence[int]) -> bool:
        """Whether it is true where people came in this order."""
        at = order.index(self.a)
        if self.kind == "before":
            return at < order.index(self.b)
        if self.kind == "next":
            return at + 1 == order.index(self.b)
        return at != (0 if self.kind == "not_first" else len(order) - 1)


def solutions(people: int, clues: Sequence[Clue]) -> list[tuple[int, ...]]:
    """Every order of `people` people in which all clues hold."""
    return [order for order in permutations(range(people)) if all(c.holds(order) for c in clues)]


def make(rng: random.Random, people: int) -> tuple[tuple[int, ...], list[Clue]]:
    """An order, and clues that leave no other; each of them is needed, and none that says the rest alone."""
    hidden = tuple(some(rng, range(people), people))
    true = [c for c in _all(people) if c.holds(hidden)]
    clues = list[Clue]()
    for clue in some(rng, true, len(true)):
        if len(solutions(people, clues)) > 1:
            clues.append(clue)
    for clue in list(clues):
        rest = [c for c in clues if c != clue]
        if len(solutions(people, rest)) == 1:
            clues = rest
    return hidden, clues


def _all(people: int) -> list[Clue]:
    pairs = [(a, b) for a in range(people) for b in range(people) if a != b]
    single = [Clue(kind, a) for a in range(people) for kind in ("not_first", "not_last")]  # type: ignore[arg-type]
    return [Clue("before", a, b) for a, b in pairs] + [Clue("next", a, b) for a, b in pairs] + single


def key(order: Sequence[int], clues: Sequence[Clue]) -> str:
    """The same for puzzles that differ in names and in the order of clues only."""
    place = {who: at for at, who in enumerate(order)} | {-1: -1}
    return ";".join(sorted(f"{c.kind}{place[c.a]}{place[c.b]}" for c in clues))
