"""One streamed calibration pass: statistics of every axis that can shrink, for all batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths import importance
from mis_mlx.maths.importance import ExpertSums, Statistics, Sums
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream, sweep
from mis_mlx.models.passing.pass_cost import streamed_pass
from mis_mlx.types import Air, Checkpoint

RANKED = ("ffn", "heads", "channels")
Weight = Callable[[int], float]  # of a batch: its T_env, asked as the batch enters
Samples = dict[str, mx.array]  # of a batch: sums of squares by axis, and the block's distance
Seen = tuple[int, Samples]  # of a batch: its tokens, and samples


def _entered(
    turn: sweep.BlockTurn,
    experts: ExpertSums | None,
    neurons: Sums,
    weight: Weight,
) -> Iterator[tuple[int, Seen]]:
    """(number, what it says) of every batch, which is behind the block then.

    Of a block of experts these and their neurons are added up meanwhile.
    """

    def look(stack: sweep.Stack) -> list[Seen]:
        for b in stack.numbers:
            weight(b)  # T_env is measured as the batch enters the block, not when its samples come
        found = []
        for window in stack.apart():
            texts, length = window.into.shape[:2]
            samples = {"block": importance.block_sample(window.into, window.out)}
            for axis, x in window.taken.items():
                samples[axis] = importance.square_sample(x)
            found.append((texts * length, samples))
        return found

    # All matrices that read an axis see the same: the first one's input is looked at.
    readers = arch.readers(turn.block)
    places = {axis: (part, names[0]) for axis, (part, names) in readers.items() if axis in RANKED}
    asked = _Asked(turn, experts, neurons, weight) if experts else None
    for numbers, found in turn.through(look, places, visit=asked.visit if asked else None):
        if asked:
            asked.add(numbers, found)
        yield from zip(numbers, found, strict=True)


class _Asked:
    """A mixture's experts as a pass asks them: their scores, and those of their neurons.

    Neurons count as their expert's gate lets them.
    """

    def __init__(
        self, turn: sweep.BlockTurn, experts: ExpertSums, neurons: Sums, weight: Weight
    ) -> None:
        self._shape = shape_of(turn.source.checkpoint.config)
        self._experts = experts
        self._neurons = neurons
        self._weight = weight
        self._sums = dict[int, np.ndarray]()  # of a batch: of a^2, (E, F)

    def visit(
        self, b: int, e: int, gates: np.ndarray, activations: mx.array, outputs: mx.array
    ) -> None:
        """One expert's part: gates (n,), activations (n, F) and outputs (n, D) of its tokens."""
        s = self._shape
        self._experts.add(e, gates, outputs, self._weight(b))
        if b not in self._sums:
            self._sums[b] = np.zeros((s.experts, s.ffn))
        # the expert's neurons, as far as the token's gate lets them through
        gated = activations.astype(mx.float32) * mx.array(gates)[:, None]
        self._sums[b][e] = np.array(mx.square(gated).sum(axis=0))

    def add(self, numbers: range, found: Sequence[Seen]) -> None:
        """All experts have seen these batches, so their sums become means over their tokens."""
        for b, (tokens, _) in zip(numbers, found, strict=True):
            self._neurons.add(self._sums.pop(b).ravel() / tokens, self._weight(b))


def _air(out: Statistics, airs: Sequence[Air], *, by_air: bool) -> None:
    """The air and altitude of all batches.

    Where one batch has no T_env, none weighs more than another.
    """
    out.measured = by_air and all(air.celsius is not None for air in airs)
    if not out.measured:
        layers = (out.ffn, out.heads, out.channels, out.experts)
        for sums in chain.from_iterable(axis.values() for axis in layers):
            sums.env_weighted = sums.square.copy()
    out.ambient_c = [air.celsius for air in airs if air.celsius is not None]
    out.altitude_m = airs[-1].altitude_m if airs else None


def _zero_sums(units: int) -> Sums:
    """Sums of an axis of so many units before the first batch."""
    square, warm = np.zeros((2, units))
    return Sums(square, warm)


