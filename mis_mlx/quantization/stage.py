"""The quantize stage: a dense model folder in, a packed one out, each matrix in the bits that cost
least on text.

Blocks are streamed and rounded one by one, each on the outputs of the rounded blocks before it.
GPTQ (arXiv 2210.17323): every matrix is rounded so that its output changes least on the inputs that
calibration sees (maths/gptq). The head comes last, by what the rounded blocks give it.

With q_make_up a matrix first moves towards what makes up for all that was rounded before it: to the
weights that bring the model nearest to the unrounded one, on the inputs that it really gets. For a
matrix that writes into the stream that is the stream behind it, for others their own outputs (arXiv
2504.09629). So all windows go through the unrounded blocks, too.

The inputs of a block's matrices are gathered with the block's weights as they were; with q_make_up
its last one comes when the others are rounded.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision, streams
from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost, in_turn
from mis_mlx.maths import gptq, reconstruction, rounding
from mis_mlx.models.architectures import arch, modules
from mis_mlx.models.architectures.sizes import norms_outputs, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream, sweep
from mis_mlx.models.passing.pass_cost import (
    DENSE_ITEM,
    block_matrix,
    stacked_bytes,
    streamed_pass,
    table_part,
)
from mis_mlx.models.passing.stream import Batches, Hidden
from mis_mlx.quantization import bit_allocation, input_sums, packed_format, rounded_size
from mis_mlx.quantization.begun_rounding import BegunRounding
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage.files import Files
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError

# Part of the way that a matrix moves to what makes up for all before it: text of calibration is
# little, and all of the way would fit it too well (benchmarks/scales.py --make-up).
MADE_UP = 0.5
LAST = "ffn"  # the axis that the last matrix of a block reads
# Share of the mean square of a tied head's inputs. Its rows go into the first block, too, where all
# columns of their error count alike (benchmarks/README.md).
TIED_RIDGE = 0.1


def check(config: Mapping[str, Any], rounding: QuantizationConfig) -> None:
    """Refuse, before hours of work, what cannot be rounded in this way.

    A shape that groups do not divide, a target out of reach, q_make_up without GPTQ.
    """
    if rounding.q_make_up and not rounding.affine.compensates:
        other = f"q_method: {rounding.q_method}"
        if rounding.q_mode != "affine":
            other = f"q_mode: {rounding.q_mode}"
        raise MisError(
            f"q_make_up: true is for GPTQ, but {other} rounds to the nearest: leave out one of them"
        )
    packed_format.formats_of(config, rounding.q_group_size, mode=rounding.q_mode)
    bit_allocation.check(config, rounding.affine)


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    rounding: QuantizationConfig,
    files: Files,
    batches: Batches = (),
    held: int = 0,
    seed: int = 0,
    begun: BegunRounding | None = None,
) -> dict[str, Any]:
    """Write the quantized model `out` from a dense model.

    Returns bits per weight and the group size used. batches: token ids [(B, T)] for calibration.
    held: batches whose hidden states stay in memory; the others' lie in a file beside `out`. seed:
    of the tokens that the model draws. begun: what is in it is not made again, what is made goes
    into it.
    """
    rounding = rounding.affine
    beside = out.absolute().parent
    files.make_folder(beside)

    def hidden(passes: int) -> Spool | None:
        # A place for the hidden states of so many passes; None is memory.
        if held < len(batches):
            return Spool(beside, held * passes, files)
        return None

    extra = {}
    if rounding.target_bpw is None:
        plan = _usual_layout(checkpoint, rounding)
    else:
        known = begun.layout() if begun else None
        if known is None:
            cli.detail("sensitivity: what fewer bits cost in each matrix")
            # The pass back needs the hidden states at every block's input: one per layer.
            kept = hidden(checkpoint.config["num_hidden_layers"])
            known = bit_allocation.mixed(checkpoint, batches, rounding, seed=seed, kept=kept)
            if begun:
                begun.keep_layout(*known)
        plan, report = known
        extra[packed_format.SENSITIVITY] = json.dumps(report).encode()
    rounded = None
    if rounding.compensates:
        rounded = rounded_blocks(
            checkpoint,
            batches,
            plan,
            hidden(1),
            hidden(1),
            makes_up=rounding.q_make_up,
            begun=begun,
        )
    return packed_format.write_quantized(
        checkpoint,
        out,
        plan,
        files,
        rounded=rounded,
        extra=extra,
        fit=rounded is not None,
    )


def _usual_layout(checkpoint: Checkpoint, rounding: QuantizationConfig) -> packed_format.Formats:
    """The format of every matrix, where no cost is measured."""
    wide: tuple[int, ...] = ()
    if rounding.q_mode == "affine":
        wide = packed_format.blocks_after_removed(checkpoint)
    return packed_format.formats_of(
        checkpoint.config,
        rounding.q_group_size,
        wide,
        rounding.q_mode,
    )


def rounded_blocks(
    checkpoint: Checkpoint,
    batches: Batches,
    plan: packed_format.Formats,
    hidden: Hidden | None = None,
    unrounded: Hidden | None = None,
    *,
    makes_up: bool = False,
    begun: BegunRounding | None = None,
) -> Iterator[packed_format.RoundedBlock]:
    """Per block, in order, {module path: packed matrix}, calibrated on token ids [(B, T)].

    Behind the blocks comes the head, where `packed_format.compensated_head` names it. plan: affine
    formats only. hidden, unrounded: places other than memory for the hidden states of the rounded
    blocks, and of the blocks as they were. makes_up: as of q_make_up. begun: of blocks that are
    rounded already. MisError when an input's products overflow.
    """
    if begun and begun.blocks:
        cli.say(f"continuing after {begun.blocks} rounded blocks")
    source = stream.Stream(checkpoint, direct=hidden is not None)
    hidden = source.embed(batches, hidden)
    beside = _Unrounded(source, hidden, unrounded) if makes_up else None

    def finished(turn: sweep.BlockTurn) -> packed_format.RoundedBlock:
        # The turn's windows are as the rounded blocks before it make them, which is what the
        # quantized model will have there.
        other = beside.turn(turn) if beside else None
        known = begun.block(turn.number) if begun else None
        if known is None:
            rounded = _rounded_block(turn, other, plan)
        else:
            if other:
                other.go()
            rounded = known
            _put_back(turn.block, arch.block_prefix(turn.number), known, plan)
        if begun and known is None:
            begun.keep_block(turn.number, rounded)
        return rounded

    head = packed_format.compensated_head(checkpoint, plan)
    for turn in source.sweep(hidden, last=bool(head)):
        yield finished(turn)
        # The block's weights are the rounded ones now, with which the windows go on.
    if head:
        yield _kept_head(source, head, plan[head], hidden=hidden, begun=begun)


class _Unrounded:
    """The windows as the blocks were, beside those that the rounded ones make.

    hidden: before the first block, where both are one. place: for the states, other than memory.
    """

    def __init__(self, source: stream.Stream, hidden: Hidden, place: Hidden | None):
        self.source = source.beside()
        self.hidden: Hidden = [] if place is None else place
        for states in hidden:
            self.hidden.append(states)

    def turn(self, rounded: sweep.BlockTurn) -> sweep.BlockTurn:
        """Their turn at the same block."""
        return sweep.BlockTurn(self.source, rounded.number, rounded.block, self.hidden)


def _put_back(
    block: nn.Module, prefix: str, rounded: packed_format.RoundedBlock, plan: packed_format.Formats
) -> None:
    """Give the layers of a block the weights that `rounded` stands for, as rounding leaves them."""
    for part, names in arch.readers(block).values():
        for name in names:
            linear = block[part][name]
            path = f"{prefix}{part}.{name}"
            linear.weight = packed_format.weight_of(rounded[path], plan[path], linear.weight.dtype)


def _rounded_block(
    turn: sweep.BlockTurn, unrounded: sweep.BlockTurn | None, plan: packed_format.Formats
) -> packed_format.RoundedBlock:
    """{module path: packed matrix} of a block, whose weights become the rounded ones.

    unrounded: the block's turn for the windows as the blocks before it were, which are behind it
    then; None where nobody makes up for anything.
    """
    i = turn.number
    block = turn.block
    prefix = arch.block_prefix(i)
    readers = arch.readers(block)
    rounded: dict[str, rounding.Packed] = {}
    for axes, sums in _gathered(turn, unrounded, plan):
        for axis in axes:
            part, names = readers[axis]
            linears = {f"{prefix}{part}.{name}": block[part][name] for name in names}
            # pop: a gram (in, in) goes when its matrices are done
            rounded |= _rounded_readers(linears, plan, sums.pop(axis, None))
    for path in sorted(packed_format.wide_projections(turn.source.checkpoint.config)):
        if arch.block_of(path) == i and path not in rounded:
            linear = dict(block.named_modules())[path.removeprefix(prefix)]
            weight = modules.dense_weight(linear)
            rounded[path] = rounding.nearest(weight, plan[path].group, plan[path].bits)
    return rounded


def _gathered(
    turn: sweep.BlockTurn, unrounded: sweep.BlockTurn | None, plan: packed_format.Formats
) -> Iterator[tuple[list[str], dict[str, input_sums.Sums]]]:
    """(axes, their sums) of a block, whose matrices are rounded before the next axes come.

    Axes of which GPTQ rounds no matrix need no sums. unrounded: as of `_rounded_block`.
    """
    axes = list(arch.readers(turn.block))
    needed = _compensated_axes(turn, plan)
    if unrounded is None:
        yield axes, input_sums.of_inputs(turn, needed)
        return
    # Without a norm behind it the last matrix can make up for the others of its block, too.
    behind_norms = norms_outputs(turn.source.checkpoint.config)
    last = [axis for axis in axes if axis == LAST and not behind_norms]
    first = [axis for axis in axes if axis not in last]
    sums = input_sums.of_unrounded(turn, unrounded, [axis for axis in first if axis in needed])
    unrounded.go()  # while the block's weights are its own
    yield first, sums
    for axis in last:
        if axis in needed:
            sums = input_sums.of_stream(turn, unrounded.hidden, axis)
        yield [axis], sums


def _compensated_axes(turn: sweep.BlockTurn, plan: packed_format.Formats) -> list[str]:
    """The axes of a block of which GPTQ rounds a matrix."""
    prefix = arch.block_prefix(turn.number)
    found = []
    for axis, (part, names) in arch.readers(turn.block).items():
        if any(plan[f"{prefix}{part}.{name}"].bits < rounding.ENOUGH_BITS for name in names):
            found.append(axis)
    return found


def _kept_head(
    source: stream.Stream,
    path: str,
    kind: packed_format.Format,
    *,
    hidden: Hidden,
    begun: BegunRounding | None,
) -> packed_format.RoundedBlock:
    """As `_rounded_head`; in what is begun it follows the last block."""
    if begun is None:
        return _rounded_head(source, path, kind, hidden)
    head = begun.block(source.layers)
    if head is None:
        head = _rounded_head(source, path, kind, hidden)
        begun.keep_block(source.layers, head)
    return head


def _rounded_head(
    source: stream.Stream, path: str, kind: packed_format.Format, hidden: Hidden
) -> packed_format.RoundedBlock:
    """{module path: packed matrix} of the head, some rows at a time.

    hidden: (B, T, D) of every batch, which the last block gives.
    """
    where = f"{source.checkpoint.path}: {path}"
    size = source.checkpoint.config["hidden_size"]
    gram = np.zeros((size, size), reconstruction.precision(size))

    def work(stack: tuple[int, list[mx.array]]) -> input_sums.Summand:
        _, windows = stack
        (inputs,) = source.norm([sweep.joined(windows)])
        inputs = input_sums.rows(inputs)
        return input_sums.summand(inputs, inputs)

    for product in streams.parallel_map(work, sweep.stacks(source, hidden)):
        input_sums.add(gram, product, where, triangle=True)
    if shape_of(source.checkpoint.config).tied:
        np.einsum("ii->i", gram)[:] += TIED_RIDGE * np.trace(gram) / size
    factor = gptq.factorize(gram)
    name = f"{path}.weight"
    table = load.dense_parts(source.checkpoint, name, "float32")
    fused = precision.compiles()
    parts = []
    for rows in packed_format.finite_parts(source.checkpoint, name, table):
        packed = gptq.rounded([rows], factor, kind.group, kind.bits, fused=fused)
        stream.evaluate_now(packed)
        parts += packed
        del rows  # before the next are read
    return {path: rounding.concatenated(parts)}


def _rounded_readers(
    linears: Mapping[str, nn.Module],
    plan: packed_format.Formats,
    sums: input_sums.Sums | None,
) -> dict[str, rounding.Packed]:
    """The matrices that read one axis, by module path: rounded, and put into their layers.

    sums: of the input that they share, overwritten; None for nearest values.
    """
    rounded = {}
    factor = None
    if sums is not None:
        factor = gptq.factorize(sums.gram)
        if sums.missed is not None:
            step = mx.array(gptq.solved(factor, sums.missed), mx.float32)
            for linear in linears.values():
                linear.weight = _moved(linear.weight, step, of_outputs=sums.of_outputs)
            del step
        del sums  # the factor has the gram's place
    by_format: dict[packed_format.Format, list[str]] = {}
    for path in linears:
        by_format.setdefault(plan[path], []).append(path)
    fused = precision.compiles()
    # All of one format in one go: small matrices share the work.
    for kind, paths in by_format.items():
        weights = [linears[path].weight for path in paths]
        if factor is None or kind.bits >= rounding.ENOUGH_BITS:
            matrices = [
                rounding.fitted(weight, kind.group, kind.bits, fused=fused) for weight in weights
            ]
        else:
            matrices = gptq.rounded(weights, factor, kind.group, kind.bits, fused=fused)
        for path, packed in zip(paths, matrices, strict=True):
            linear = linears[path]
            dtype = linear.weight.dtype
            stream.evaluate_now(packed)
            linear.weight = packed_format.weight_of(packed, kind, dtype)
            rounded[path] = packed
    return rounded


def _moved(weight: mx.array, step: mx.array, *, of_outputs: bool) -> mx.array:
    """A matrix W (out, in), MADE_UP of the way to what makes up for what it lacks.

    step: the least squares of what inputs lack by the inputs (in, in), or, of_outputs, of what
    outputs lack (out, in). Their ridge is the factor's damping.
    """
    outputs, inputs = weight.shape
    size = max(1, rounding.PART // inputs)
    parts = []
    for start in range(0, outputs, size):
        rows = weight[start : start + size].astype(mx.float32)
        whole = step[start : start + size] if of_outputs else rows @ step
        parts.append((rows + MADE_UP * whole).astype(weight.dtype))
        stream.evaluate_now(parts[-1])
    return sweep.joined(parts)


def quantizing_cost(
    m: ModelSize, rounding: QuantizationConfig, *, windows: int, length: int, limit: int
) -> StageCost:
    """Quantize tensor by tensor.

    With `target_bpw`, passes over `windows` come first and say what bits cost. With GPTQ, passes
    over them go along and make up for errors.
    """
    config = rounding.affine
    cost = StageCost(
        name="quantize",
        read_bytes=m.nbytes,
        written_bytes=rounded_size.files_bytes(m, config),
        peak_bytes=_writing_bytes(m, config.q_group_size),
    )
    if config.compensates:
        cost = _compensated(cost, m, config, tokens=windows * length, length=length, limit=limit)
    if config.target_bpw is None:
        return cost
    sensing = bit_allocation.sensing_cost(m, length, limit, windows)
    held = min(cost.stays.get(WINDOWS, windows), sensing.stays[WINDOWS])
    return replace(in_turn("quantize", cost, sensing), stays={WINDOWS: held})


def _writing_bytes(m: ModelSize, group: int) -> int:
    """What packing a model tensor by tensor holds (packed_format.write_quantized).

    As stored, packed, and the part that is rounded at a time. group: weights that share a scale.
    """
    matrix = block_matrix(m)
    stored_item = math.ceil(m.nbytes / m.params)
    table = table_part(m)
    ledger = Ledger()
    ledger.hold("experts of a matrix", stacked_bytes(m))
    # of a table, which wait for its integers
    ledger.hold("scales", 2 * 4 * max(m.side_params, m.head_params) // group)
    ledger.moment("matrix", whole=(stored_item + 2) * matrix, part=4 * min(matrix, rounding.PART))
    rows = (DENSE_ITEM + 2) * table
    ledger.moment("table", rows=rows, part=4 * min(m.head_params, rounding.PART))
    return ledger.peak_bytes


def _sides(m: ModelSize) -> gptq.Sides:
    """Of a block's matrices."""
    s = m.wide
    queries = s.heads * s.head_dim
    keys = s.kv_heads * s.head_dim
    return [
        (s.hidden, queries + 2 * keys),
        (queries, s.hidden),
        (s.hidden, 2 * s.ffn),
        (s.ffn, s.hidden),
    ]


