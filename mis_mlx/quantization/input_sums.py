"""Sums over text by which a block's matrices are rounded: what goes into them, and what they lack.

Two states of every window come to a block: as the rounded blocks before it make them, and as the
blocks were. A matrix reads the first, and lacks what would bring the model to the second.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import host_losses
from mis_mlx.maths import gptq, reconstruction
from mis_mlx.models.architectures import arch, sizes
from mis_mlx.models.architectures.readers import WRITERS
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import residency, sweep
from mis_mlx.models.passing.pass_cost import parallel_windows
from mis_mlx.models.passing.stream import Hidden
from mis_mlx.types import MisError

# left^T right (a, b) of some tokens' (n, a) and (n, b); where that is wide, the two themselves
Summand = mx.array | tuple[mx.array, mx.array]
Products = tuple[Summand, Summand]  # what is added to a gram, and to what inputs or outputs lack


class Sums(NamedTuple):
    """Over all tokens' inputs a to the matrices that read an axis, in `reconstruction.precision`.

    gram: sum of a a^T (in, in); of a wide one only the upper triangle is whole, which is what
    `gptq.factorize` reads. missed: sum of d a^T; None where nobody makes up for anything.
    of_outputs: d is what the outputs of the one matrix lack, (out, in); else what the inputs lack,
    (in, in).
    """

    gram: np.ndarray
    missed: np.ndarray | None
    of_outputs: bool


class _Gathering:
    """The sums of some axes of a block under way."""

    def __init__(self, turn: sweep.BlockTurn, axes: Sequence[str], *, makes_up: bool = True):
        self.places = {}
        self.sums = dict[str, Sums]()
        self.writers = dict[str, mx.array]()  # matrices that write into the stream
        self.where = f"{turn.source.checkpoint.path}: {arch.block_prefix(turn.number)}"
        for axis, (part, names) in arch.readers(turn.block).items():
            if axis not in axes:
                continue
            # The matrices that read an axis have one input: the first one's is looked at.
            self.places[axis] = (part, names[0])
            weight = turn.block[part][names[0]].weight
            outputs, inputs = weight.shape
            writes = names[0] in WRITERS
            if writes:
                self.writers[axis] = weight
            kind = reconstruction.precision(inputs)
            gram = np.zeros((inputs, inputs), kind)
            missed = None
            if makes_up:
                missed = np.zeros((outputs if writes else inputs, inputs), kind)
            self.sums[axis] = Sums(gram, missed, writes)

    def add(self, axis: str, products: Products) -> None:
        """Add some windows' products."""
        where = f"{self.where}{'.'.join(self.places[axis])}"
        gram, missed = products
        sums = self.sums[axis]
        add(sums.gram, gram, where, triangle=True)
        if sums.missed is not None:
            add(sums.missed, missed, where, triangle=False)


def of_inputs(turn: sweep.BlockTurn, axes: Sequence[str]) -> dict[str, Sums]:
    """{axis: its sums} of what goes in alone.

    Products of one batch are float32. MisError when one overflows.
    """
    gathering = _Gathering(turn, axes, makes_up=False)

    # A sum does not ask which window a token belongs to: all windows of a stack are one product.
    def look(own: sweep.Stack) -> dict[str, Summand]:
        inputs = {axis: rows(taken) for axis, taken in own.taken.items()}
        return {axis: summand(array, array) for axis, array in inputs.items()}

    for products in turn.look(look, gathering.places):
        for axis, product in products.items():
            gathering.add(axis, (product, product))
    return gathering.sums


def of_unrounded(
    turn: sweep.BlockTurn, unrounded: sweep.BlockTurn, axes: Sequence[str]
) -> dict[str, Sums]:
    """{axis: its sums}, while all weights of the block are as they were.

    turn: of the windows as the rounded blocks make them; unrounded: as the blocks were. What
    attention writes lacks all that the stream lacks then; behind a norm it lacks its own outputs.
    MisError as of `of_inputs`.
    """
    gathering = _Gathering(turn, axes)
    to_stream = not sizes.norms_outputs(turn.source.checkpoint.config)
    share = _share(turn.block)

    def look(own: sweep.Stack, other: sweep.Stack) -> dict[str, Products]:
        products = {}
        for axis, taken in own.taken.items():
            inputs = rows(taken)
            lacks = rows(other.taken[axis]) - inputs
            weight = gathering.writers.get(axis)
            if weight is not None:
                lacks = lacks @ weight.astype(mx.float32).T
                if to_stream:
                    lacks = lacks + (rows(other.into) - rows(own.into)) / share
            products[axis] = summand(inputs, inputs), summand(lacks, inputs)
        return products

    for products in turn.look_beside(unrounded, look, gathering.places):
        for axis, of_axis in products.items():
            gathering.add(axis, of_axis)
    return gathering.sums


