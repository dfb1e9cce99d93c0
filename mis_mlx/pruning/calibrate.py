"""One streamed calibration pass: statistics of every axis that can shrink, for all batches."""

from collections.abc import Callable
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths import importance
from mis_mlx.maths.importance import Statistics, Sums
from mis_mlx.models import arch, distributed, load, stream
from mis_mlx.models.config import shape_of
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


def _merge(out: Statistics, batches: int) -> None:
    """Sums of this machine's batches become those of all machines', and blocks' sums means."""
    sums = [of[i] for of in (out.ffn, out.heads) for i in sorted(of)] + ([out.hidden] if out.hidden else [])
    fields = [(s, name) for s in sums for name in ("mean", "square", "warm", "batches")]
    whole = distributed.all_reduce_sums([np.asarray(getattr(owner, name)) for owner, name in fields])
    for (owner, name), value in zip(fields, whole, strict=True):
        setattr(owner, name, int(value) if name == "batches" else value)
    mine = [np.array([out.block[i] for i in sorted(out.block)]), np.array(batches)]
    distances, count = distributed.all_reduce_sums(mine)
    out.block = {i: float(d / count) for i, d in enumerate(distances)}


def calibrate(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    dtype: mx.Dtype,
    reading: Callable[[], Reading | None] = lambda: None,
    unit: str = "kelvin",
    hidden: stream.Hidden | None = None,
    relay: Relay | None = None,
) -> tuple[Statistics, stream.Hidden]:
    """Statistics of all layers over token ids [(B, T)], and the teacher's final hidden states [(B, T, D)].

    `reading()` is asked once per batch, as the batch enters the model: its T_b weighs that batch in AAIS. If any batch
    has no T_b, all weigh 1, and `measured` is False. hidden: a place for the hidden states other than memory. Several
    machines each bring their own batches and get the statistics of all; of a `relay` each looks at its own blocks."""
    s = shape_of(checkpoint.config)
    readings: list[Reading | None] = []
    weights: list[float | None] = []
    out = Statistics(hidden=(norms := Sums.zeros(s.hidden)))
    source = relay or stream.Stream(checkpoint, dtype, direct=hidden is not None)
    hidden = source.embed(batches, hidden)
    for i in range(s.layers):  # those that another machine looks at stay zero
        out.ffn[i], out.heads[i], out.block[i] = Sums.zeros(s.ffn), Sums.zeros(s.heads), 0.0
    for i, block in source.blocks():
        for part, (name, *_) in arch.readers(block).values():
            block[part][name] = stream.InputRecorder(block[part][name])
        distances = []

        def enter(into: mx.array, block: nn.Module = block) -> tuple[mx.array, dict[str, mx.array]]:
            if len(readings) < len(hidden):  # in the first block
                readings.append(reading())
                weights.append(importance.weight_of(readings[-1], unit))
            after = block(into, load.mask(source.args, block, into))
            return after, _look(block, s.heads, into, after)

        for b, (after, samples) in enumerate(lanes.each(enter, hidden)):
            hidden[b] = source.finite(after) if b == 0 else after
            seen = {name: np.array(sample, np.float64) for name, sample in samples.items()}
            distances.append(seen["block"])
            for axis, sums in (("ffn", out.ffn[i]), ("heads", out.heads[i]), ("norm1", norms), ("norm2", norms)):
                squares, tokens = seen[axis + " squares"], after.shape[0] * after.shape[1]
                square = squares.reshape(len(seen[axis]), -1).sum(axis=-1) / tokens  # of a head: its channels'
                sums.add(seen[axis], square, weights[b] or 1.0)
        out.block[i] = float(np.sum(distances))
    _merge(out, len(batches))
    out.measured = not distributed.any_rank(None in weights)
    if not out.measured:
        for sums in (*out.ffn.values(), *out.heads.values(), norms):
            sums.warm = sums.square.copy()
    known = [r for r in readings if r is not None]
    air = distributed.all_gather([r.ambient_c for r in known if r.ambient_c is not None])
    out.ambient_c = list(chain.from_iterable(air))
    altitudes = distributed.all_gather(known[-1].altitude_m if known else None)
    out.altitude_m = next((m for m in altitudes if m is not None), None)
    return out, source.norm(hidden)