def _readers(m: ModelSize) -> gptq.Sides:
    """Those of `_sides` that read the stream."""
    return _sides(m)[::2]


def _summed(m: ModelSize, *, makes_up: bool) -> list[input_sums.Sides]:
    """The axes of `_sides` whose sums are gathered together.

    What writes into the stream lacks outputs, other matrices lack inputs; without a norm behind it
    the last matrix has its own turn.
    """
    if not makes_up:
        return [[(inputs, 0) for inputs, _ in _sides(m)]]
    sides = [(inputs, inputs) for inputs, _ in _readers(m)]
    sides += _sides(m)[1::2]
    if norms_outputs(m.config):
        return [sides]
    return [sides[:-1], sides[-1:]]


def _block_bytes(m: ModelSize, length: int, *, makes_up: bool) -> int:
    """What rounding a block holds besides it: sums, which stay until their matrices are rounded."""
    sides = _sides(m)
    weights = max(inputs * outputs for inputs, outputs in sides)
    # the values as the block computes with them, in parts and whole
    values = 2 * m.item * block_matrix(m)
    work = max(gptq.work_bytes(sides, fused=m.gpu), gptq.packed_bytes(weights) + values)
    ledger = Ledger()
    replaced = 0
    for number, together in enumerate(_summed(m, makes_up=makes_up)):
        sums = input_sums.sums_bytes(together)
        # of least squares, which are numpy's until MLX has them
        step = max(4 * inputs * missed for inputs, missed in together)
        moving = (step + 3 * 4 * min(rounding.PART, weights) + values) * makes_up
        gathering = input_sums.gathering_bytes(m, together, length)
        for name, needs in (("gathering", gathering), ("moving", moving), ("rounding", work)):
            held = sums - step if name == "rounding" else sums
            ledger.moment(f"{name} {number}", sums=held, replaced=replaced, needs=needs)
        # Weights that need no conversion stay where they were read while rounded ones take their
        # place.
        replaced = m.item * m.largest_block_params if m.as_stored else 0
        largest = max(input_sums.sums_bytes([side]) for side in together)
        ledger.moment(f"later ones {number}", sums=sums - largest, replaced=replaced, needs=work)
    return ledger.peak_bytes