def of_stream(turn: sweep.BlockTurn, wanted: Hidden, axis: str) -> dict[str, Sums]:
    """{axis: its sums} of the matrix that writes last, as the block's weights are now.

    wanted: (B, T, D) of every window, the stream behind the block as it was.
    """
    gathering = _Gathering(turn, [axis])
    share = _share(turn.block)

    def look(own: sweep.Stack) -> Products:
        inputs = rows(own.taken[axis])
        goal = sweep.joined([wanted[number] for number in own.numbers])
        lacks = (rows(goal) - rows(own.out)) / share
        return summand(inputs, inputs), summand(lacks, inputs)

    for products in turn.look(look, gathering.places):
        gathering.add(axis, products)
    return gathering.sums


def _share(block: nn.Module) -> float:
    """The share of what matrices write that is added to the stream: Granite has less than 1."""
    return float(getattr(block, "residual_multiplier", 1.0))


def rows(states: mx.array) -> mx.array:
    """(..., n) -> (tokens, n) float32."""
    return states.reshape(-1, states.shape[-1]).astype(mx.float32)


def summand(left: mx.array, right: mx.array) -> Summand:
    """What `add` adds for some tokens."""
    if reconstruction.is_wide(right.shape[1]):
        return left, right
    return left.T @ right


def add(sums: np.ndarray, seen: Summand, where: str, *, triangle: bool) -> None:
    """Add the product of some tokens to the sums (a, b).

    triangle: of wide sums the upper triangle is enough. MisError, with `where`, when the product
    overflows.
    """
    slabs: Iterable[tuple[int, int, mx.array]]
    if isinstance(seen, mx.array):
        slabs = [(0, 0, seen)]
    else:
        slabs = _product_slabs(*seen, triangle=triangle)
    for row, column, product in slabs:
        values = host_losses.view(product)
        # Checked before it is added: a sum with one infinity is lost. By numpy, in place: MLX takes
        # as long for that on a CPU as for the product.
        if not np.isfinite(values).all():
            raise MisError(f"{where} meets values that are not finite: use plain rounding")
        sums[row : row + len(values), column:] += values


def _product_slabs(
    left: mx.array, right: mx.array, *, triangle: bool
) -> Iterator[tuple[int, int, mx.array]]:
    """(first row, first column, rows of left^T right from that column on), in slabs."""
    for row in range(0, left.shape[1], gptq.PANEL):
        column = row if triangle else 0
        yield row, column, left[:, row : row + gptq.PANEL].T @ right[:, column:]


Sides = Sequence[tuple[int, int]]  # (inputs, rows of `Sums.missed`) of some axes


def sums_bytes(sides: Sides) -> int:
    """The sums of some axes."""
    total = 0
    for inputs, missed in sides:
        item = np.dtype(reconstruction.precision(inputs)).itemsize
        total += item * inputs * (inputs + missed)
    return total


def gathering_bytes(m: ModelSize, sides: Sides, length: int) -> int:
    """What is added to them, and the inputs of both kinds of windows, which are there together.

    Products of one window in every stream, of wide ones a slab in numpy and in MLX; a GPU gets
    several windows at once.
    """
    tokens = length
    if m.gpu:
        tokens *= residency.batches_per_pass(m.config, length, length)
    total = 0
    for inputs, missed in sides:
        total += parallel_windows(m) * 4 * (inputs + missed) * tokens
        if reconstruction.is_wide(inputs):
            total += 2 * 4 * inputs * gptq.PANEL
        else:
            total += parallel_windows(m) * 4 * inputs * (inputs + missed)
    return total
