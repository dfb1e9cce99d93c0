"""What llama.cpp's gemma4 needs beside the other families' tensors and keys.

It has a table of per-layer inputs, and last blocks that use the keys of an earlier one.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.storage.block_reader import Reader
from mis_mlx.types import Checkpoint

NEVER = 1e30  # llama.cpp divides a frequency by this where channels do not rotate
TABLES = (load.EMBEDDING, arch.PER_LAYER)  # the names of tables with a row for each token


class TableRows:
    """The table of per-layer inputs of a checkpoint, as stored; read from disk where it is asked.

    name: of its integers, scales or biases.
    """

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._tensor = checkpoint.tensors[name]
        self._reader = Reader({name: self._tensor})

    def __getitem__(self, index: slice) -> mx.array:
        """Some tokens' rows."""
        ids = np.arange(self._tensor.shape[0])[index]
        return self._reader.rows(self._tensor, ids)


def frequency_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """(head_dim / 2,) float32: what llama.cpp divides the frequencies of global heads by.

    Only a share of their channels rotates, with frequencies of the whole head.
    """
    rotated = int(head_dim * rope["partial_rotary_factor"] / 2)
    factors = np.full(head_dim // 2, NEVER, np.float32)
    factors[:rotated] = 1.0
    return factors
