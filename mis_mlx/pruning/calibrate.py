"""One streamed calibration pass: statistics of every axis that can shrink, for all batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths import importance
from mis_mlx.maths.importance import ExpertSums, Statistics, Sums
from mis_mlx.models import arch, distributed, pipeline_parallel, policy, stream
from mis_mlx.models.config import ffn_size, shape_of
from mis_mlx.types import Checkpoint, Reading


def _look(block: nn.Module, heads: int, into: mx.array, out: mx.array) -> dict[str, mx.array]:
    """What one batch says of one block, lazy: importance and squares by axis, and of the block
    itself.
    """
    seen = {
        axis: block[part][name].take() for axis, (part, (name, *_)) in arch.readers(block).items()
    }
    return _samples(seen, heads, into, out)


def _samples(
    seen: Mapping[str, mx.array], heads: int, into: mx.array, out: mx.array
) -> dict[str, mx.array]:
    """The same of what a batch's readers saw."""
    samples = {"block": importance.block_sample(into, out)}
    for axis, x in seen.items():
        samples[axis] = (
            importance.head_sample(x, heads) if axis == "heads" else importance.channel_sample(x)
        )
        samples[axis + " squares"] = importance.square_sample(x)
    return samples


def _entered(
    source: stream.Stream, block: nn.Module, hidden: stream.Hidden, weight: Callable[[int], float]
) -> Iterator[tuple[mx.array, dict[str, mx.array]]]:
    """Every batch behind a block, and what it says of the block, evaluated. weight(batch): asked as
    it enters.
    """
    if policy.name() != "cpu":
        yield from _stacked(source, block, hidden, weight)
        return
    heads = shape_of(source.checkpoint.config).heads

    def enter(b: int, into: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        weight(b)
        after = source.run(source.at, block, b, into)
        return after, _look(block, heads, into, after)

    yield from lanes.each(enter, range(len(hidden)), hidden)


def _stacked(
    source: stream.Stream, block: nn.Module, hidden: stream.Hidden, weight: Callable[[int], float]
) -> Iterator[tuple[mx.array, dict[str, mx.array]]]:
    """The same on a GPU: several batches in one pass, each looked at by itself."""
    heads = shape_of(source.checkpoint.config).heads
    for first, some in source.stacks(hidden):
        count = len(some)
        weight(first + count - 1)
        after = stream.split(source.run(source.at, block, first, stream.joined(some)), count)
        readers = arch.readers(block).items()
        seen = {
            axis: stream.split(block[part][name].take(), count)
            for axis, (part, (name, *_)) in readers
        }
        found = []
        for k in range(count):
            of_batch = {axis: parts[k] for axis, parts in seen.items()}
            found.append((after[k], _samples(of_batch, heads, some[k], after[k])))
        stream.evaluate_now(found)
        yield from found


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


def _air(out: Statistics, readings: Sequence[Reading | None], unit: str) -> None:
    """The air and altitude of all machines' batches; where one has no T_env, none weighs more than
    another.
    """
    out.measured = not distributed.any_rank(
        None in [importance.weight_of(r, unit) for r in readings]
    )
    if not out.measured:
        for sums in (
            *out.ffn.values(),
            *out.heads.values(),
            *out.experts.values(),
            *out.hidden.values(),
        ):
            sums.warm = sums.square.copy()
    known = [r for r in readings if r is not None]
    celsius = distributed.all_gather([r.ambient_c for r in known if r.ambient_c is not None])
    out.ambient_c = list(chain.from_iterable(celsius))
    altitudes = distributed.all_gather(known[-1].altitude_m if known else None)
    out.altitude_m = next((m for m in altitudes if m is not None), None)


def _mixed(
    source: stream.Stream,
    block: nn.Module,
    hidden: stream.Hidden,
    experts: ExpertSums,
    neurons: Sums,
    weight: Callable[[int], float],
) -> Iterator[tuple[mx.array, dict[str, mx.array]]]:
    """Every batch behind a block of experts, and what it says of the block beside these. Added up
    meanwhile: scores of the experts, and of their neurons, whose activations count as their
    expert's gate lets them.
    """
    # of a batch: of |a| and a^2, (2, E, F)
    s = shape_of(source.checkpoint.config)
    sums = dict[int, np.ndarray]()

    def meet(b: int, e: int, gates: np.ndarray, activations: mx.array, made: mx.array) -> None:
        experts.add(e, gates, made, weight(b))
        gated = mx.abs(activations.astype(mx.float32)) * mx.array(gates)[:, None]
        seen = sums.setdefault(b, np.zeros((2, s.experts, s.ffn)))
        seen[:, e] = np.array(mx.stack([gated.sum(axis=0), mx.square(gated).sum(axis=0)]))

    for b, after in enumerate(source.mixed(block, hidden, meet)):
        mean, square = sums.pop(b).reshape(2, -1) / (after.shape[0] * after.shape[1])
        neurons.add(mean, square, weight(b))
        yield after, _look(block, s.heads, hidden[b], after)


def calibrate(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    reading: Callable[[], Reading | None] = lambda: None,
    unit: str = "kelvin",
    hidden: stream.Hidden | None = None,
    relay: pipeline_parallel.Relay | None = None,
) -> tuple[Statistics, stream.Hidden]:
    """Statistics of all layers over token ids [(B, T)], and the teacher's final hidden states [(B,
    T, D)].

    `reading()` is asked once per batch, as the batch enters the model: its T_b weighs that batch in
    AAIS. If any batch has no T_b, all weigh 1, and `measured` is False. hidden: a place for the
    hidden states other than memory. Several machines each bring their own batches and get the
    statistics of all; of a `relay` each looks at its own blocks.
    """
    s = shape_of(checkpoint.config)
    out = Statistics(hidden={-1: (norms := Sums(*np.zeros((3, s.hidden))))})
    direct = not isinstance(hidden, list | None)
    source = relay or stream.Stream(checkpoint, policy.compute_dtype(checkpoint), direct=direct)
    hidden = source.embed(batches, hidden)
    experts = dict[int, ExpertSums]()
    readings = list[Reading | None]()

    # its T_env, measured once, as it enters the model; 1 where nothing is known
    def weight(batch: int) -> float:
        while len(readings) <= batch:
            readings.append(reading())
        return importance.weight_of(readings[batch], unit) or 1.0

    for i in range(s.layers):  # those that another machine looks at stay zero
        out.ffn[i] = Sums(*np.zeros((3, ffn_size(checkpoint.config, i) * max(1, s.experts))))
        out.block[i] = 0.0
        out.heads[i] = Sums(*np.zeros((3, s.heads)))
        experts |= {i: ExpertSums(*np.zeros((3, s.experts)))} if s.experts else {}
    for i, block in source.blocks():
        for part, (name, *_) in arch.readers(block).values():
            block[part][name] = stream.InputRecorder(block[part][name])
        distances = []

        looked = (
            _mixed(source, block, hidden, experts[i], out.ffn[i], weight) if s.experts else None
        )
        for b, (after, samples) in enumerate(looked or _entered(source, block, hidden, weight)):
            hidden[b] = source.finite(after) if b == 0 else after
            seen = {name: np.array(sample, np.float64) for name, sample in samples.items()}
            distances.append(seen["block"])
            for axis, sums in (
                ("ffn", out.ffn[i]),
                ("heads", out.heads[i]),
                ("norm1", norms),
                ("norm2", norms),
            ):
                if axis in seen:
                    squares = seen[axis + " squares"]
                    tokens = after.shape[0] * after.shape[1]
                    # Of a head: its channels'.
                    sums.add(
                        seen[axis],
                        squares.reshape(len(seen[axis]), -1).sum(axis=-1) / tokens,
                        weight(b),
                    )
        out.block[i] = float(np.sum(distances))
    _merge(out, experts, len(batches))
    _air(out, readings, unit)
    return out, source.norm(hidden)
