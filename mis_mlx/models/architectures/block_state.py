"""What a block carries from one token of a text to the next.

A block with attention has keys and values, which grow with the text. A block with a short
convolution has its last few inputs, and one with a gated delta rule a matrix for each head, too.
Over whole windows, in training and in calibration, every block begins at nothing, so only
generation has to keep a state.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

STEP = 32  # tokens by which the room for a block's keys and values grows


def attends(block: nn.Module) -> bool:
    """Whether a block has keys and values."""
    return "self_attn" in block


def cache(
    module: ModuleType, block: nn.Module, window: int | None, *, takes_back: bool = False
) -> Any:
    """A new state of a block for one text.

    module: mlx_lm.models.cache. window: the number of tokens that the block looks back at; None:
    all. takes_back: the text's last tokens can be taken back, by `trim`, as long as it has no
    other beside it. What a delta rule has read cannot be taken back.
    """
    if attends(block):
        keeps_all = takes_back or window is None
        return module.KVCache() if keeps_all else module.RotatingKVCache(window)
    if "conv" not in block:
        return module.ArraysCache(2)
    return Inputs() if takes_back else module.ArraysCache(1)


class Inputs:
    """All inputs (1, T, D) of a short convolution, of which the last ones can be taken back.

    Its methods are those of mlx-lm's KVCache.
    """

    def __init__(self) -> None:
        self.state: list[mx.array] = []

    def extended(self, inputs: mx.array, reach: int) -> mx.array:
        """The last `reach` inputs so far, zeros before the text, and these (1, n, D) behind."""
        if not self.state:
            batch, _, channels = inputs.shape
            self.state = [mx.zeros((batch, reach, channels), inputs.dtype)]
        rows = mx.concatenate([self.state[0], inputs], axis=1)
        self.state = [rows]
        return rows[:, -reach - inputs.shape[1] :]

    def trim(self, count: int) -> None:
        """Forget the last ones."""
        self.state = [mx.contiguous(self.state[0][:, :-count])]

    def merge(self, texts: Sequence["Inputs"]) -> "Inputs":
        """The only one of these."""
        (only,) = texts
        return only
