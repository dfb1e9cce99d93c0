"""A tree of likely continuations: drawn best first, walked along what the model chose.

Does not know models: whoever asks for a tree says what is likely after a node.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

DEPTH = 16  # tokens from the text to the furthest guess
WIDTH = 16  # likely next tokens looked at, and nodes that the draft looks behind at once
Odds = tuple[np.ndarray, np.ndarray]  # log-probabilities (n, WIDTH) of tokens (n, WIDTH)


@dataclass(frozen=True, eq=False)
class Node:
    """A proposed token after `up` (None: after the text). `score`: log of the branch's probability."""

    token: int
    up: Node | None
    depth: int
    score: float

    def branch(self) -> list[Node]:
        """From the first proposed token to this one."""
        return [*(self.up.branch() if self.up else ()), self]


def grow(after: Callable[[Sequence[Node]], Odds], size: int, depth: int, ends: Container[int] = ()) -> list[Node]:
    """The `size` most probable nodes of all that reach `depth` at most, parents before children.

    after(nodes): the odds behind each of them; of no nodes: behind the text, one row. It is asked level by
    level, for nodes whose parents it was asked for before. A branch's probability falls with every token, so
    a node's parent is always among the most probable too (the draft tree of EAGLE-2, arXiv 2406.16858).
    """
    best = _children(None, *(a[0] for a in after([])))
    asked: set[Node] = set()
    while True:
        best = sorted(best, key=lambda n: -n.score)[:size]
        fresh = [n for n in best if n not in asked and n.depth < depth and n.token not in ends][:WIDTH]
        if not fresh:
            return sorted(best, key=lambda n: n.depth)
        asked.update(fresh)
        for node, logp, tokens in zip(fresh, *after(fresh), strict=True):
            best += _children(node, logp, tokens)


def _children(up: Node | None, logp: Iterable[float], tokens: Iterable[int]) -> list[Node]:
    base, depth = (up.score, up.depth + 1) if up else (0.0, 1)
    return [Node(int(t), up, depth, base + float(p)) for p, t in zip(logp, tokens, strict=True)]


def accepted(nodes: Sequence[Node], choice: Sequence[int]) -> tuple[list[Node], int]:
    """(the branch that the model chose, its next token after that). choice: after the text, then after each node."""
    row: dict[Node | None, int] = {None: 0} | {n: r for r, n in enumerate(nodes, 1)}
    below = {(n.up, n.token): n for n in nodes}
    at: Node | None = None
    branch: list[Node] = []
    while (found := below.get((at, choice[row[at]]))) is not None:
        branch.append(at := found)
    return branch, choice[row[at]]
