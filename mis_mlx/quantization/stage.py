"""The quantize stage: a dense model folder in, a packed one out, each matrix in the bits that cost
least on text.

Blocks are streamed and rounded one by one, each on the outputs of the rounded blocks before it.
GPTQ (arXiv 2210.17323): every matrix is rounded so that its output changes least on the inputs that
calibration sees (maths/rounding). The inputs of a block's matrices are gathered once per block,
with the block's own weights as they were. The head comes last, by what the rounded blocks give it.

An expert of a mixture is rounded on the tokens that choose it. Where these are fewer than a matrix
has inputs, its sums would leave directions free that other text uses: tokens of the whole block
make up for what is missing.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision, streams
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost, in_turn
from mis_mlx.maths import gptq, reconstruction, rounding
from mis_mlx.models.architectures import arch, modules
from mis_mlx.models.architectures.experts import Expert, ReadExperts
from mis_mlx.models.architectures.families import family, mixture, shape_of
from mis_mlx.models.architectures.mixture import ACTIVE
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import residency, stream, sweep
from mis_mlx.models.passing.pass_cost import (
    DENSE_ITEM,
    block_matrix,
    parallel_windows,
    stacked_bytes,
    streamed_pass,
    table_part,
)
from mis_mlx.models.passing.stream import Batches, Hidden
from mis_mlx.quantization import bit_allocation, packed_format, rounded_size
from mis_mlx.quantization.begun_rounding import BegunRounding
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError

# Share of the mean square of a tied head's inputs. Its rows go into the first block, too, where all
# columns of their error count alike (benchmarks/README.md).
TIED_RIDGE = 0.1
# Of a weight whose grid is fitted (maths/rounding): bytes that the kernels of a GPU move.
FITTED_BYTES = 10 * 4 * rounding.RANGE_ENDS**2
MATRICES = 7  # of a block: of attention four, of the FFN three


def check(config: Mapping[str, Any], rounding: QuantizationConfig) -> None:
    """Refuse, before hours of work, what cannot be rounded in this way.

    A shape that groups do not divide, a target out of reach.
    """
    packed_format.formats_of(config, rounding.q_group_size)
    bit_allocation.check(config, rounding)


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    rounding: QuantizationConfig,
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
    beside = out.absolute().parent
    DISK.make_folder(beside)

    def hidden(passes: int) -> Spool | None:
        # A place for the hidden states of so many passes; None is memory.
        if held < len(batches):
            return Spool(beside, held * passes)
        return None

    extra = dict[str, Any]()
    if rounding.target_bpw is None:
        plan: packed_format.Formats = packed_format.formats_of(
            checkpoint.config, rounding.q_group_size
        )
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
        tokens = list[Sequence[int]]()
        rounded = rounded_blocks(checkpoint, batches, plan, hidden(1), begun, tokens)
        if mixture(checkpoint.config):
            extra[packed_format.EXPERT_TOKENS] = tokens  # written when all blocks are rounded
    return packed_format.write_quantized(
        checkpoint,
        out,
        plan,
        rounded=rounded,
        extra=extra,
        fit=rounded is not None,
    )


def rounded_blocks(
    checkpoint: Checkpoint,
    batches: Batches,
    plan: packed_format.Formats,
    hidden: Hidden | None = None,
    begun: BegunRounding | None = None,
    expert_tokens: MutableSequence[Sequence[int]] | None = None,
) -> Iterator[packed_format.RoundedBlock]:
    """Per block, in order, {module path: packed matrix}, calibrated on token ids [(B, T)].

    Behind the blocks comes the head, where `packed_format.compensated_head` names it. plan: affine
    formats only. hidden: a place for the hidden states other than memory. begun: of blocks that
    are rounded already. expert_tokens: gets for every block how many tokens chose each expert.
    MisError when an input's products overflow.
    """
    if begun and begun.blocks:
        cli.say(f"continuing after {begun.blocks} rounded blocks")
    source = stream.Stream(checkpoint, direct=hidden is not None)
    hidden = source.embed(batches, hidden)

    def finished(turn: sweep.BlockTurn) -> packed_format.RoundedBlock:
        # The turn's windows are as the rounded blocks before it make them, which is what the
        # quantized model will have there.
        number = turn.number
        rounded = begun.block(number) if begun else None
        if begun and rounded is not None:
            tokens = begun.expert_tokens(number)
            _put_back(turn.block, arch.block_prefix(number), rounded, plan)
        else:
            rounded, tokens = _rounded_block(turn, plan)
            if begun:
                begun.keep_block(number, rounded, tokens)
        if expert_tokens is not None:
            expert_tokens.append(tokens)
        of_experts = mixture(checkpoint.config)
        if of_experts:
            paths = _expert_paths(turn)
            experts = turn.block[of_experts.mlp].experts
            experts.read = partial(_read_rounded, experts.read, paths, rounded, plan)
        return rounded

    head = packed_format.compensated_head(checkpoint, plan)
    for turn in source.sweep(hidden, last=bool(head)):
        yield finished(turn)
        # The block's weights are the rounded ones now, with which the windows go on.
    if head:
        yield _kept_head(source, head, plan[head], hidden=hidden, begun=begun)


def _put_back(
    block: nn.Module, prefix: str, rounded: packed_format.RoundedBlock, plan: packed_format.Formats
) -> None:
    """Give the layers of a block the weights that `rounded` stands for, as rounding leaves them."""
    for linears in _readers(block).values():
        for name, linear in linears.items():
            path = prefix + name
            linear.weight = packed_format.weight_of(rounded[path], plan[path], linear.weight.dtype)


def _readers(block: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """{axis: {path in the block: layer}} of the matrices that read an axis, so have one input.

    With those of an expert that every token uses; without those of experts that a router chooses.
    """
    found = {}
    for axis, (part, names) in arch.readers(block).items():
        found[axis] = {f"{part}.{name}": block[part][name] for name in names}
    shared = block.get("mlp", {}).get("shared_expert")
    if shared is not None:
        stem = "mlp.shared_expert"
        for axis, (_, names) in arch.readers({"mlp": shared}).items():
            found[f"shared {axis}"] = {f"{stem}.{name}": shared[name] for name in names}
    return found


def _rounded_block(
    turn: sweep.BlockTurn, plan: packed_format.Formats
) -> tuple[packed_format.RoundedBlock, list[int]]:
    """{module path: packed matrix} of a block, whose weights become the rounded ones, experts' not.

    And how many tokens chose each expert.
    """
    i = turn.number
    block = turn.block
    config = turn.source.checkpoint.config
    prefix = arch.block_prefix(i)
    readers = _readers(block)
    tapped = []
    for axis, linears in readers.items():
        # A gram costs a product per batch: only matrices that GPTQ rounds need theirs.
        if any(plan[prefix + name].bits < rounding.ENOUGH_BITS for name in linears):
            tapped.append(axis)
    # All grams before the first matrix changes: a rounded matrix would change the later ones'
    # inputs.
    where = f"{turn.source.checkpoint.path}: {prefix}"
    rounded: dict[str, rounding.Packed] = {}
    expert_tokens = list[int]()
    of_experts = mixture(config)
    if of_experts:
        with block[of_experts.mlp].experts.observed() as choices:
            grams = _grams(turn, tapped, where=where)
            choices.clear()
            inputs, chosen = _routed(turn, choices)
        rounded, expert_tokens = _rounded_experts(turn, plan, inputs, chosen)
        del inputs
    else:
        grams = _grams(turn, tapped, where=where)
    for axis, linears in readers.items():
        of_axis = {prefix + name: linear for name, linear in linears.items()}
        # pop: a gram (in, in) goes when its matrices are done
        rounded |= rounded_readers(of_axis, plan, grams.pop(axis, None))
    for path in sorted(packed_format.wide_projections(config)):
        if arch.block_of(path) == i and path not in rounded:
            linear = dict(block.named_modules())[path.removeprefix(prefix)]
            weight = modules.dense_weight(linear)
            rounded[path] = rounding.nearest(weight, plan[path].group, plan[path].bits)
    return rounded, expert_tokens


def _routed(turn: sweep.BlockTurn, choices: list[mx.array]) -> tuple[mx.array, np.ndarray]:
    """(what the experts read (N, D), the experts (N, k) that are chosen) of all windows' tokens.

    choices: of `Experts.observed`, empty.
    """
    of_experts = mixture(turn.source.checkpoint.config)
    assert of_experts
    router = {"router": (of_experts.mlp, of_experts.router)}

    def look(stack: sweep.Stack) -> tuple[mx.array, mx.array]:
        return stack.taken["router"], choices.pop(0)

    inputs = []
    chosen = []
    for x, choice in turn.look(look, router):
        inputs.append(x.reshape(-1, x.shape[-1]))
        chosen.append(np.array(choice).reshape(-1, choice.shape[-1]))
    return mx.concatenate(inputs), np.concatenate(chosen)


def _expert_paths(turn: sweep.BlockTurn) -> list[str]:
    """The paths of the block's stacked gate, up and down matrices."""
    config = turn.source.checkpoint.config
    of_experts = mixture(config)
    assert of_experts
    stem = f"{arch.block_prefix(turn.number)}{of_experts.mlp}.experts.0"
    return [family(config).joined(f"{stem}.{name}") for name in of_experts.matrices]