def calibrate(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    air: Callable[[], Air] = Air,
    by_air: bool = True,
    hidden: stream.Hidden | None = None,
) -> tuple[Statistics, stream.Hidden]:
    """Statistics of all layers over token ids [(B, T)], and the teacher's final hidden states.

    These are [(B, T, D)]. `air()` is asked once per batch, as the batch enters the model: its
    T_b weighs that batch in AAIS. If any batch has no T_b, all weigh 1, and `measured` is False.
    by_air: whether batches weigh by their air at all.
    hidden: a place for the hidden states other than memory.
    """
    out, experts = _nothing_yet(checkpoint.config)
    # Hidden states go to disk where the budget is small; then weights bypass the page cache, too.
    direct = not isinstance(hidden, list | None)
    source = stream.Stream(checkpoint, precision.dtype_of(checkpoint), direct=direct)
    hidden = source.embed(batches, hidden)
    airs = list[Air]()

    # its T_env, measured once, as it enters the model; 1 where nothing is known
    def weight(batch: int) -> float:
        while len(airs) <= batch:
            airs.append(air())
        return importance.weight_of(airs[batch]) if by_air else 1.0

    for turn in source.sweep(hidden):
        i = turn.number
        distances = []
        # Every batch goes through the block and leaves its samples (units,) of each axis.
        for b, (tokens, samples) in _entered(turn, experts.get(i), out.ffn[i], weight):
            seen = {name: np.array(sample, np.float64) for name, sample in samples.items()}
            distances.append(seen["block"])
            _add(out, i, seen, tokens=tokens, weight=weight(b))
        out.block[i] = float(np.sum(distances))
    for i, distance in out.block.items():  # sums over batches become means
        out.block[i] = distance / len(batches)
    for i, layer in experts.items():
        out.experts[i] = layer.scores()
    _air(out, airs, by_air=by_air)
    return out, source.norm(hidden)


def _nothing_yet(config: Mapping[str, Any]) -> tuple[Statistics, dict[int, ExpertSums]]:
    """Sums of all layers before the first batch."""
    s = shape_of(config)
    out = Statistics()
    experts = dict[int, ExpertSums]()
    for i in range(s.layers):
        neurons = family(config).ffn_size(i) * max(1, s.experts)
        out.ffn[i] = _zero_sums(neurons)
        out.block[i] = 0.0
        if family(config).attends(i):
            out.heads[i] = _zero_sums(s.heads)
        else:
            out.channels[i] = _zero_sums(s.hidden)
        if s.experts:
            routed, gated, warm = np.zeros((3, s.experts))
            experts[i] = ExpertSums(routed, gated, warm)
    return out, experts


def _add(
    out: Statistics,
    layer: int,
    seen: Mapping[str, np.ndarray],
    *,
    tokens: int,
    weight: float,
) -> None:
    """Add a batch's samples of a layer, of so many tokens, to the sums of every axis."""
    sums = {
        "ffn": out.ffn[layer],
        "heads": out.heads.get(layer),
        "channels": out.channels.get(layer),
    }
    for axis, axis_sums in sums.items():
        if axis in seen and axis_sums is not None:
            # A head has the squares of all of its channels.
            units = len(axis_sums.square)
            squares = seen[axis].reshape(units, -1).sum(axis=-1)
            axis_sums.add(squares / tokens, weight)


def calibration_cost(
    t: ModelSize, windows: int, length: int, limit: int, *, rotation: bool, beside_bytes: int = 0
) -> StageCost:
    """The passes that say what to keep: one, and two more for a rotation.

    rotation: the hidden size is cut along directions. That takes D x D sums and their eigenvectors,
    in float64. Hidden states stay in memory as far as they fit besides these, for the same place
    serves all passes. beside_bytes: held by others.
    """
    square = t.shape.hidden**2
    sums = 5 * 8 * square if rotation else 0
    one_pass = streamed_pass(
        "calibration",
        t,
        tokens=windows * length,
        length=length,
        limit_bytes=limit,
        head=False,
        beside_bytes=sums + beside_bytes,
    )
    if not rotation:
        return one_pass
    tokens = windows * length
    turning = 4.0 * square * (t.shape.layers + 1) * tokens
    return replace(one_pass.repeated(3), flops=3 * one_pass.flops + turning)
