"""What a block carries from one token of a text to the next.

A block with attention has keys and values, which grow with the text. A block with a short
convolution has its last few inputs, and one with a gated delta rule a matrix for each head, too.
Over whole windows, in training and in calibration, every block begins at nothing, so only
generation has to keep a state. Where guesses may be taken back, a short convolution is told which
rows stand before each row.
"""

from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def attends(block: nn.Module) -> bool:
    """Whether a block has keys and values."""
    return "self_attn" in block


def cache(module: ModuleType, block: nn.Module, window: int | None) -> Any:
    """A new state of a block for texts that go on at the same position.

    module: mlx_lm.models.cache. window: the number of tokens that the block looks back at; None:
    all.
    """
    if not attends(block):
        return module.ArraysCache(1 if "conv" in block else 2)
    return module.RotatingKVCache(window) if window else module.KVCache()


class Columns:
    """The inputs of a short convolution at all rows that were read: (B, 1, T, D).

    It is used as mlx-lm's ConcatenateKVCache is: rows of guesses can be taken out again.
    """

    def __init__(self) -> None:
        self.inputs: mx.array | None = None

    def extended(self, inputs: mx.array) -> mx.array:
        """All inputs (B, T, D) with these at the end."""
        new = inputs[:, None]
        if self.inputs is not None:
            new = mx.concatenate([self.inputs, new], axis=2)
        self.inputs = new
        return new[:, 0]

    @property
    def state(self) -> list[mx.array]:
        """The arrays, which can be replaced by some of their columns."""
        return [] if self.inputs is None else [self.inputs]

    @state.setter
    def state(self, arrays: list[mx.array]) -> None:
        """Replace the arrays."""
        (self.inputs,) = arrays

    def empty(self) -> bool:
        """Whether nothing was read."""
        return self.inputs is None


def columns(module: ModuleType, kind: str) -> Any:
    """A new state of a block with one column for each row that was read.

    module: as in `cache`. kind: "conv", "linear_attention", or anything else with keys and values.
    A delta rule has no columns: what it has read cannot be taken out again.
    """
    if kind == "conv":
        return Columns()
    if kind == "linear_attention":
        return module.ArraysCache(2)
    return module.ConcatenateKVCache()


def before(sees: mx.array, rows: mx.array, columns: mx.array, reach: int) -> mx.array:
    """The columns that stand 1, 2 ... `reach` tokens before each row: (..., n, reach).

    -1 where the text has none. sees (..., n, m): which columns belong to a row's text, up to
    itself. rows (..., n), columns (..., m): how many tokens stand before each in its text.
    """
    distances = []
    for distance in range(1, reach + 1):
        wanted = rows[..., None] - distance
        match = sees & (columns[..., None, :] == wanted)
        index = mx.argmax(match, axis=-1).astype(mx.int32)
        distances.append(mx.where(match.any(axis=-1), index, -1))
    return mx.stack(distances, axis=-1)
