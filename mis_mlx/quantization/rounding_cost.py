"""What quantizing a model takes: bytes, memory, operations; and its size afterwards.

Arithmetic on sizes, beside the modules that allocate them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mis_mlx.compute.token_losses import Footprint
from mis_mlx.hardware.ledger import headroom_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths.gptq import PANEL
from mis_mlx.maths.reconstruction import is_wide, precision
from mis_mlx.maths.rounding import (
    CANDIDATE_BITS,
    ENOUGH_BITS,
    FIT_LAUNCHES,
    FUSED_CANDIDATES,
    GROUPS,
    HELD_BYTES,
    PART,
    RANGE_ENDS,
    SLAB,
)
from mis_mlx.models.architectures import bit_floors
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import (
    DENSE_ITEM,
    block_matrix,
    forward_flops,
    parallel_windows,
    stacked_bytes,
    streamed_pass,
    table_part,
    workspace_bytes,
)
from mis_mlx.models.passing.residency import batches_per_pass
from mis_mlx.planner.block_cost import backward_bytes
from mis_mlx.settings.recipe import QuantizationConfig

BIAS_BITS = 32  # scale and bias of a group
SENSED = 8  # windows that say what bits cost


def packed_bytes(m: ModelSize, rounding: QuantizationConfig) -> int:
    """Bytes of a model in the mean bits asked for.

    Where no bits are asked for, in 4 bits, with the embedding and the head in 8.
    """
    config = rounding.affine
    if config.target_bpw:
        return int(config.target_bpw * m.params / 8)
    bits = (4 + BIAS_BITS / config.q_group_size) * m.params + 4 * m.tables_params
    bits += bit_floors.further_bits(m.config)
    return int(bits / 8)


def packed_size(m: ModelSize, rounding: QuantizationConfig) -> ModelSize:
    """A model once it is rounded."""
    nbytes = packed_bytes(m, rounding)
    share = nbytes / m.params
    return replace(
        m,
        nbytes=nbytes,
        block_bytes=int(share * m.largest_block_params),
        head_bytes=int(share * m.head_params),
        packed=True,
        as_stored=m.gpu,
    )


def files_bytes(m: ModelSize, rounding: QuantizationConfig) -> int:
    """Bytes on disk once a model is rounded: itself, and its blocks and head as begun."""
    packed = packed_bytes(m, rounding)
    if not rounding.affine.compensates:
        return packed
    kept = m.all_block_params
    if _head_too(rounding.affine):
        kept += m.head_params
    return packed + packed * kept // m.params


def _head_too(config: QuantizationConfig) -> bool:
    """Whether the head may get fewer than 8 bits, and is rounded by what reaches it then."""
    return config.target_bpw is not None


def quantizing_cost(
    m: ModelSize,
    rounding: QuantizationConfig,
    *,
    windows: int,
    length: int,
    limit: int,
) -> StageCost:
    """Quantize tensor by tensor.

    With `target_bpw`, passes over `windows` come first and say what bits cost. With GPTQ, a pass
    over them goes along and makes up for errors.
    """
    config = rounding.affine
    # as stored, packed, and the part that is rounded at a time
    largest = block_matrix(m)
    stored_item = math.ceil(m.nbytes / m.params)
    peak = (stored_item + 2) * largest + 4 * min(largest, PART)
    peak = max(peak, (DENSE_ITEM + 2) * table_part(m) + 4 * min(m.head_params, PART))
    peak += stacked_bytes(m)
    # scales of a table, which wait for its integers
    peak += 2 * 4 * max(m.side_params, m.head_params) // config.q_group_size
    cost = StageCost(
        name="quantize",
        read_bytes=m.nbytes,
        written_bytes=files_bytes(m, config),
        peak_bytes=peak,
        flops=0.0,
    )
    if config.compensates:
        cost = _compensated(
            cost,
            m,
            tokens=windows * length,
            length=length,
            limit_bytes=limit,
            group=config.q_group_size,
            head_too=_head_too(config),
        )
    if config.target_bpw is not None:
        cost = _sensed(cost, m, windows=windows, length=length, limit=limit)
    return cost


def _compensated(
    plain: StageCost,
    m: ModelSize,
    *,
    tokens: int,
    length: int,
    limit_bytes: int,
    group: int,
    head_too: bool,
) -> StageCost:
    """`plain`, rounding tensor by tensor, with a pass that makes up for the errors.

    group: weights that share a scale. As in quantization/stage: a block's gram matrices stay until
    their matrices are rounded. head_too: the head is rounded so, too.
    """
    s = m.wide
    squares = [_square_bytes(inputs) for inputs, _ in _sides(s)]
    grams = sum(squares)
    gram_flops, rounding_flops = _block_flops(s)
    # Weights that need no conversion stay where they were read while rounded ones take their place.
    # The widest matrix is the first.
    replaced = m.item * m.largest_block_params if m.as_stored else 0
    rounding_first = grams + max(_gathering_bytes(m, length), _rounding_bytes(m))
    working = max(rounding_first, grams - max(squares) + replaced + _rounding_bytes(m))
    one_pass = streamed_pass(
        "",
        m,
        tokens=tokens,
        micro_tokens=length,
        length=length,
        limit_bytes=limit_bytes,
        head=False,
        beside_bytes=working,
    )
    held = one_pass.held_tokens * m.hidden_bytes + m.slots_bytes
    fits = s.layers * _fits(_sides(s), group)
    planned = replace(
        one_pass,
        name=plain.name,
        read_bytes=plain.read_bytes + 2 * one_pass.written_bytes,
        written_bytes=plain.written_bytes + one_pass.written_bytes,
        peak_bytes=max(one_pass.peak_bytes, plain.peak_bytes + held),
        flops=2 * one_pass.flops + s.layers * tokens * gram_flops,
        waits=2 * one_pass.waits + fits,  # numpy goes on from every grid
        host_flops=s.layers * rounding_flops,  # numpy rounds
        launches=fits * FIT_LAUNCHES,
    )
    if head_too:
        return _with_head(planned, m, tokens=tokens, held=held, group=group)
    return planned


def _block_flops(s: Shape) -> tuple[float, float]:
    """(operations of a token's products in a block; of rounding its matrices, in numpy)."""
    gram_flops: float = 0
    rounding_flops: float = 0
    for inputs, outputs in _sides(s):
        products: float = 2 * inputs**2
        work = inputs**2 * (inputs / 3 + outputs)
        if is_wide(inputs):  # one triangle of the sums, and float32, twice as quick as float64
            products /= 2
            work /= 2
        gram_flops += products
        rounding_flops += work
    return gram_flops, rounding_flops


def _with_head(blocks: StageCost, m: ModelSize, *, tokens: int, held: int, group: int) -> StageCost:
    """`blocks`, and then the head, which waits packed until it is written.

    held: bytes of hidden states and slots beside it.
    """
    width = m.wide.hidden
    vocab = m.wide.vocab
    taken = _square_bytes(width) + _packed_bytes(m.head_params)
    taken += (DENSE_ITEM + 20) * table_part(m)
    fits = _fits([(width, vocab)], group)
    return replace(
        blocks,
        peak_bytes=max(blocks.peak_bytes, held + taken),
        flops=blocks.flops + 2 * tokens * width**2,
        waits=blocks.waits + fits,
        host_flops=blocks.host_flops + width**2 * (width / 3 + vocab),
        launches=blocks.launches + fits * FIT_LAUNCHES,
    )


def _fits(sides: Sequence[tuple[int, int]], group: int) -> int:
    """How often GPTQ fits grids of matrices of (in, out): for each group of columns, some rows at
    a time.
    """
    fits = 0
    for inputs, outputs in sides:
        rows = min(PART // inputs, FUSED_CANDIDATES // (RANGE_ENDS**2 * group))
        fits += inputs // group * math.ceil(outputs / rows)
    return fits


def _gathering_bytes(m: ModelSize, length: int) -> int:
    """What a pass takes to add to gram matrices: products of one window, in every stream.

    Of a wide one there is a slab, in numpy and in MLX. A GPU gets several windows at once.
    """
    tokens = length
    if m.gpu:
        tokens *= batches_per_pass(m.config, length, length)
    taken = 0
    for inputs, _ in _sides(m.wide):
        if is_wide(inputs):
            taken += 4 * inputs * (2 * PANEL + tokens)
        else:
            taken += 4 * inputs**2 * parallel_windows(m)
    return taken


def _rounding_bytes(m: ModelSize) -> int:
    """What maths/gptq takes besides the gram matrices, for the largest of a block's matrices.

    To factorize, three panels and three corners. To round, 20 bytes for each weight of those
    rounded at a time, and those already packed; on a GPU two arrays of the grids that are tried
    for a group. Afterwards the values as the block computes with them, in parts and whole.
    """
    sides = _sides(m.wide)
    widest = max(inputs for inputs, _ in sides)
    panel = min(PANEL, widest)
    panels = 3 * (widest + panel) * panel * np.dtype(precision(widest)).itemsize
    weights = max(inputs * outputs for inputs, outputs in sides)
    packed = _packed_bytes(weights)
    columns = 20 * min(weights, PART)
    if m.gpu:
        tried = RANGE_ENDS**2 * max(GROUPS) * max(outputs for _, outputs in _sides(m.wide))
        columns += 2 * 4 * min(tried, FUSED_CANDIDATES)
    values = 2 * m.item * block_matrix(m)
    return max(panels, 2 * packed + columns, packed + values)


def _packed_bytes(weights: int) -> int:
    """The most bytes of so many weights that GPTQ rounds."""
    bits = max(b for b in CANDIDATE_BITS if b < ENOUGH_BITS)
    return weights * bits // 8 + 4 * weights // min(GROUPS)


def _sides(s: Shape) -> list[tuple[int, int]]:
    """(in, out) of a block's matrices, those with the same inputs together."""
    queries = s.heads * s.head_dim
    keys = s.kv_heads * s.head_dim
    return [
        (s.hidden, queries + 2 * keys),
        (queries, s.hidden),
        (s.hidden, 2 * s.ffn),
        (s.ffn, s.hidden),
    ]


def _square_bytes(size: int) -> int:
    """Bytes of a matrix (size, size) in the type of its solver."""
    return np.dtype(precision(size)).itemsize * size**2


def _sensed(
    plain: StageCost,
    m: ModelSize,
    *,
    windows: int,
    length: int,
    limit: int,
) -> StageCost:
    """`plain`, after a forward and a backward pass that say what bits cost (bit_allocation).

    Inputs of all blocks are spooled if need be. Traffic and operations are those of
    bit_allocation's docstring.
    """
    window_bytes = length * m.hidden_bytes
    one_pass = streamed_pass(
        "", m, tokens=length, micro_tokens=length, length=length, head=False, spool=False
    )
    s = m.wide
    formats = len(CANDIDATE_BITS)
    # inputs of a block's matrices, and gradients of their outputs, in one window
    attention = 2 * (s.heads + s.kv_heads) * s.head_dim
    seen = 4 * length * (4 * s.hidden + attention + 3 * s.ffn)
    at_once = max(HELD_BYTES, 4 * m.largest_block_params) // seen
    batch = min(windows, max(1, at_once))
    batches = math.ceil(windows / batch)
    sensing_bytes = _sensing_bytes(
        m, windows=windows, length=length, seen_bytes=batch * seen, batch=batch
    )
    peak = one_pass.peak_bytes + sensing_bytes
    peak += 2 * windows * window_bytes
    inputs_bytes = window_bytes * m.shape.layers  # of all blocks, of a window
    held = min(windows, headroom_bytes(limit, peak, m.gpu) // inputs_bytes)
    spooled = (windows - held) * inputs_bytes
    touched = windows * (12 + 4 * formats) + batches * 20 * formats
    sensing = StageCost(
        name="",
        read_bytes=2 * m.nbytes + spooled,
        written_bytes=spooled,
        peak_bytes=peak + held * inputs_bytes,
        flops=4 * forward_flops(m, windows * length, length),
        touched_bytes=touched * s.layers * m.largest_block_params,
        waits=one_pass.waits + s.layers * (7 * (formats + batches) + windows),
    )
    held_tokens = min(plain.held_tokens or windows * length, held * length)
    return replace(plain.then(sensing), held_tokens=held_tokens)


def _sensing_bytes(m: ModelSize, *, windows: int, length: int, seen_bytes: int, batch: int) -> int:
    """What sensing holds at its peak besides a forward pass: at the head, or on the way back.

    That is, besides the block: what its matrices see of `batch` windows (`seen_bytes`), and a slab
    of gradients and errors.
    """
    # The workspace of the forward pass is gone at the head, and the head before the way back.
    workspace = workspace_bytes(m, length, length)
    # Of logits three arrays were measured on a CPU, five under Metal's policy.
    head = m.head_work
    head += Footprint(on_host=True).logit_bytes(2 * m.shape.vocab, length) * (2 + m.gpu) // 2
    # In one stream 0.2 to 0.8 of it were measured, in two 0.4 to 1.2.
    backward = (1 + parallel_windows(m)) * backward_bytes(m, 1, length) // 2
    if m.gpu:  # half a stack goes back in one pass
        backward *= min(windows, max(1, batches_per_pass(m.config, length, length) // 2))
    s = m.wide
    slab = (2 * batch + 4) * 4 * min(SLAB, s.ffn * s.hidden)
    sensed = max(0, backward - workspace) + seen_bytes + slab
    return max(head - workspace, sensed)


def sensitivity_cost(teacher: ModelSize, length: int, limit: int) -> StageCost:
    """See on SENSED windows what every matrix of the teacher costs in fewer bits."""
    rounding = QuantizationConfig(q_method="round")
    return quantizing_cost(teacher, rounding, windows=SENSED, length=length, limit=limit)
