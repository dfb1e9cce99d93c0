"""A tree of likely continuations: drawn best first, walked along what the model chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Odds = tuple[np.ndarray, np.ndarray]  # log-probabilities (n, width) of tokens (n, width)


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


def grow(
    after: Callable[[Sequence[Node]], Odds], size: int, depth: int, width: int, rounds: int = 99, ends=()
) -> list[Node]:
    def children(up, logp, tokens):
        base, d = (up.score, up.depth + 1) if up else (0.0, 1)
        return [Node(int(t), up, d, base + float(p)) for p, t in zip(logp, tokens, strict=True)]

    logp, tokens = after([])
    best = children(None, logp[0], tokens[0])
    done = set()
    for _ in range(rounds):
        best = sorted(best, key=lambda n: -n.score)[:size]
        open_ = [n for n in best if n not in done and n.depth < depth and n.token not in ends][:width]
        if not open_:
            break
        done |= set(open_)
        for n, p, t in zip(open_, *after(open_), strict=True):
            best += children(n, p, t)
    best = sorted(best, key=lambda n: -n.score)[:size]
    return sorted(best, key=lambda n: n.depth)


def accepted(nodes: Sequence[Node], choice: Sequence[int]) -> tuple[list[Node], int]:
    """(branch that the model chose, its next token after that). choice: after the text, then after each node."""
    row = {None: 0} | {n: r for r, n in enumerate(nodes, 1)}
    below = {(n.up, n.token): n for n in nodes}
    at, branch = None, []
    while (n := below.get((at, choice[row[at]]))) is not None:
        branch.append(n)
        at = n
    return branch, choice[row[at]]
