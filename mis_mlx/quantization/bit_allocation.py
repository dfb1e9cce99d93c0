"""Choose a format for every matrix under a limit on bits, by the cost of each matrix in fewer bits.

A cost is KL(model || model with that matrix rounded), from one pass forwards and one back. The KL
is at its minimum there, so a cost is half the Fisher information along the rounding error, half the
mean over windows of <d log p(drawn tokens) / dW, error>^2 (models/passing/backward_pass). Costs add
up as far as the second order reaches. For the embedding and the head the cost is also a mean over
errors (quantization/embedding_costs).

For N weights, F formats and windows of T tokens a batch of windows moves 20 N F bytes for the
errors; each window takes 8 N T operations (forwards twice, back to the inputs, gradients) and moves
(12 + 4 F) N bytes. Gradients and errors exist for a slab of rows at a time. 32 windows of 256
tokens, 7B, 5 formats: 9 TB, and a wait for each matrix and batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import precision, streams
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch, block_inputs, modules
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import backward_pass, stream, sweep
from mis_mlx.models.passing.stream import Batches, Hidden
from mis_mlx.quantization import format_costs, packed_format
from mis_mlx.quantization.embedding_costs import PerLayerCosts, VocabularyCosts
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import Checkpoint, MisError

Width = TypeVar("Width", int, float)  # bits of a weight, with its share of the scales or without

SLACK = 1e-9  # bits of a weight
# Bytes of what windows leave in a block, inputs and cotangents: 32 windows of 256 tokens in a model
# of 135 M. Each time they are full, all matrices are rounded to every format. It holds at least one
# window, and as many bytes as its own matrices have in float32.
HELD_BYTES = 288 * 2**20
SLAB = 2**18  # weights whose gradients and errors exist at once
SENSED = 8  # windows that say what bits cost in a search


def mixed(
    checkpoint: Checkpoint,
    batches: Batches,
    how: QuantizationConfig,
    seed: int = 0,
    kept: Hidden | None = None,
) -> tuple[packed_format.Formats, dict[str, Any]]:
    """(a format for every matrix; the costs behind the choice, ready for JSON).

    The formats take at most `how.target_bpw` bits per weight on average. batches: token ids [(B,
    T)]. seed: of the tokens that the model draws. kept: as in `backward_pass.input_gradients`.
    MisError as in `check`.
    """
    how = check(checkpoint.config, how)
    group = how.q_group_size
    nats = costs(checkpoint, batches, group, rounding.CANDIDATE_BITS, seed=seed, kept=kept)
    of_formats = format_costs.of_formats(checkpoint, nats, how)
    return chosen_layout(checkpoint.config, of_formats, how.target_bpw or 0.0)


def chosen_layout(
    config: Mapping[str, Any],
    of_formats: Mapping[str, format_costs.FormatCosts],
    target_bpw: float,
) -> tuple[packed_format.Formats, dict[str, Any]]:
    """`mixed`, where the cost of every matrix in every format is known, in nats per token."""
    shapes = arch.tensors_of(config)
    # No two formats of a matrix have the same bits per weight, so these stand for a format.
    by_bits: dict[str, dict[float, float]] = {}
    digits: dict[str, dict[str, float]] = {}
    sizes = {}
    for path, costs_of_path in of_formats.items():
        shape = shapes[f"{path}.weight"]
        sizes[path] = math.prod(shape)
        by_bits[path] = {}
        digits[path] = {}
        for kind, nats in costs_of_path.items():
            name = f"{kind.bits}/{kind.group}"
            digits[path][name] = round(nats, 9)
            width = kind.bits_per_weight
            by_bits[path][width] = nats
    widths = allocate(by_bits, sizes, target_bpw)
    chosen = {}
    bits = {}
    groups = {}
    predicted = 0.0
    for path, costs_of_path in of_formats.items():
        for kind, nats in costs_of_path.items():
            if kind.bits_per_weight != widths[path]:
                continue
            chosen[path] = kind
            bits[path] = kind.bits
            groups[path] = kind.group
            predicted += nats
    report = {
        "target_bpw": target_bpw,
        "nats": digits,  # "3/64": 3 bits in groups of 64
        "bits": bits,
        "groups": groups,
        "predicted_nats": predicted,
    }
    return chosen, report


def allocate(
    costs: Mapping[str, Mapping[Width, float]],
    sizes: Mapping[str, int],
    mean_bits: float,
) -> dict[str, Width]:
    """{name: bits} of the least cost with at most `mean_bits` on average; {} when none has so few.

    costs: {name: {bits: cost}}; a name without a choice has one number of bits. sizes: {name:
    weights}, by which the mean is weighted. Greedy along each name's lower convex hull, which is
    optimal but for the last step (Lagrange): a step that does not fit any more is passed over. That
    step can be most of the budget where the largest name is an embedding, so the largest one is
    tried in all its bits.
    """
    largest = max(sizes, key=lambda name: sizes[name])
    best: dict[str, Width] = {}
    least = math.inf
    for bits, cost in costs[largest].items():
        fixed = {**costs, largest: {bits: cost}}
        chosen = _greedy(fixed, sizes, mean_bits)
        total = sum(costs[name][b] for name, b in chosen.items())
        if chosen and (not best or total < least):
            best = chosen
            least = total
    return best


def _greedy(
    costs: Mapping[str, Mapping[Width, float]],
    sizes: Mapping[str, int],
    mean_bits: float,
) -> dict[str, Width]:
    """`allocate`, without the trials of the largest name."""
    chosen = {name: min(cost) for name, cost in costs.items()}
    # bits that may still be given out
    room = sum((mean_bits - chosen[name]) * size for name, size in sizes.items())
    # The least mean, written as a decimal fraction, may differ in its last digit.
    if room < -SLACK * sum(sizes.values()):
        return {}
    steps = []
    for name, cost in costs.items():
        steps += [(saved, name, bits) for saved, bits in _hull(cost, sizes[name])]
    stuck = set()
    # Steps of one hull save less and less, so sorting keeps them in their order.
    for _, name, bits in sorted(steps, key=lambda step: -step[0]):
        added = (bits - chosen[name]) * sizes[name]
        # After a step that did not fit, a name's later steps are no longer steps of its hull.
        if name in stuck or added > room:
            stuck.add(name)
            continue
        chosen[name] = bits
        room -= added
    return chosen


def _hull(cost: Mapping[Width, float], size: int) -> list[tuple[float, Width]]:
    """[(cost saved per added bit of a weight, bits then)] from the fewest bits on, steepest first.

    These are the steps of the lower convex hull of `cost`, as far as it falls.
    """
    bits = sorted(cost)
    steps = []
    start = 0
    while start + 1 < len(bits):
        before = bits[start]
        slopes = [(cost[before] - cost[b]) / (b - before) for b in bits[start + 1 :]]
        end = start + 1 + slopes.index(max(slopes))
        saved = cost[before] - cost[bits[end]]
        if saved <= 0:
            break
        added = (bits[end] - before) * size
        steps.append((saved / added, bits[end]))
        start = end
    return steps


def check(config: Mapping[str, Any], how: QuantizationConfig) -> QuantizationConfig:
    """`how` as `format_costs.for_model` decides it.

    MisError when the target lies outside the bits per weight that the formats can make.
    """
    target = how.target_bpw
    if target is None:
        return how
    how = format_costs.for_model(config, how)
    least, most = format_costs.limits(config, how)
    if least <= target <= most:
        return how
    if target > most:
        limit = f"above {most:g}, which 8 bits in groups of {how.q_group_size} take"
        raise MisError(f"--target-bpw {target:g} is {limit}: give {most:g} or less")
    shown = math.ceil(least * 1000) / 1000
    fewest = format_costs.fewest_bits(how)
    limit = f"below {shown:g}, the least that this model's matrices take in {fewest} bits"
    raise MisError(f"--target-bpw {target:g} is {limit}: give {shown:g} or more")


# One window in a block: the inputs of its matrices, {axis: (T, in)}, and for each matrix
# d log p / d output, [(T, out)].
Seen = tuple[dict[str, mx.array], list[mx.array]]
# A matrix of a block: the part that has it, its name there, the axis whose values it reads.
Matrix = tuple[str, str, str]


def costs(
    checkpoint: Checkpoint,
    batches: Batches,
    group: int,
    bits: Sequence[int],
    seed: int = 0,
    kept: Hidden | None = None,
    *,
    fit: bool = False,
) -> dict[str, dict[int, float]]:
    """{module path: {bits: nats per token}} of every matrix, rounded in affine groups.

    batches, seed, kept: as in `mixed`. fit: values are those of `rounding.fitted`, whose cost is
    its share of the squared error that nearest values make.
    """
    args = family(checkpoint.config).model_args()
    nats: dict[str, dict[int, float]] = {}
    tokens = sum(batch.size for batch in batches)

    def visit(i: int, block: nn.Module) -> backward_pass.BlockBackward:
        # The pass back reaches block i: its matrices are rounded now, its windows come in turn.
        errors = _BlockErrors(args, block, group, bits, coming=len(batches))

        def through(
            inputs: Sequence[BlockInputs], above: Sequence[BlockOutputs]
        ) -> list[BlockInputs]:
            below = errors.backward(inputs, above)
            for name, squares in errors.complete.items():
                cost = (squares / (2 * tokens)).tolist()
                nats[f"model.layers.{i}.{name}"] = dict(zip(bits, cost, strict=True))
            return below

        return through

    vocabulary = VocabularyCosts(checkpoint, group)
    tables: list[VocabularyCosts | PerLayerCosts] = [vocabulary]
    hooks: dict[str, Any] = {"at_head": vocabulary.at_head}
    if family(checkpoint.config).side_width:
        per_layer = PerLayerCosts(checkpoint, batches, group)
        tables.append(per_layer)
        hooks["at_channels"] = per_layer.at_channels
    below = backward_pass.input_gradients(checkpoint, batches, visit, seed=seed, kept=kept, **hooks)
    for ids, cotangents in zip(batches, below, strict=True):
        vocabulary.at_rows(ids, cotangents)
    for table in tables:
        for path, squares in table.squares.items():
            # Half the mean over tokens; `squares` are of errors of 2^b - 1 times their size.
            nats[path] = {b: squares / (2 * tokens) / (2**b - 1) ** 2 for b in bits}
    if fit:
        _count_fitted(checkpoint, nats, group)
    return nats


def _count_fitted(
    checkpoint: Checkpoint,
    nats: Mapping[str, dict[int, float]],
    group: int,
) -> None:
    """Turn costs of nearest values into those of fitted grids: a cost is in step with its error."""
    for path, cost in nats.items():
        # Some rows tell what fitted grids leave of the error; of a large table some first ones.
        name = f"{path}.weight"
        rows = load.dense_sample(checkpoint, name)
        for bits in cost:
            cost[bits] *= rounding.fit_share(rows, group, bits, fused=precision.compiles())


class _BlockErrors:
    """Sums of <d log p / dW, error>^2 over windows, for every matrix of one block in every format.

    coming: batches that have yet to be taken back. complete: {part.name: sums (formats,) float64}
    of every matrix; empty until the last batch was taken back.
    """

    def __init__(
        self,
        args: object,
        block: nn.Module,
        group: int,
        bits: Sequence[int],
        coming: int,
    ):
        self.coming = coming
        self.complete: dict[str, np.ndarray] = {}
        self._group = group
        self._bits = bits
        self._matrices: list[Matrix] = []
        for axis, (part, names) in arch.readers(block).items():
            self._matrices += [(part, name, axis) for name in names]
        self._passes = partial(_backs, args, block, self._matrices)
        self._linears = [block[part][name] for part, name, _ in self._matrices]
        self._seen: list[Seen] = []
        # of squares over windows, (formats,) for each matrix
        self._sums = [mx.zeros((len(bits),)) for _ in self._matrices]
        # lazy: not made
        weights = sum(modules.dense_weight(linear).size for linear in self._linears)
        self._held_bytes = _held_bytes(weights)

    def backward(
        self,
        inputs: Sequence[BlockInputs],
        above: Sequence[BlockOutputs],
    ) -> list[BlockInputs]:
        """Cotangents of the inputs of some batches, from those of the outputs, `above`."""
        below = []
        for window, (cotangents, seen) in zip(inputs, self._passes(inputs, above), strict=True):
            below.append(window.like(cotangents))
            self._seen.append(seen)
        self.coming -= len(below)
        # Windows wait for each other, because the errors of all weights in all formats are made
        # anew for every set of windows. As many wait as fit, those that come next included.
        entered, outputs = seen
        nbytes = sum(array.nbytes for array in (*entered.values(), *outputs))
        if not self.coming or (len(self._seen) + len(below)) * nbytes > self._held_bytes:
            self._add_windows()
        if not self.coming:
            sums = np.array(mx.stack(self._sums), np.float64)
            names = [f"{part}.{name}" for part, name, _ in self._matrices]
            self.complete = dict(zip(names, sums, strict=True))
        return below

    def _add_windows(self) -> None:
        for k, (_, _, axis) in enumerate(self._matrices):
            pairs = [(inputs[axis], above[k]) for inputs, above in self._seen]
            products = _along(
                self._linears[k],
                pairs,
                group=self._group,
                bits=self._bits,
            )
            self._sums[k] = self._sums[k] + mx.square(products).sum(axis=0)
        # Evaluated before the windows go: a lazy sum would keep all of them.
        stream.evaluate_now(self._sums)
        self._seen.clear()


def _back(
    args: object,
    block: nn.Module,
    matrices: Sequence[Matrix],
    inputs: BlockInputs,
    above: BlockOutputs,
) -> tuple[list[mx.array], Seen]:
    """(cotangents of the block's inputs, what its `matrices` saw), lazy.

    No weight gets a gradient: from inputs and output cotangents `_along` makes one in slabs.
    """
    linears = [block[part][name] for part, name, _ in matrices]
    x = inputs.hidden
    count = len(inputs.arrays)
    mask = load.mask(args, block, x)

    def run(*arrays: mx.array) -> list[mx.array]:
        # The gradient of a shift, added to an output (B, T, out), is the cotangent there. So each
        # matrix is replaced by one that adds a shift and records its input.
        shifts = arrays[count:]
        for (part, name, _), linear, shift in zip(matrices, linears, shifts, strict=True):
            block[part][name] = modules.InputRecorder(
                lambda x, linear=linear, shift=shift: linear(x) + shift
            )
        outputs = block_inputs.run(block, inputs.like(arrays[:count]), mask).arrays(above)
        # Recorded inputs leave as further outputs. They get no cotangents, so no gradient either.
        recorded = [block[part][name].take() for part, name, _ in matrices]
        return [*outputs, *map(mx.stop_gradient, recorded)]

    # Shifts are 0: the outputs stay what they are.
    shifts = [mx.zeros((*x.shape[:2], len(linear.weight)), x.dtype) for linear in linears]
    cotangents = above.arrays(above)
    outputs, grads = mx.vjp(run, [*inputs.arrays, *shifts], cotangents)
    recorded = outputs[len(cotangents) :]
    entered = {}
    for (part, name, axis), linear, array in zip(matrices, linears, recorded, strict=True):
        block[part][name] = linear
        entered[axis] = _flat(array)
    return grads[:count], (entered, [_flat(grad) for grad in grads[count:]])


def _backs(
    args: object,
    block: nn.Module,
    matrices: Sequence[Matrix],
    inputs: Sequence[BlockInputs],
    above: Sequence[BlockOutputs],
) -> Iterator[tuple[list[mx.array], Seen]]:
    """`_back` of every batch, evaluated.

    On a GPU batches of one shape go through in one pass; otherwise they go side by side. A GPU gets
    several only for blocks that take hidden states alone (`residency.batches_per_pass`).
    """
    count = len(inputs)
    shapes = {window.hidden.shape for window in inputs}
    if not precision.stacks() or count == 1 or len(shapes) > 1:
        yield from streams.parallel_map(partial(_back, args, block, matrices), inputs, above)
        return
    joined = BlockInputs(sweep.joined([window.hidden for window in inputs]))
    pulled = BlockOutputs(sweep.joined([outputs.hidden for outputs in above]))
    below, (entered, cotangents) = _back(args, block, matrices, inputs=joined, above=pulled)
    stream.evaluate_now(below, entered, cotangents)
    # Apart again: the square is taken of each window's product, not of their sum.
    hidden = sweep.split(below[0], count)
    entered_parts = {axis: sweep.split(array, count) for axis, array in entered.items()}
    cotangent_parts = [sweep.split(array, count) for array in cotangents]
    for k in range(count):
        inputs_of_one = {axis: parts[k] for axis, parts in entered_parts.items()}
        yield [hidden[k]], (inputs_of_one, [parts[k] for parts in cotangent_parts])


def _flat(x: mx.array) -> mx.array:
    """(B, T, n) -> (B T, n) float32."""
    return x.reshape(-1, x.shape[-1]).astype(mx.float32)


def _along(
    linear: nn.Module,
    pairs: Sequence[tuple[mx.array, mx.array]],
    group: int,
    bits: Sequence[int],
) -> mx.array:
    """(windows, formats): <d log p / dW, error> of a layer's matrix in each format.

    pairs: (input (T, in), cotangent (T, out)) of each window. The gradient is made before the
    product with the errors: <above, error a> token by token is F products as large as the one that
    makes it, and as a difference, Q a - W a, loses the digits that Q and W share. Rounding a slab
    anew is quicker than unpacking it, so no rounded matrix is kept.
    """

    def of_slab(rows: slice) -> mx.array:
        # Gradients of all windows (windows, slab), read by one product with (slab, formats) errors.
        grads = mx.stack([(above[:, rows].T @ inputs).reshape(-1) for inputs, above in pairs])
        weight = modules.dense_weight(linear, rows)
        errors = []
        for b in bits:
            packed = rounding.nearest(weight, group, b)
            error = rounding.values(packed, group, b) - weight
            errors.append(error.reshape(-1))
        return grads @ mx.stack(errors, axis=1)

    first_input, first_above = pairs[0]
    step = max(1, SLAB // streams.count() // first_input.shape[1])
    slabs = [slice(start, start + step) for start in range(0, first_above.shape[1], step)]
    return sum(streams.parallel_map(of_slab, slabs), mx.zeros((len(pairs), len(bits))))


def _held_bytes(weights: int) -> int:
    """Bytes of windows that wait for each other in a block of so many weights."""
    return max(HELD_BYTES, 4 * weights)


def sensing_cost(m: ModelSize, length: int, limit: int, windows: int = SENSED) -> StageCost:
    """What `costs` takes. Operations are those of the module's docstring."""
    s = m.wide
    # inputs of a block's matrices, and gradients of their outputs, in one window
    attention = 2 * (s.heads + s.kv_heads) * s.head_dim
    seen = 4 * length * (4 * s.hidden + attention + 3 * s.ffn)
    waiting = min(windows, max(1, _held_bytes(m.largest_block_params) // seen))
    errors = 2 * len(rounding.CANDIDATE_BITS)  # side by side, and stacked
    slab = (2 * waiting + errors + 4) * 4 * min(SLAB, s.ffn * s.hidden)
    cost = backward_pass.gradients_cost(
        m,
        windows=windows,
        length=length,
        limit=limit,
        # variances of groups of the embedding and the head (embedding_costs)
        beside_bytes=4 * m.tables_params // min(rounding.GROUPS),
        visiting=waiting * seen + slab,
    )
    return replace(cost, name="sensitivity")
