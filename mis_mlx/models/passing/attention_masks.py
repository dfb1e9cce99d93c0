"""Several texts in one sequence, each computed as if it stood alone.

A text is an answer behind its prompt, which is computed once for all of its answers, forward and
backward; nothing is padded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models.architectures import block_inputs, block_state, modules, side_inputs
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.writing import streamed_decode


class Branches(NamedTuple):
    """A prompt and its B answers in one sequence of S tokens.

    tokens (1, S): the prompt, then every answer without its last token. branch (1, S): 0 for the
    prompt, else 1, 2, ... positions (S,): of each token in its own text. logit_positions (B, T):
    which of S predicts a token; targets (B, T): that token; mask (B, T): 1 where there is one.
    """

    tokens: mx.array
    branch: mx.array
    positions: np.ndarray
    logit_positions: mx.array
    targets: mx.array
    mask: mx.array


def join(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Branches:
    """One prompt and B answers, of at least one token each, in one sequence."""
    longest = max(map(len, answers))
    shape = (len(answers), longest)
    logit_positions = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    start = len(prompt)
    tokens = list(prompt)
    branch = [0] * start
    positions = list(range(start))
    for row, answer in enumerate(answers):
        count = len(answer)
        # The prompt's last token predicts the answer's first; nothing follows the answer's last
        # token, so that is a target only.
        further = count - 1
        begin = len(tokens)
        end = begin + further
        logit_positions[row, :count] = [start - 1, *range(begin, end)]
        targets[row, :count] = answer
        mask[row, :count] = 1.0
        tokens += answer[:-1]
        branch += [row + 1] * further
        positions += range(start, start + further)
    return Branches(
        tokens=mx.array([tokens]),
        branch=mx.array([branch]),
        positions=np.array(positions, np.int32),
        logit_positions=mx.array(logit_positions),
        targets=mx.array(targets),
        mask=mx.array(mask),
    )


def forward(
    model: nn.Module, tokens: mx.array, branch: mx.array, positions: np.ndarray
) -> mx.array:
    """Final hidden states (B, T, D) of a resident model, each token seeing its own text alone.

    tokens, branch (B, T): a token looks back at branch 0 and its own. positions (T,): in its own
    text.
    """
    inner = model.model
    mask = _branch_mask(branch)
    in_text = mx.array(positions)
    architecture = family(model._config)
    embedded = load.embedded(model, tokens)
    sides = side_inputs.of_model(model, tokens, embedded)
    hidden = embedded
    for i, block in enumerate(inner.layers):
        inputs = sides.inputs(i, 0, hidden)
        window = load.window(model.args, block)
        with modules.at_positions(block, in_text):
            outputs = run_masked_block(block, inputs, mask, positions, window=window)
        hidden = sides.keep(i, 0, outputs)
    return architecture.leave(model, hidden)


def _branch_mask(branch: mx.array) -> mx.array:
    """(B, 1, T, T), for all heads: which tokens (last axis) a token sees, by branch (B, T)."""
    order = mx.arange(branch.shape[1])
    earlier = order[:, None] >= order[None]
    of_query = branch[:, :, None]
    of_key = branch[:, None, :]
    of_prompt = of_key == 0
    same_text = of_prompt | (of_query == of_key)
    sees = same_text & earlier
    return sees[:, None]


def run_masked_block(
    block: nn.Module,
    inputs: BlockInputs,
    sees: mx.array,
    positions: np.ndarray,
    *,
    window: int | None = None,
) -> BlockOutputs:
    """One block on hidden states (B, T, D): row i looks at the rows of sees (T, T).

    positions (T,): where each row stands. window: the number of tokens that the block looks back at
    most; None: all.
    """
    mask = block_state.mask_of(block, sees)
    if window is not None:
        order = mx.array(positions)
        near = order[:, None] < order[None] + window
        mask = mask & near
    with streamed_decode.positioned(block, positions):
        return block_inputs.run(block, inputs, mask)
