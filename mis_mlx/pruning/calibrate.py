"""One streamed calibration pass: statistics of every axis that can shrink, for all batches."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths import importance
from mis_mlx.maths.importance import ExpertSums, Statistics, Sums
from mis_mlx.models import arch, distributed, load, stream
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.models.pipeline_parallel import Relay
from mis_mlx.types import Checkpoint, Reading


def _look(block: nn.Module, heads: int, into: mx.array, out: mx.array) -> dict[str, mx.array]:
    """What one batch says of one block, lazy: importance and squares by axis, and of the block itself."""
    samples = {"block": importance.block_sample(into, out)}
    for axis, (part, (name, *_)) in arch.readers(block).items():
        seen = block[part][name].take()
        samples[axis] = importance.head_sample(seen, heads) if axis == "heads" else importance.channel_sample(seen)
        samples[axis + " squares"] = importance.square_sample(seen)
    return samples


def _merge(out: Statistics, experts: Mapping[int, ExpertSums], batches: int) -> None:
    """Sums of this machine's batches become those of all machines', and blocks' sums means."""
    sums = [of[i] for of in (out.ffn, out.heads, out.hidden) for i in sorted(of)]
    fields: list[tuple[Any, str]] = [(s, name) for s in sums for name in ("mean", "square", "warm")]
    fields += [(experts[i], name) for i in sorted(experts) for name in ("routed", "gated", "warm")]
    whole = distributed.all_reduce_sums([getattr(owner, name) for owner, name in fields])
    for (owner, name), value in zip(fields, whole, strict=True):
        setattr(owner, name, value)
    mine = [np.array([out.block[i] for i in sorted(out.block)]), np.array(batches)]
    distances, count = distributed.all_reduce_sums(mine)
    out.block = {i: float(d / count) for i, d in enumerate(distances)}
    out.experts = {i: of.scores() for i, of in experts.items()}
    out.routed = {i: of.routed for i, of in experts.items()}


class _Air:
    """T_env of every batch, measured once, as it enters the model."""

    def __init__(self, reading: Callable[[], Reading | None], unit: str):
        self._reading, self._unit = reading, unit
        self.readings: list[Reading | None] = []
        self.weights: list[float | None] = []

    def at(self, batch: int) -> float | None:
        """Its weight in AAIS."""
        while len(self.weights) <= batch:
            self.readings.append(self._reading())
            self.weights.append(importance.weight_of(self.readings[-1], self._unit))
        return self.weights[batch]


class _Mixture:
    """What a block's experts do on all batches: scores of them, and of their neurons, whose activations count as their
    expert's gate lets them."""

    def __init__(self, experts: ExpertSums, neurons: Sums, air: _Air):
        self._experts, self._sums, self._air = experts, neurons, air
        self._neurons = dict[int, np.ndarray]()  # of a batch: sums over tokens of |a| and a^2, (2, E, F)

    def looked(
        self, source: stream.Stream, block: nn.Module, hidden: stream.Hidden, s: Shape
    ) -> Iterator[tuple[mx.array, dict[str, mx.array]]]:
        """Every batch behind the block, and what it says of the block beside."""
        for b, after in enumerate(source.mixed(block, hidden, partial(self._meet, s))):
            mean, square = self._neurons.pop(b).reshape(2, -1) / (after.shape[0] * after.shape[1])
            self._sums.add(mean, square, self._air.at(b) or 1.0)
            yield after, _look(block, s.heads, hidden[b], after)

    def _meet(self, s: Shape, b: int, e: int, gates: np.ndarray, neurons: mx.array, made: mx.array) -> None:
        self._experts.add(e, gates, made, self._air.at(b) or 1.0)
        gated = mx.abs(neurons.astype(mx.float32)) * mx.array(gates)[:, None]
        seen = self._neurons.setdefault(b, np.zeros((2, s.experts, s.ffn)))
        seen[:, e] = np.array(mx.stack([gated.sum(axis=0), mx.square(gated).sum(axis=0)]))


def calibrate(
    checkpoint: Checkpoint, batches: stream.Batches, dtype: mx.Dtype,
    reading: Callable[[], Reading | None] = lambda: None, unit: str = "kelvin", hidden: stream.Hidden | None = None,
    relay: Relay | None = None,
) -> tuple[Statistics, stream.Hidden]:  # fmt: skip
    """Statistics of all layers over token ids [(B, T)], and the teacher's final hidden states [(B, T, D)].

    `reading()` is asked once per batch, as the batch enters the model: its T_b weighs that batch in AAIS. If any batch
    has no T_b, all weigh 1, and `measured` is False. hidden: a place for the hidden states other than memory. Several
    machines each bring their own batches and get the statistics of all; of a `relay` each looks at its own blocks."""
    s = shape_of(checkpoint.config)
    out = Statistics(hidden={-1: (norms := Sums.zeros(s.hidden))})
    source = relay or stream.Stream(checkpoint, dtype, direct=not isinstance(hidden, list | None))
    hidden, air, experts = source.embed(batches, hidden), _Air(reading, unit), dict[int, ExpertSums]()
    for i in range(s.layers):  # those that another machine looks at stay zero
        out.ffn[i], out.heads[i], out.block[i] = Sums.zeros(s.ffn * max(1, s.experts)), Sums.zeros(s.heads), 0.0
        experts |= {i: ExpertSums.zeros(s.experts)} if s.experts else {}
    for i, block in source.blocks():
        for part, (name, *_) in arch.readers(block).values():
            block[part][name] = stream.InputRecorder(block[part][name])
        distances = []

        def enter(b: int, into: mx.array, block: nn.Module = block) -> tuple[mx.array, dict[str, mx.array]]:
            air.at(b)
            after = block(into, load.mask(source.args, block, into))
            return after, _look(block, s.heads, into, after)

        mixture = _Mixture(experts[i], out.ffn[i], air) if s.experts else None
        looked = mixture and mixture.looked(source, block, hidden, s)
        for b, (after, samples) in enumerate(looked or lanes.each(enter, range(len(hidden)), hidden)):
            hidden[b] = source.finite(after) if b == 0 else after
            seen = {name: np.array(sample, np.float64) for name, sample in samples.items()}
            distances.append(seen["block"])
            for axis, sums in (("ffn", out.ffn[i]), ("heads", out.heads[i]), ("norm1", norms), ("norm2", norms)):
                if axis in seen:
                    squares, tokens = seen[axis + " squares"], after.shape[0] * after.shape[1]
                    square = squares.reshape(len(seen[axis]), -1).sum(axis=-1) / tokens  # of a head: its channels'
                    sums.add(seen[axis], square, air.at(b) or 1.0)
        out.block[i] = float(np.sum(distances))
    _merge(out, experts, len(batches))
    readings, weights = air.readings, air.weights
    out.measured = not distributed.any_rank(None in weights)
    if not out.measured:
        for sums in (*out.ffn.values(), *out.heads.values(), *out.experts.values(), norms):
            sums.warm = sums.square.copy()
    known = [r for r in readings if r is not None]
    celsius = distributed.all_gather([r.ambient_c for r in known if r.ambient_c is not None])
    out.ambient_c = list(chain.from_iterable(celsius))
    altitudes = distributed.all_gather(known[-1].altitude_m if known else None)
    out.altitude_m = next((m for m in altitudes if m is not None), None)
    return out, source.norm(hidden)
