"""Several texts in one sequence: hidden states as if each answer stood alone behind its prompt, or each row alone.

The prompt is computed once for all of its answers, forwards and backwards, and nothing is padded."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models import load
from mis_mlx.models.streamed_decode import positioned


@dataclass(frozen=True)
class Branches:
    """tokens (1, S): the prompt, then every answer without its last token. branch (S,): 0 for the prompt, then 1, 2 ...
    positions (S,): in its own text. at (B, T): which of S predicts a token; targets (B, T): that token; mask (B, T)."""

    tokens: mx.array
    branch: mx.array
    positions: np.ndarray
    at: mx.array
    targets: mx.array
    mask: mx.array


def join(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Branches:
    """Of one prompt and B answers, of at least one token each."""
    longest = max(map(len, answers))
    shape = len(answers), longest
    at, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    tokens, branch, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    for row, answer in enumerate(answers):
        at[row, : len(answer)] = [len(prompt) - 1, *range(len(tokens), len(tokens) + len(answer) - 1)]
        targets[row, : len(answer)], mask[row, : len(answer)] = answer, 1.0
        tokens += answer[:-1]
        branch += [row + 1] * (len(answer) - 1)
        positions += range(len(prompt), len(prompt) + len(answer) - 1)
    arrays = mx.array([tokens]), mx.array(branch), np.array(positions, np.int32)
    return Branches(*arrays, mx.array(at), mx.array(targets), mx.array(mask))


def forward(model: nn.Module, tokens: mx.array, branch: mx.array, positions: np.ndarray) -> mx.array:
    """Final hidden states (S, D) of a resident model; arguments as in `Branches`."""
    inner, order = model.model, mx.arange(tokens.shape[1])
    sees = (order[:, None] >= order[None]) & ((branch[None] == 0) | (branch[:, None] == branch[None]))
    hidden = load.embedded(model, tokens)
    for block in inner.layers:
        hidden = through(block, hidden, sees, positions, load.window(model.args, block))
    return inner.norm(hidden)[0]


def through(
    block: nn.Module, hidden: mx.array, sees: mx.array, positions: np.ndarray, window: int | None = None
) -> mx.array:
    """hidden (1, S, D) through one block: row i looks at the rows of sees (S, S), where it stands at positions (S,)."""
    if window is not None:
        at = mx.array(positions)
        sees = sees & (at[:, None] < at[None] + window)
    with positioned(block, positions):
        return block(hidden, sees)


def forward_rows(model: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
    """Final hidden states (B, T, D) of a resident model, several rows in a window, none of which sees another.

    rows (B, T): which row each token is of. Positions count on from row to row: rotary positions act through their
    differences alone, so every row gets what it would get in a window of its own."""
    inner, at = model.model, mx.arange(tokens.shape[1])
    same = (rows[:, :, None] == rows[:, None, :]) & (at[:, None] >= at[None])
    mask = same[:, None]  # for all heads
    hidden = load.embedded(model, tokens)
    for block in inner.layers:
        window = load.window(model.args, block)
        hidden = block(hidden, mask if window is None else mask & (at[:, None] < at[None] + window))
    return inner.norm(hidden)
