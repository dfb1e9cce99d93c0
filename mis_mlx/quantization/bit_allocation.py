"""Which format every matrix gets under a limit on bits, by what each costs in fewer bits.

A cost is KL(model || model with that one rounded), from one pass forwards and one back. The KL is
at its minimum there, so a cost is half the Fisher information along the rounding error, half the
mean over windows of <d log p(drawn tokens) / dW, error>^2 (models/backward_pass). Costs add up as
far as the second order reaches. Of the embedding and the head it is the mean over errors as well,
which are taken as even and independent.

For N weights, F formats and windows of T tokens a batch of windows moves 20 N F bytes for the
errors; each window takes 8 N T operations (forwards twice, back to the inputs, gradients) and moves
(12 + 4 F) N bytes. Gradients and errors are there a slab of rows at a time. 32 windows of 256
tokens, 7B, 5 formats: 9 TB, and a wait for each matrix and batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths import rounding
from mis_mlx.models import arch, backward_pass, block_inputs, families, load, policy, stream
from mis_mlx.models.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.stream import Batches, Hidden
from mis_mlx.planner.recipe import QuantizationConfig
from mis_mlx.quantization import packed_format
from mis_mlx.storage.block_reader import Reader
from mis_mlx.types import Checkpoint, MisError


def mixed(
    checkpoint: Checkpoint,
    batches: Batches,
    how: QuantizationConfig,
    seed: int = 0,
    kept: Hidden | None = None,
) -> tuple[packed_format.Layout, dict[str, Any]]:
    """(a format for every matrix, at most `how.target_bpw` bits per weight; what was found, for a
    JSON).

    Token ids [(B, T)]. kept: as in `backward_pass.backwards`.
    """
    check(how.target_bpw, group := how.q_group_size)
    nats = costs(checkpoint, batches, group, rounding.BITS, seed, kept)
    nats |= {
        path: {packed_format.WIDE_BITS: 0.0} for path in packed_format.gates(checkpoint.config)
    }
    shapes = arch.tensors_of(checkpoint.config)
    sizes = {path: math.prod(shapes[f"{path}.weight"]) for path in nats}
    chosen = allocate(
        nats, sizes, (how.target_bpw or 0.0) - packed_format.Format(0, group).bits_per_weight
    )
    report = {
        "target_bpw": how.target_bpw,
        "nats": {
            path: {str(bits): round(cost, 9) for bits, cost in of.items()}
            for path, of in nats.items()
        },
        "bits": chosen,
        "predicted_nats": sum(nats[path][bits] for path, bits in chosen.items()),
    }
    return {path: packed_format.Format(bits, group) for path, bits in chosen.items()}, report


def allocate(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float
) -> dict[str, int]:
    """{name: bits} with mean bits, weighed by sizes, of at most `mean_bits`; {} when even the
    fewest are too many.

    costs: {name: {bits: cost}}, the same bits for all; of one number of bits alone where there is
    no choice. Greedy along each name's lower convex hull, which is the best there is but for the
    last step (Lagrange; what does not fit any more is passed over). The largest one, of which that
    step can be most of the room (an embedding), is tried in all its bits.
    """
    largest = max(sizes, key=lambda name: sizes[name])
    tried = [
        _greedy({**costs, largest: {bits: cost}}, sizes, mean_bits)
        for bits, cost in costs[largest].items()
    ]
    return min(
        filter(None, tried),
        key=lambda chosen: sum(costs[n][bits] for n, bits in chosen.items()),
        default={},
    )


def _greedy(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float
) -> dict[str, int]:
    """`allocate` but for the largest one."""
    start = {name: min(cost) for name, cost in costs.items()}
    room = sum((mean_bits - start[name]) * size for name, size in sizes.items())
    if room < 0:
        return {}
    chosen = dict(start)
    stuck = set[str]()
    steps = (
        (saved, name, bits)
        for name, cost in costs.items()
        for saved, bits in _hull(cost, sizes[name])
    )
    # a hull's steps save less and less: in their order
    for _, name, bits in sorted(steps, key=lambda s: -s[0]):
        added = (bits - chosen[name]) * sizes[name]
        if name in stuck or added > room:
            stuck.add(name)
            continue
        chosen[name], room = bits, room - added
    return chosen


def _hull(cost: Mapping[int, float], size: int) -> list[tuple[float, int]]:
    """[(cost saved by a bit of a weight, bits then)] from the fewest bits on, steepest first."""
    bits = sorted(cost)
    steps = []
    at = 0
    while at + 1 < len(bits):
        steepest = max(
            range(at + 1, len(bits)),
            key=lambda j: (cost[bits[at]] - cost[bits[j]]) / (bits[j] - bits[at]),
        )
        if (saved := cost[bits[at]] - cost[bits[steepest]]) <= 0:
            break
        steps.append((saved / ((bits[steepest] - bits[at]) * size), bits[steepest]))
        at = steepest
    return steps


def check(target_bpw: float | None, group: int) -> None:
    """MisError when no allocation of BITS can have so few bits per weight, or needs so many."""
    few = min(rounding.BITS)
    many = max(rounding.BITS)
    least, most = (packed_format.Format(bits, group).bits_per_weight for bits in (few, many))
    if target_bpw is None or least <= target_bpw <= most:
        return
    side, bits, end, word = (
        ("above", many, most, "less") if target_bpw > most else ("below", few, least, "more")
    )
    remedy = f"give {end:g} or {word}" + (
        ", or --q-group-size 128" if word == "more" and group < 128 else ""
    )
    limit = f"{side} {end:g}, which {bits} bits in groups of {group} take"
    raise MisError(f"--target-bpw {target_bpw:g} is {limit}: {remedy}")


# One window in a block: what went into its matrices, {axis: (T, in)}, and d log p / d output, [(T,
# out)].
Seen = tuple[dict[str, mx.array], list[mx.array]]


def costs(
    checkpoint: Checkpoint,
    batches: Batches,
    group: int,
    bits: Sequence[int],
    seed: int = 0,
    kept: Hidden | None = None,
) -> dict[str, dict[int, float]]:
    """{module path: {bits: nats per token}} of every matrix, in affine groups. batches, kept: as of
    `mixed`.
    """
    args = load.model_args(checkpoint.config)
    nats = dict[str, dict[int, float]]()
    tokens = sum(b.size for b in batches)
    ends = _Ends(checkpoint, group)

    def visit(i: int, block: nn.Module) -> backward_pass.Back:
        matrices = [
            (part, name, axis)
            for axis, (part, names) in arch.readers(block).items()
            for name in names
        ]
        dense = [load.dense_weight(block[part][name]) for part, name, _ in matrices]
        every = ((w, b) for w in dense for b in bits)
        rounded = list(lanes.each(lambda of: rounding.nearest(of[0], group, of[1]), every))
        packed = [rounded[k : k + len(bits)] for k in range(0, len(rounded), len(bits))]
        seen = list[Seen]()
        sums = [mx.zeros((len(bits),)) for _ in matrices]
        done = 0
        held = max(rounding.HELD_BYTES, sum(w.nbytes for w in dense))

        def take_in() -> None:
            for k, (_, _, axis) in enumerate(matrices):
                pairs = [(inputs[axis], above[k]) for inputs, above in seen]
                sums[k] = sums[k] + mx.square(_along(dense[k], packed[k], pairs, group, bits)).sum(
                    axis=0
                )
            stream.evaluate_now(sums)
            seen.clear()

        def through(
            inputs: Sequence[BlockInputs], above: Sequence[BlockOutputs]
        ) -> list[BlockInputs]:
            nonlocal done
            below = list[BlockInputs]()
            found = _backs(args, block, matrices, inputs, above)
            for into, (under, window) in zip(inputs, found, strict=True):
                below.append(into.like(under))
                seen.append(window)
            done += len(below)
            each = sum(a.nbytes for a in (*window[0].values(), *window[1]))
            if done == len(batches) or (len(seen) + len(below)) * each > held:
                take_in()
            if done == len(batches):
                for (part, name, _), total in zip(
                    matrices, np.array(mx.stack(sums), np.float64), strict=True
                ):
                    cost = (total / (2 * tokens)).tolist()
                    nats[f"model.layers.{i}.{part}.{name}"] = dict(zip(bits, cost, strict=True))
            return below

        return through

    rows = (
        _TableRows(checkpoint, batches, group)
        if families.family(checkpoint.config).per_layer
        else None
    )
    channels = {"at_channels": rows.at_channels} if rows else {}
    back = backward_pass.backwards(checkpoint, batches, visit, seed, kept, ends.at_head, **channels)
    for ids, below in zip(batches, back, strict=True):
        ends.at_rows(ids, below)
    squares = ends.squares | (rows.squares if rows else {})
    return nats | {
        path: {b: of / (2 * tokens) / (2**b - 1) ** 2 for b in bits} for path, of in squares.items()
    }


class _Ends:
    """What errors of the embedding and of the head cost, before it is known how large they are.

    squares: {module path: sum over tokens of the mean of <d log p / dW, error>^2}, for errors of
    2^bits - 1 times their size: an affine group's are taken as even, of variance (range / (2^bits -
    1))^2 / 12, and independent.
    """

    def __init__(self, checkpoint: Checkpoint, group: int):
        scale = load.embedding_scale(checkpoint.config, mx.float32)
        self.group = group
        self.scale = 1.0 if scale is None else float(scale)
        self.table = load.EMBEDDING.rstrip(".")
        self.head = load.head_prefix(checkpoint).rstrip(".")
        self.squares = dict.fromkeys((self.table, self.head), 0.0)
        self.variances = dict[str, mx.array]()  # (V, D / group) float32
        for path in self.squares:
            # In the type that is stored, which the ends of a range have: a float32 copy would be
            # twice as large.
            groups = mx.unflatten(load.dense(checkpoint, f"{path}.weight"), 1, (-1, self.group))
            self.variances[path] = (
                mx.square(groups.max(axis=-1).astype(mx.float32) - groups.min(axis=-1)) / 12
            )
            stream.evaluate_now(self.variances[path])

    def at_head(self, x: mx.array, above: mx.array) -> None:
        """Head inputs x (n, D) and d log p(drawn) / d logits (n, V), of which the mean square is p
        (1
        - p).
        """
        squares = mx.square(x.astype(mx.float32)).reshape(len(x), -1, self.group).sum(axis=-1)
        chance = mx.abs(above)
        self.squares[self.head] += float(
            (chance * (1 - chance) * (squares @ self.variances[self.head].T)).sum()
        )

    def at_rows(self, ids: mx.array, below: mx.array) -> None:
        """A batch's ids (B, T) and cotangents at the first block (B, T, D). A row errs alike
        wherever it is used.
        """
        rows, place = np.unique(np.array(ids), return_inverse=True)
        slopes = np.zeros((len(rows), below.shape[-1]))
        np.add.at(
            slopes,
            place.reshape(-1),
            np.array(below.astype(mx.float32)).reshape(-1, below.shape[-1]),
        )
        along = np.square(slopes * self.scale).reshape(len(rows), -1, self.group).sum(axis=-1)
        self.squares[self.table] += float(
            (along * np.array(self.variances[self.table][mx.array(rows)])).sum()
        )


class _TableRows:
    """What errors of the table of per-layer inputs cost, as `_Ends` says of the embedding. Only
    rows that occur are read, and their ranges kept. What reaches the embedding through the
    projection beside that table is left out.
    """

    def __init__(self, checkpoint: Checkpoint, batches: Batches, group: int):
        self._group = group
        self._width = int(checkpoint.config[families.family(checkpoint.config).per_layer])
        # of a row on its way into a block (load.SideProjection)
        self._scale = self._width**0.5 * 2.0**-0.5
        self._batches = [np.array(batch).reshape(-1) for batch in batches]
        self._ids = np.unique(np.concatenate(self._batches))
        table = checkpoint.tensors[f"{arch.PER_LAYER}weight"]
        reader = Reader({f"{arch.PER_LAYER}weight": table})
        step = max(1, stream.HEAD_PART // table.shape[1])
        parts = list[np.ndarray]()
        for start in range(0, len(self._ids), step):
            rows = reader.rows(table, self._ids[start : start + step])
            groups = mx.unflatten(rows, 1, (-1, group))
            spread = groups.max(axis=-1).astype(mx.float32) - groups.min(axis=-1)
            parts.append(np.array(mx.square(spread) / 12))
        self._variances = np.concatenate(parts)
        self.squares = {arch.PER_LAYER.rstrip("."): 0.0}

    def at_channels(self, i: int, b: int, below: mx.array) -> None:
        """Cotangents (B, T, P) of what batch b brought into block i."""
        ids, place = np.unique(self._batches[b], return_inverse=True)
        slopes = np.zeros((len(ids), self._width))
        np.add.at(slopes, place, np.array(below.astype(mx.float32)).reshape(-1, self._width))
        along = np.square(slopes * self._scale).reshape(len(ids), -1, self._group).sum(axis=-1)
        groups = self._width // self._group
        known = self._variances[np.searchsorted(self._ids, ids), i * groups : (i + 1) * groups]
        self.squares[arch.PER_LAYER.rstrip(".")] += float((along * known).sum())


def _back(
    args: object,
    block: nn.Module,
    matrices: Sequence[tuple[str, str, str]],
    inputs: BlockInputs,
    above: BlockOutputs,
) -> tuple[list[mx.array], Seen]:
    """(cotangents of the block's inputs, what its `matrices` saw), lazy; no weight gets a
    gradient.
    """
    linears = [block[part][name] for part, name, _ in matrices]
    x = inputs.hidden
    count = len(inputs.arrays)
    mask = load.mask(args, block, x)

    def run(*arrays: mx.array) -> list[mx.array]:
        shifts = arrays[count:]
        for (part, name, _), linear, shift in zip(matrices, linears, shifts, strict=True):
            # The gradient of what is added to an output (B, T, out) is the cotangent there.
            block[part][name] = stream.InputRecorder(
                lambda x, of=linear, shift=shift: of(x) + shift
            )
        given = block_inputs.run(block, inputs.like(arrays[:count]), mask).arrays(above)
        return [*given, *(mx.stop_gradient(block[part][name].take()) for part, name, _ in matrices)]

    shifts = [mx.zeros((*x.shape[:2], len(linear.weight)), x.dtype) for linear in linears]
    cotangents = above.arrays(above)
    outs, slopes = mx.vjp(run, [*inputs.arrays, *shifts], cotangents)
    for (part, name, _), linear in zip(matrices, linears, strict=True):
        block[part][name] = linear
    entered = {
        axis: _flat(a) for (_, _, axis), a in zip(matrices, outs[len(cotangents) :], strict=True)
    }
    return slopes[:count], (entered, [_flat(c) for c in slopes[count:]])


def _backs(
    args: object,
    block: nn.Module,
    matrices: Sequence[tuple[str, str, str]],
    inputs: Sequence[BlockInputs],
    above: Sequence[BlockOutputs],
) -> Iterator[tuple[list[mx.array], Seen]]:
    """`_back` of every batch, evaluated: in one pass on a GPU where all are of one shape, else side
    by side. On a GPU several come only where the block takes hidden states alone
    (`stream.stacked`).
    """
    count = len(inputs)
    if policy.name() == "cpu" or count == 1 or len({each.hidden.shape for each in inputs}) > 1:
        yield from lanes.each(lambda *of: _back(args, block, matrices, *of), inputs, above)
        return
    into = BlockInputs(stream.joined([each.hidden for each in inputs]))
    pulled = BlockOutputs(stream.joined([each.hidden for each in above]))
    below, (entered, cotangents) = _back(args, block, matrices, into, pulled)
    stream.evaluate_now(below, entered, cotangents)
    under = stream.split(below[0], count)
    of_inputs = {axis: stream.split(a, count) for axis, a in entered.items()}
    of_cotangents = [stream.split(c, count) for c in cotangents]
    for k in range(count):
        seen = (
            {axis: parts[k] for axis, parts in of_inputs.items()},
            [parts[k] for parts in of_cotangents],
        )
        yield [under[k]], seen


def _flat(x: mx.array) -> mx.array:
    """(B, T, n) -> (B T, n) float32."""
    return x.reshape(-1, x.shape[-1]).astype(mx.float32)


def _along(
    dense: mx.array,
    packed: Sequence[rounding.Packed],
    pairs: Sequence[tuple[mx.array, mx.array]],
    group: int,
    bits: Sequence[int],
) -> mx.array:
    """(windows, formats): <d log p / dW, error> of a matrix (out, in) in each format. pairs:
    (input, cotangent).

    The gradient is made before the product with the errors: <above, error a> token by token is F
    products as large as the one that makes it, and as a difference, Q a - W a, loses the digits
    that Q and W share.
    """

    def of_slab(rows: slice) -> mx.array:
        slopes = mx.stack([(above[:, rows].T @ into).reshape(-1) for into, above in pairs])
        formats = zip(bits, packed, strict=True)
        values = (rounding.values(tuple(p[rows] for p in parts), group, b) for b, parts in formats)
        return mx.stack([slopes @ (value - dense[rows]).reshape(-1) for value in values], axis=1)

    step = max(1, rounding.SLAB // lanes.count() // dense.shape[1])
    slabs = [slice(at, at + step) for at in range(0, len(dense), step)]
    return sum(lanes.each(of_slab, slabs), mx.zeros((len(pairs), len(bits))))