def _rounded_experts(
    turn: sweep.BlockTurn, plan: packed_format.Formats, inputs: mx.array, chosen: np.ndarray
) -> tuple[dict[str, rounding.Packed], list[int]]:
    """{path: packed matrices (E, out, ...)} of a block's experts, and each one's number of tokens.

    inputs: (N, D). chosen: (N, k), by whom they are read. The experts stay as they are.
    """
    config = turn.source.checkpoint.config
    of_experts = mixture(config)
    assert of_experts
    paths = _expert_paths(turn)
    where = f"{turn.source.checkpoint.path}: {paths[0]}"
    everything = _sum_of(inputs, where)
    stacks: dict[str, list[rounding.Packed]] = {path: [] for path in paths}
    counts = []
    for e, expert in turn.block[of_experts.mlp].experts.read(range(of_experts.shape.experts)):
        linears = [expert[name] for name in expert.names]
        weights = [linear.weight for linear in linears]
        uses = (chosen == e).any(axis=1)
        own = np.flatnonzero(uses)
        others = np.flatnonzero(~uses)
        counts.append(len(own))
        # as many tokens as the down matrix has inputs, if there are
        width = weights[2].shape[1]
        lacking = min(max(0, width - len(own)), len(others))
        spread = others[np.arange(lacking) * len(others) // max(1, lacking)]
        neurons, _ = expert(inputs[mx.array(np.concatenate([own, spread]))])
        mx.eval(neurons)  # by the weights as they were
        gram = _sum_of(inputs[mx.array(own)], where)
        gram += max(0, len(gram) - len(own)) / len(inputs) * everything
        readers = dict(zip(paths[:2], linears[:2], strict=True))
        packed = rounded_readers(readers, plan, gram)
        packed |= rounded_readers({paths[2]: linears[2]}, plan, _sum_of(neurons, where))
        for path in paths:
            stacks[path].append(packed[path])
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight
    rounded: dict[str, rounding.Packed] = {}
    for path in paths:
        parts = stacks.pop(path)
        rounded[path] = tuple(mx.stack(list(arrays)) for arrays in zip(*parts, strict=True))
        del parts
        stream.evaluate_now(rounded[path])
    return rounded, counts


def _read_rounded(
    read: ReadExperts,
    paths: Sequence[str],
    rounded: packed_format.RoundedBlock,
    plan: packed_format.Formats,
    numbers: Sequence[int],
) -> Iterator[tuple[int, Expert]]:
    """As `read`, each expert with the weights that `rounded` stands for until the next one comes.

    paths: of the stacked matrices. An expert that stays in memory keeps its own weights there.
    """
    for e, expert in read(numbers):
        linears = [expert[name] for name in expert.names]
        weights = [linear.weight for linear in linears]
        for path, linear in zip(paths, linears, strict=True):
            packed = tuple(part[e] for part in rounded[path])
            linear.weight = packed_format.weight_of(packed, plan[path], linear.weight.dtype)
        yield e, expert
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight


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

    def work(stack: tuple[int, list[mx.array]]) -> mx.array:
        _, windows = stack
        (inputs,) = source.norm([sweep.joined(windows)])
        return summand(inputs)

    for product in streams.parallel_map(work, sweep.stacks(source, hidden)):
        add(gram, product, where)
    if shape_of(source.checkpoint.config).tied:
        np.einsum("ii->i", gram)[:] += TIED_RIDGE * np.trace(gram) / size
    factor = gptq.factorize(gram)
    name = f"{path}.weight"
    table = load.dense_parts(source.checkpoint, name)
    fused = precision.compiles()
    parts = []
    for rows in packed_format.finite_parts(source.checkpoint, name, table):
        packed = gptq.rounded([rows], factor, kind.group, kind.bits, fused=fused)
        stream.evaluate_now(packed)
        parts += packed
        del rows  # before the next are read
    return {path: rounding.concatenated(parts)}


def rounded_readers(
    linears: Mapping[str, nn.Module],
    plan: packed_format.Formats,
    gram: np.ndarray | None,
) -> dict[str, rounding.Packed]:
    """The matrices that read one axis, by module path: rounded, and put into their layers.

    gram: (in, in), of the input that they share, overwritten; None for nearest values.
    """
    rounded = {}
    factor = None
    if gram is not None:
        factor = gptq.factorize(gram)
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


def _grams(turn: sweep.BlockTurn, axes: Sequence[str], *, where: str = "") -> dict[str, np.ndarray]:
    """{axis: sum of a a^T (in, in) over all tokens' inputs a to the matrices that read the axis}.

    Of a wide one only the upper triangle is whole, which is what `gptq.factorize` reads. Products
    of one batch are float32, sums over batches in `reconstruction.precision`. MisError, with
    `where`, when a product overflows.
    """
    places = {}
    sums = {}
    for axis, linears in _readers(turn.block).items():
        if axis not in axes:
            continue
        # The matrices that read an axis have one input: the first one's is looked at.
        path, linear = next(iter(linears.items()))
        places[axis] = tuple(path.split("."))
        inputs = linear.weight.shape[1]
        sums[axis] = np.zeros((inputs, inputs), reconstruction.precision(inputs))

    # A sum does not ask which window a token belongs to: all windows of a stack are one product.
    def look(stack: sweep.Stack) -> dict[str, mx.array]:
        return {axis: summand(inputs) for axis, inputs in stack.taken.items()}

    for found in turn.look(look, places):
        for axis, array in found.items():
            add(sums[axis], array, f"{where}{'.'.join(places[axis])}")
    return sums


def _sum_of(inputs: mx.array, where: str) -> np.ndarray:
    """The sum (in, in) of a a^T of inputs a (n, in), as of `_grams`."""
    size = inputs.shape[1]
    sums = np.zeros((size, size), reconstruction.precision(size))
    if len(inputs):
        add(sums, summand(inputs), where)
    return sums


def summand(inputs: mx.array) -> mx.array:
    """What `add` adds for inputs (..., n): a a^T of all of them; of wide ones they themselves."""
    inputs = inputs.astype(mx.float32)
    inputs = inputs.reshape(-1, inputs.shape[-1])
    if reconstruction.is_wide(inputs.shape[1]):
        return inputs
    return inputs.T @ inputs


def add(sums: np.ndarray, seen: mx.array, where: str) -> None:
    """Add the product of some inputs to the sums (in, in).

    seen: the product; or the inputs (n, in), where the sums are wide. MisError, with `where`, when
    the product overflows.
    """
    slabs: Iterable[tuple[int, mx.array]] = [(0, seen)]
    if reconstruction.is_wide(len(sums)):
        slabs = _product_slabs(seen)
    for start, product in slabs:
        mx.eval(product)
        values = np.asarray(memoryview(product))  # type: ignore[arg-type]  # where it is
        # Checked before it is added: a sum with one infinity is lost. By numpy, in place: MLX takes
        # as long for that on a CPU as for the product.
        if not np.isfinite(values).all():
            raise MisError(f"{where} meets values that are not finite: use plain rounding")
        sums[start : start + len(values), start:] += values


def _product_slabs(inputs: mx.array) -> Iterator[tuple[int, mx.array]]:
    """(first row, rows of inputs^T inputs from the diagonal on): its upper triangle, in slabs.

    inputs: (n, in) float32.
    """
    for start in range(0, inputs.shape[1], gptq.PANEL):
        rows = inputs[:, start : start + gptq.PANEL]
        yield start, rows.T @ inputs[:, start:]


def fitting_cost(m: ModelSize, *, samples: bool = False) -> StageCost:
    """Every matrix rounded on fitted grids, once.

    samples: some rows of every matrix are, too, in all formats to choose from.
    """
    weights = m.params
    if samples:
        matrices = MATRICES * m.shape.layers
        sampled = min(rounding.SAMPLED, block_matrix(m))
        weights += len(rounding.CANDIDATE_BITS) * matrices * sampled
    return StageCost(
        name="fit",
        peak_bytes=2 * 4 * rounding.FUSED_CANDIDATES,
        numbers=0.0 if m.gpu else rounding.FITTED_NUMBERS * weights,
        touched_bytes=FITTED_BYTES * m.params if m.gpu else 0,
    )


def quantizing_cost(
    m: ModelSize, rounding: QuantizationConfig, *, windows: int, length: int, limit: int
) -> StageCost:
    """Quantize tensor by tensor.

    With `target_bpw`, passes over `windows` come first and say what bits cost. With GPTQ, a pass
    over them goes along and makes up for errors.
    """
    cost = StageCost(
        name="quantize",
        read_bytes=m.nbytes,
        written_bytes=rounded_size.files_bytes(m, rounding),
        peak_bytes=_writing_bytes(m, rounding.q_group_size),
    )
    if rounding.compensates:
        cost = _compensated(cost, m, rounding, tokens=windows * length, length=length, limit=limit)
    parts = [cost]
    if rounding.compensates:
        parts.append(fitting_cost(m, samples=rounding.target_bpw is not None))
    stays = cost.stays
    if rounding.target_bpw is not None:
        sensing = bit_allocation.sensing_cost(m, length, limit, windows)
        stays = {WINDOWS: min(stays.get(WINDOWS, windows), sensing.stays[WINDOWS])}
        parts.append(sensing)
    return replace(in_turn("quantize", *parts), stays=stays)


def _writing_bytes(m: ModelSize, group: int) -> int:
    """What packing a model tensor by tensor holds (packed_format.write_quantized).

    As stored, packed, and the part that is rounded at a time. group: weights that share a scale.
    """
    matrix = block_matrix(m)
    stored_item = math.ceil(m.nbytes / m.params)
    table = table_part(m)
    # of a table, which wait for its integers
    scales = 2 * 4 * max(m.side_params, m.head_params) // group
    of_matrix = (stored_item + 2) * matrix + 4 * min(matrix, rounding.PART)
    of_table = (DENSE_ITEM + 2) * table + 4 * min(m.head_params, rounding.PART)
    return stacked_bytes(m) + scales + max(of_matrix, of_table)


def _sides(m: ModelSize) -> gptq.Sides:
    """Of a block's matrices, those of one expert among them."""
    s = m.wide
    queries = s.heads * s.head_dim
    keys = s.kv_heads * s.head_dim
    sides = [
        (s.hidden, queries + 2 * keys),
        (queries, s.hidden),
        *_gated_sides(s.hidden, s.ffn),
    ]
    of_experts = mixture(m.config)
    if of_experts and of_experts.shared_width:
        sides += _gated_sides(s.hidden, of_experts.shared_width)
    return sides


def _gated_sides(hidden: int, ffn: int) -> list[tuple[int, int]]:
    """Of a gated MLP."""
    return [(hidden, 2 * ffn), (ffn, hidden)]


def _block_bytes(m: ModelSize, length: int) -> int:
    """What rounding a block holds besides it: grams, which stay until their matrices are rounded.

    What is added to them are products of one window in every stream, of wide ones a slab in numpy
    and in MLX; a GPU gets several windows at once.
    """
    sides = _sides(m)
    tokens = length
    if m.gpu:
        tokens *= residency.batches_per_pass(m.config, length, length)
    products = 0
    for inputs, _ in sides:
        if reconstruction.is_wide(inputs):
            products += 4 * inputs * (2 * gptq.PANEL + tokens)
        else:
            products += 4 * inputs**2 * parallel_windows(m)
    weights = max(inputs * outputs for inputs, outputs in sides)
    # the values as the block computes with them, in parts and whole
    values = gptq.packed_bytes(weights) + 2 * m.item * block_matrix(m)
    work = max(gptq.work_bytes(sides, fused=m.gpu), values)
    grams = [reconstruction.square_bytes(inputs) for inputs, _ in sides]
    # Weights that need no conversion stay where they were read while rounded ones take their place.
    # The widest matrix is the first.
    replaced = m.item * m.largest_block_params if m.as_stored else 0
    return sum(grams) + max(products, work, replaced + work - max(grams))


def _experts_bytes(m: ModelSize, tokens: int) -> int:
    """What rounding a mixture's block holds besides: all tokens, what one expert makes of them.

    And all experts packed, one matrix of theirs being stacked.
    """
    s = m.shape
    if not s.experts:
        return 0
    of_token = 2 * m.hidden_bytes + 4 * (s.hidden + 3 * s.ffn)
    matrix = gptq.packed_bytes(s.experts * s.ffn * s.hidden)
    return tokens * of_token + 4 * matrix + reconstruction.square_bytes(s.hidden)


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
        beside_bytes=_block_bytes(m, length) + _experts_bytes(m, tokens),
    )
    of_products, of_rounding, of_columns = gptq.operations(_sides(m), config.q_group_size)
    read_bytes = plain.read_bytes + 2 * one_pass.written_bytes
    if s.experts:
        # The tokens of one that saw few are joined by others.
        sides = _gated_sides(s.hidden, s.ffn)
        products, to_round, columns = gptq.operations(sides, config.q_group_size)
        seen = max(m.config[ACTIVE], s.experts * max(s.hidden, s.ffn) / tokens)
        of_products += (min(s.experts, seen) - 1) * products
        of_rounding += (s.experts - 1) * to_round
        of_columns += (s.experts - 1) * columns
        read_bytes += m.nbytes  # once to be rounded, and once as windows go through
    flops = 2 * one_pass.flops + s.layers * tokens * of_products
    host_flops = s.layers * of_rounding
    numbers = s.layers * of_columns
    made = plain.peak_bytes
    if config.target_bpw is not None:
        # Rows as stored and in float32: 23 bytes a weight with what rounding takes, measured; on a
        # GPU nobody did.
        stored_item = math.ceil(m.nbytes / m.params)
        item = 4 if stored_item == 4 else stored_item + 4
        if m.gpu:
            item = DENSE_ITEM
        head = reconstruction.square_bytes(s.hidden) + gptq.packed_bytes(m.head_params)
        made = max(made, head + (item + 20) * table_part(m))
        flops += 2 * tokens * s.hidden**2
        host_flops += s.hidden**2 * (s.hidden / 3 + s.vocab)
        numbers += gptq.operations([(s.hidden, s.vocab)], config.q_group_size)[2]
    held = m.slots_bytes + length * m.hidden_bytes * one_pass.stays[WINDOWS]
    return replace(
        one_pass,
        name=plain.name,
        read_bytes=read_bytes,
        written_bytes=plain.written_bytes + one_pass.written_bytes,
        peak_bytes=max(one_pass.peak_bytes, held + made),
        flops=flops,
        host_flops=host_flops,  # numpy rounds
        numbers=0.0 if m.gpu else numbers,  # rates.HOST_FLOPS has them in it
    )
