"""Rankings of neurons, heads and channels that lost to the root mean square of activations.

`by` puts scores of any kind in the place of mean activations, so that pruning/select ranks by them.
What moves (FLAP) and how long weights are comes from a streamed pass of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.importance import Key, Statistics, Sums
from mis_mlx.models.architectures import arch, modules
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.types import Checkpoint

# (layer, axis) -> scores (units,), none below 0; the highest stay
Scores = Callable[[Key], np.ndarray]


@dataclass
class Moments:
    """Of channels that matrices read, (C,): sums over tokens of a and a^2; columns: |W_:j|^2 of
    what reads them.
    """

    columns: np.ndarray
    total: np.ndarray
    square: np.ndarray
    tokens: int = 0

    @classmethod
    def zeros(cls, columns: np.ndarray) -> Moments:
        """No token seen yet."""
        return cls(columns, np.zeros(len(columns)), np.zeros(len(columns)))

    def add(self, x: mx.array) -> None:
        """One batch x (B, T, C)."""
        x = x.astype(mx.float32).reshape(-1, x.shape[-1])
        self.total = self.total + np.array(x.sum(axis=0), np.float64)
        self.square = self.square + np.array(mx.square(x).sum(axis=0), np.float64)
        self.tokens += len(x)

    @property
    def mean(self) -> np.ndarray:
        """(C,)."""
        return self.total / self.tokens

    @property
    def variance(self) -> np.ndarray:
        """(C,)."""
        return np.maximum(self.square / self.tokens - self.mean**2, 0.0)


def fluctuation(moments: Moments, unit: int = 1) -> np.ndarray:
    """FLAP: how much a channel moves around its mean, Var(a_j) * |W_:j|^2 (arXiv 2312.11983 eq. 5),
    summed over the `unit` channels of a head. What does not move, a bias could replace.
    """
    of_channels = moments.variance * moments.columns
    return of_channels.reshape(-1, unit).sum(axis=-1)


def _squares(block: nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{matrix: squared lengths of its (rows, columns)} of one block, float64."""
    found = {}
    for part, names in arch.readers(block).values():
        for name in names:
            square = mx.square(modules.dense_weight(block[part][name]))
            rows = np.array(square.sum(axis=1), np.float64)
            columns = np.array(square.sum(axis=0), np.float64)
            found[name] = (rows, columns)
    return found


def measured(
    checkpoint: Checkpoint, batches: Sequence[mx.array], dtype: mx.Dtype
) -> tuple[dict[Key, Moments], dict[Key, np.ndarray]]:
    """(moments by (layer, axis), of hidden channels by the layer whose norms they leave; squared
    lengths of all weights of a neuron, head or hidden channel) over token ids [(B, T)].
    """
    heads = shape_of(checkpoint.config).heads
    moments = dict[Key, Moments]()
    lengths = dict[Key, np.ndarray]()
    source = stream.Stream(checkpoint, dtype)
    hidden = source.embed(batches)
    for i, block in source.blocks():
        squares = _squares(block)
        rows = {name: of_rows for name, (of_rows, _) in squares.items()}
        columns = {name: of_columns for name, (_, of_columns) in squares.items()}
        readers_of = arch.readers(block)
        for axis, (_, readers) in readers_of.items():
            read = np.sum([columns[name] for name in readers], axis=0)
            moments[i, axis] = Moments.zeros(read)
        lengths[i, "ffn"] = rows["gate_proj"] + rows["up_proj"] + columns["down_proj"]
        of_channels = rows["q_proj"] + columns["o_proj"]
        lengths[i, "heads"] = of_channels.reshape(heads, -1).sum(axis=-1)
        own = rows["o_proj"] + rows["down_proj"]
        own = own + moments[i, "norm1"].columns + moments[i, "norm2"].columns
        lengths[-1, "hidden"] = lengths.get((-1, "hidden"), 0.0) + own
        for part, (name, *_) in readers_of.values():
            block[part][name] = modules.InputRecorder(block[part][name])
        for b, into in enumerate(hidden):
            hidden[b] = block(into, load.mask(source.args, block, into))
            for axis, (part, (name, *_)) in readers_of.items():
                moments[i, axis].add(block[part][name].take())
            stream.evaluate_now(hidden[b])
    return moments, lengths


def moving(moments: dict[Key, Moments], head_dim: int) -> Scores:
    """By `fluctuation`; of hidden channels that behind all norms together."""

    def scores(key: Key) -> np.ndarray:
        _, axis = key
        unit = head_dim if axis == "heads" else 1
        keys = [key]
        if axis == "hidden":
            keys = [(layer, name) for layer, name in moments if name.startswith("norm")]
        return np.sum([fluctuation(moments[each], unit) for each in keys], axis=0)

    return scores


def random(statistics: Statistics, seed: int) -> Scores:
    """Drawn layer by layer, each axis by itself."""
    draws = {axis: np.random.default_rng(seed) for axis in ("ffn", "heads", "hidden")}

    def scores(key: Key) -> np.ndarray:
        layer, axis = key
        sums = getattr(statistics, axis)[layer]
        return draws[axis].random(len(sums.square))

    return scores


def by(statistics: Statistics, scores: Scores) -> Statistics:
    """Statistics whose `importance.activation` are these scores."""

    def put(key: Key) -> Sums:
        layer, axis = key
        sums = getattr(statistics, axis)[layer]
        return replace(sums, mean=scores(key) ** 2)

    blocks = sorted(statistics.ffn)
    ffn = {i: put((i, "ffn")) for i in blocks}
    heads = {i: put((i, "heads")) for i in blocks}
    return replace(statistics, ffn=ffn, heads=heads, hidden={-1: put((-1, "hidden"))})


def keeping(statistics: Statistics, layers: Iterable[int]) -> Statistics:
    """Statistics by which these blocks are the ones that stay."""
    kept = set(layers)
    return replace(statistics, block={i: float(i in kept) for i in statistics.block})
