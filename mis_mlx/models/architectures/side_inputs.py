"""The further inputs of all blocks of a model: who shares keys, and channels for every token.

Axis P: the channels that each block gets for every token from a table of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models.architectures.block_inputs import Channels, Sides
from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config

PART = 2**22  # numbers of the table of per-layer inputs that are computed at a time


def plain(values: Config) -> bool:
    """Whether blocks of a model of this config take hidden states and nothing else."""
    owners = family(values).key_owners()
    shares_keys = any(owner is not None for owner in owners)
    return not shares_keys and not family(values).side_width


def of_config(values: Config, per_layer: Channels | None = None) -> Sides:
    """The further inputs for a pass through a model of this config; per_layer: as of `Sides`."""
    owners = family(values).key_owners()
    return Sides(owners, per_layer)


class TokenChannels:
    """The channels that every block gets for each token of some batches.

    They depend on the token and the block alone, so they are computed once for each of the n
    different tokens: a table (n, L, P).
    """

    def __init__(self, values: Config, batches: Sequence[mx.array]):
        self.width = family(values).side_width
        self.layers = int(values["num_hidden_layers"])
        arrays = [np.array(batch) for batch in batches]
        flat = np.zeros(0, np.int32)
        if arrays:
            flat = np.concatenate([tokens.reshape(-1) for tokens in arrays])
        self.ids, rows = np.unique(flat, return_inverse=True)
        rows = rows.reshape(-1)
        # rows of the table, for each batch (B, T)
        self._places = list[mx.array]()
        start = 0
        for tokens in arrays:
            stop = start + tokens.size
            places = rows[start:stop].reshape(tokens.shape)
            self._places.append(mx.array(places.astype(np.int32)))
            start = stop
        self._table: mx.array | None = None

    def fill(self, channels: Callable[[np.ndarray], mx.array], dtype: mx.Dtype) -> None:
        """Compute the table. channels(ids (m,)) -> (m, L, P) of `dtype`, for some tokens a call."""
        bits = {2: mx.uint16, 4: mx.uint32}[dtype.size]  # numpy has no bfloat16
        tokens = len(self.ids)
        table: Any = mx.zeros((tokens, self.layers, self.width), bits)
        into = np.asarray(memoryview(table))  # evaluates
        of_token = self.layers * self.width
        step = max(1, PART // of_token)
        for start in range(0, tokens, step):
            stop = start + step
            some = channels(self.ids[start:stop])
            into[start:stop] = np.asarray(some.view(bits))
        self._table = table.view(dtype)

    def __call__(self, i: int, b: int) -> mx.array:
        """(B, T, P) of batch b for block i."""
        assert self._table is not None
        return self._table[:, i][self._places[b]]


def of_model(model: nn.Module, batches: Sequence[mx.array], embedded: Sequence[mx.array]) -> Sides:
    """The further inputs for a pass through a model that `load.resident_model` has made; lazy.

    batches [(B, T)], embedded [(B, T, D)].
    """
    architecture = family(model._config)
    owners = architecture.key_owners()
    if not architecture.side_width:
        return Sides(owners)
    channels = [
        architecture.side_channels(model, tokens, rows)
        for tokens, rows in zip(batches, embedded, strict=True)
    ]
    return Sides(owners, lambda i, b: channels[b][:, :, i])
