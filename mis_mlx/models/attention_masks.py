"""Several texts in one sequence: hidden states as if each answer stood alone behind its prompt, or
each row alone.

The prompt is computed once for all of its answers, forwards and backwards, and nothing is padded.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models import block_inputs, load, streamed_decode
from mis_mlx.models.block_inputs import BlockInputs, BlockOutputs


class Branches(NamedTuple):
    """tokens (1, S): the prompt, then every answer without its last token. branch (1, S): 0 for the
    prompt, else 1, 2 positions (S,): in its own text. at (B, T): which of S predicts a token;
    targets (B, T): that token; mask (B, T).
    """

    tokens: mx.array
    branch: mx.array
    positions: np.ndarray
    at: mx.array
    targets: mx.array
    mask: mx.array


def join(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Branches:
    """Of one prompt and B answers, of at least one token each."""
    shape = len(answers), max(map(len, answers))
    at = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    tokens = list(prompt)
    branch = [0] * len(prompt)
    positions = list(range(len(prompt)))
    for row, answer in enumerate(answers):
        at[row, : len(answer)] = [
            len(prompt) - 1,
            *range(len(tokens), len(tokens) + len(answer) - 1),
        ]
        targets[row, : len(answer)], mask[row, : len(answer)] = answer, 1.0
        tokens += answer[:-1]
        branch += [row + 1] * (len(answer) - 1)
        positions += range(len(prompt), len(prompt) + len(answer) - 1)
    arrays = mx.array([tokens]), mx.array([branch]), np.array(positions, np.int32)
    return Branches(*arrays, mx.array(at), mx.array(targets), mx.array(mask))


def forward(
    model: nn.Module, tokens: mx.array, branch: mx.array, positions: np.ndarray | None = None
) -> mx.array:
    """Final hidden states (B, T, D) of a resident model; tokens, branch (B, T): a token looks back
    at branch 0 and its own. positions (T,): in its own text; default: they count on from branch to
    branch. Rotary positions act through their differences alone, so every branch still gets what it
    would get in a window of its own.
    """
    inner = model.model
    at = mx.arange(tokens.shape[1])
    seen = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    sees = (seen & (at[:, None] >= at[None]))[:, None]  # for all heads
    hidden = load.embedded(model, tokens)
    sides = block_inputs.of_model(model, tokens, hidden)
    for i, block in enumerate(inner.layers):
        inputs = sides.inputs(i, 0, hidden)
        hidden = sides.keep(
            i, 0, through(block, inputs, sees, positions, load.window(model.args, block))
        )
    return inner.norm(hidden)


def through(
    block: nn.Module,
    inputs: BlockInputs,
    sees: mx.array,
    positions: np.ndarray | None,
    window: int | None = None,
) -> BlockOutputs:
    """hidden (B, T, D) through one block: row i looks at the rows of sees (T, T), where it stands
    at positions (T,).
    """
    if window is not None:
        at = mx.arange(inputs.hidden.shape[1]) if positions is None else mx.array(positions)
        sees = sees & (at[:, None] < at[None] + window)
    with nullcontext() if positions is None else streamed_decode.positioned(block, positions):
        return block_inputs.run(block, inputs, sees)
