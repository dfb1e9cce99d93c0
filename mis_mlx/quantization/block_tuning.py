"""Scales and biases of a rounded block learn to give what the block gave before it was rounded.

GPTQ (quantization/stage) fits each matrix to its own output. Here the matrices of a block learn
together, by gradient steps on calibration windows: the target is the unrounded block's output on
the hidden states that the rounded blocks before it make. Integers stay as they are. Every fourth
window is held out, and a block keeps what it has learned only if its error falls on these.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.maths import rounding
from mis_mlx.models import arch, block_inputs, stream
from mis_mlx.models.families import Config, family
from mis_mlx.models.stream import Hidden
from mis_mlx.quantization import learned_scales
from mis_mlx.quantization.packed_format import Format, Formats, RoundedBlock, weight_of
from mis_mlx.settings.workloads import TUNED_AT_ONCE, TUNING_STEPS
from mis_mlx.types import MisError

HELD_OUT = 4  # every fourth window judges
LEAST_WINDOWS = 2 * HELD_OUT
# A step's share of a tensor's root mean square, of 0 bits; every bit halves it.
RATE = 16e-3
DECAYS = (0.9, 0.99)  # of Adam's two means
TINY = 1e-12
GRIDS = ("scales", "biases")  # what learns


class _Learner(NamedTuple):
    """A matrix of a block while it learns: where it is, and how it is packed.

    linear: the layer whose place `grid` takes meanwhile. dtype: of the weight that it gets back.
    """

    part: str
    name: str
    path: str
    kind: Format
    grid: learned_scales.TrainableQuantizedLinear
    linear: nn.Module
    dtype: mx.Dtype


def check(config: Config, windows: int) -> None:
    """MisError where blocks of this model cannot learn, or where there are too few windows."""
    if not block_inputs.plain(config):
        name = family(config).name
        raise MisError(
            f"--q-method blocks does not know {name}, whose blocks take more than hidden states: "
            f"use --q-method gptq"
        )
    if windows < LEAST_WINDOWS:
        raise MisError(
            f"--q-method blocks needs {LEAST_WINDOWS} windows of text, some to learn from and some "
            f"to judge by, but --num-samples is {windows}: give {LEAST_WINDOWS} or more"
        )


class BlockTuning:
    """Tunes one block after the other. targets: a place for the outputs of the unrounded block.

    seed: of the windows of a step.
    """

    def __init__(self, targets: Hidden, seed: int = 0):
        self.targets = targets
        self.kept = 0  # blocks that are better for it
        self._seed = seed
        self._norm = 0.0  # squares of what the block adds to its input

    def look(self, source: stream.Stream, block: nn.Module, hidden: Hidden) -> None:
        """Remember what the block gives on hidden [(B, T, D)], before it is rounded."""
        outputs = source.map_batches(partial(source.run, source.block_index, block), hidden)
        self._norm = 0.0
        for b, output in enumerate(outputs):
            if b < len(self.targets):
                self.targets[b] = output
            else:
                self.targets.append(output)
            if _judges(b):
                self._norm += _squares(output, hidden[b])

    def tuned(
        self,
        source: stream.Stream,
        block: nn.Module,
        hidden: Hidden,
        rounded: RoundedBlock,
        plan: Formats,
    ) -> RoundedBlock:
        """The block's matrices with learned scales and biases, or as they are where that is better.

        The block's layers are left with the values of the result.
        """
        learners = _learners(source, block, rounded, plan)
        before = self._error(source, block, hidden)
        self._learn(source, block, hidden, learners)
        after = self._error(source, block, hidden)
        better = after < before
        result = dict(rounded)
        if better:
            self.kept += 1
            for learner in learners:
                result[learner.path] = _packed(rounded[learner.path], learner)
        for part, name, path, kind, _, linear, dtype in learners:
            linear.weight = weight_of(result[path], kind, dtype)
            block[part][name] = linear
        share = after / max(before, TINY)
        verdict = "not kept"
        if better:
            verdict = "kept"
        cli.say(
            f"block {source.block_index}: {share:.3f} of its error on held-out windows, {verdict}"
        )
        return result

    def _error(self, source: stream.Stream, block: nn.Module, hidden: Hidden) -> float:
        """The squared error of the block's output on held-out windows, as a share."""
        total = 0.0
        for b in range(len(self.targets)):
            if _judges(b):
                output = source.run(source.block_index, block, b, hidden[b])
                total += _squares(output, self.targets[b])
        return total / max(self._norm, TINY)

    def _learn(
        self,
        source: stream.Stream,
        block: nn.Module,
        hidden: Hidden,
        learners: list[_Learner],
    ) -> None:
        """Adam's steps on the learners' scales and biases; float16 holds them at the end."""
        block.freeze()
        for learner in learners:
            learner.grid.unfreeze(keys=list(GRIDS))

        def loss(block: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
            # A plain block does not ask which window it sees: see `check`.
            output = source.run(source.block_index, block, 0, inputs)
            return mx.square(_difference(output, targets)).sum()

        gradient_of = nn.value_and_grad(block, loss)
        steps = [_Adam(learner) for learner in learners]
        learning = [b for b in range(len(self.targets)) if not _judges(b)]
        chance = np.random.default_rng((self._seed, source.block_index))
        for step in range(TUNING_STEPS):
            windows = chance.choice(learning, size=min(TUNED_AT_ONCE, len(learning)), replace=False)
            # Together, so that each matrix is made once.
            # In float32, so that no gradient of a large error ends in float16.
            inputs = stream.joined([hidden[b] for b in windows]).astype(mx.float32)
            targets = stream.joined([self.targets[b] for b in windows])
            _, gradients = gradient_of(block, inputs, targets)
            decay = (1 + math.cos(math.pi * step / TUNING_STEPS)) / 2
            for learner, adam in zip(learners, steps, strict=True):
                adam.step(gradients[learner.part][learner.name], decay)
            stream.evaluate_now([adam.arrays for adam in steps])
        for learner in learners:
            for key in GRIDS:
                stored = learner.grid[key].astype(mx.float16)
                learner.grid[key] = stored.astype(mx.float32)


class _Adam:
    """Adam's state for one matrix. A step is a share of the tensor's root mean square."""

    def __init__(self, learner: _Learner):
        self._grid = learner.grid
        self._count = 0
        self._rates = {}
        self._means = {}
        self._squares = {}
        for key in GRIDS:
            tensor = learner.grid[key]
            size = mx.sqrt(mx.square(tensor).mean())
            self._rates[key] = size * (RATE / 2**learner.kind.bits)
            self._means[key] = mx.zeros_like(tensor)
            self._squares[key] = mx.zeros_like(tensor)

    @property
    def arrays(self) -> list[mx.array]:
        """All that a step changes, to be evaluated."""
        learned = [self._grid[key] for key in GRIDS]
        return [*learned, *self._means.values(), *self._squares.values()]

    def step(self, gradients: Mapping[str, mx.array], decay: float) -> None:
        """One step. decay: the share of the rate that is left."""
        self._count += 1
        slow, slower = DECAYS
        for key in GRIDS:
            gradient = gradients[key]
            mean = slow * self._means[key] + (1 - slow) * gradient
            old_square = slower * self._squares[key]
            square = old_square + (1 - slower) * mx.square(gradient)
            self._means[key] = mean
            self._squares[key] = square
            direction = mean / (1 - slow**self._count)
            variance = square / (1 - slower**self._count)
            width = mx.sqrt(variance) + TINY
            rate = decay * self._rates[key]
            move = rate * direction / width
            self._grid[key] = self._grid[key] - move


def _judges(b: int) -> bool:
    """Whether the b-th window judges; the others teach."""
    return b % HELD_OUT == HELD_OUT - 1


def _difference(output: mx.array, target: mx.array) -> mx.array:
    """In float32: squares of small differences end in float16."""
    return output.astype(mx.float32) - target.astype(mx.float32)


def _squares(output: mx.array, target: mx.array) -> float:
    """The squared distance of two outputs (B, T, D)."""
    return float(mx.square(_difference(output, target)).sum().item())  # type: ignore[arg-type]


def _paths(source: stream.Stream, block: nn.Module) -> list[tuple[str, str, str]]:
    """(part, name, module path) of every matrix of the block that the source gave out last."""
    found = []
    for part, names in arch.readers(block).values():
        for name in names:
            found.append((part, name, f"model.layers.{source.block_index}.{part}.{name}"))
    return found


def _learners(
    source: stream.Stream,
    block: nn.Module,
    rounded: RoundedBlock,
    plan: Formats,
) -> list[_Learner]:
    """Put layers whose scales and biases learn into the block, in place of rounded ones."""
    learners = []
    for part, name, path in _paths(source, block):
        linear = block[part][name]
        grid = learned_scales.TrainableQuantizedLinear(
            rounded[path], plan[path], linear.get("bias")
        )
        stream.evaluate_now(grid._stored, grid.scales, grid.biases)
        block[part][name] = grid
        # The rounded weight goes: it is made again at the end, of what was learned or was there.
        dtype = linear.pop("weight").dtype
        learner = _Learner(
            part, name, path=path, kind=plan[path], grid=grid, linear=linear, dtype=dtype
        )
        learners.append(learner)
    return learners


def _packed(rounded: rounding.Packed, learner: _Learner) -> rounding.Packed:
    """A matrix as stored, with the learner's scales and biases."""
    scales = learner.grid.scales.astype(mx.float16)
    biases = learner.grid.biases.astype(mx.float16)
    stream.evaluate_now(scales, biases)
    return rounded[0], scales, biases