def _compensated(
    plain: StageCost,
    m: ModelSize,
    config: QuantizationConfig,
    *,
    tokens: int,
    length: int,
    limit: int,
) -> StageCost:
    """`plain`, rounding tensor by tensor, with a pass that makes up for the errors.

    Behind the blocks perhaps the head, which waits packed until it is written.
    """
    s = m.wide
    one_pass = streamed_pass(
        "",
        m,
        tokens=tokens,
        length=length,
        limit_bytes=limit,
        head=False,
        beside_bytes=_block_bytes(m, length, makes_up=config.q_make_up),
        states=config.states,
    )
    of_products, of_rounding = gptq.operations(_sides(m))
    # Each kind of windows goes through twice, the first time for the sums.
    flops = 2 * one_pass.flops
    for inputs, missed in itertools.chain(*_summed(m, makes_up=config.q_make_up)):
        of_products += 2 * inputs * missed
        by_mlx, by_numpy = gptq.solving_operations(inputs, missed)
        flops += s.layers * by_mlx
        of_rounding += by_numpy
    flops += s.layers * tokens * of_products
    if config.q_make_up:
        flops += 2 * s.layers * s.hidden**2 * sum(outputs for _, outputs in _readers(m))
    host_flops = s.layers * of_rounding
    ledger = Ledger()
    ledger.hold("slots", m.slots_bytes)
    ledger.hold(WINDOWS, length * m.hidden_bytes, one_pass.stays[WINDOWS])
    ledger.moment("a tensor", made=plain.peak_bytes)
    if rounded_size.rounds_head(config):
        # Rows as stored and in float32: 23 bytes a weight with what rounding takes, measured; on a
        # GPU nobody did.
        stored_item = math.ceil(m.nbytes / m.params)
        item = 4 if stored_item == 4 else stored_item + 4
        if m.gpu:
            item = DENSE_ITEM
        ledger.moment(
            "the head",
            gram=reconstruction.square_bytes(s.hidden),
            packed=gptq.packed_bytes(m.head_params),
            rows=(item + 20) * table_part(m),
        )
        flops += 2 * tokens * s.hidden**2
        host_flops += s.hidden**2 * (s.hidden / 3 + s.vocab)
    return replace(
        one_pass,
        name=plain.name,
        read_bytes=plain.read_bytes + 2 * one_pass.written_bytes,
        written_bytes=plain.written_bytes + one_pass.written_bytes,
        peak_bytes=max(one_pass.peak_bytes, ledger.peak_bytes),
        flops=flops,
        host_flops=host_flops,  # numpy rounds
        stays={WINDOWS: one_pass.stays[WINDOWS] // config.states},  # of each kind
    )
