"""How large a model is once it is quantized, and what it takes to see what bits cost.

What rounding takes says quantization/stage.
"""

import math
from dataclasses import replace

from mis_mlx.compute.token_losses import Footprint
from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost
from mis_mlx.maths.rounding import (
    GROUPS,
    HELD_BYTES,
    PART,
    SLAB,
)
from mis_mlx.models.architectures import bit_floors
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.backward_pass import head_in_slabs, slabs_bytes
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
from mis_mlx.models.passing.residency import backward_bytes, batches_per_pass
from mis_mlx.settings.recipe import QuantizationConfig

BIAS_BITS = 32  # scale and bias of a group


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


def rounds_head(config: QuantizationConfig) -> bool:
    """Whether the head may get fewer than 8 bits, and is rounded by what reaches it then."""
    return config.target_bpw is not None


def files_bytes(m: ModelSize, rounding: QuantizationConfig) -> int:
    """Bytes on disk once a model is rounded: itself, and its blocks and head as begun."""
    packed = packed_bytes(m, rounding)
    if not rounding.affine.compensates:
        return packed
    kept = m.all_block_params
    if rounds_head(rounding.affine):
        kept += m.head_params
    return packed + packed * kept // m.params


def writing_bytes(m: ModelSize, group: int) -> int:
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
    ledger.moment("matrix", whole=(stored_item + 2) * matrix, part=4 * min(matrix, PART))
    ledger.moment("table", rows=(DENSE_ITEM + 2) * table, part=4 * min(m.head_params, PART))
    return ledger.peak_bytes


def sensing_cost(m: ModelSize, *, windows: int, length: int, limit: int) -> StageCost:
    """A forward and a backward pass that say what bits cost (bit_allocation).

    Inputs of all blocks are spooled if need be. Operations are those of bit_allocation's docstring.
    """
    s = m.wide
    # inputs of a block's matrices, and gradients of their outputs, in one window
    attention = 2 * (s.heads + s.kv_heads) * s.head_dim
    seen = 4 * length * (4 * s.hidden + attention + 3 * s.ffn)
    at_once = max(HELD_BYTES, 4 * m.largest_block_params) // seen
    batch = min(windows, max(1, at_once))
    one_pass = streamed_pass("", m, tokens=length, length=length, head=False, spool=False)
    # The workspace of the forward pass is gone at the head, and the head before the way back.
    workspace = workspace_bytes(m, length, length)
    # In one stream 0.2 to 0.8 of it were measured, in two 0.4 to 1.2.
    backward = (1 + parallel_windows(m)) * backward_bytes(m, 1, length) // 2
    if m.gpu:  # half a stack goes back in one pass
        backward *= min(windows, max(1, batches_per_pass(m.config, length, length) // 2))
    ledger = Ledger(limit, m.gpu)
    ledger.hold("a pass without its workspace", one_pass.peak_bytes - workspace)
    ledger.hold("hidden states and cotangents", length * m.hidden_bytes, 2 * windows)
    ledger.hold("variances of groups", 4 * m.tables_params // min(GROUPS))  # embedding_costs
    slabs = head_in_slabs(m.config)
    if slabs:
        ledger.moment("head", slabs=slabs_bytes(m.config, windows, length))
    else:
        # Of logits three arrays were measured on a CPU, five under Metal's policy.
        logits = Footprint(on_host=True).logit_bytes(2 * m.shape.vocab, length) * (2 + m.gpu) // 2
        ledger.moment("head", head=m.head_work, logits=logits)
    ledger.moment(
        "way back",
        block=max(workspace, backward),
        seen=batch * seen,
        slab=(2 * batch + 4) * 4 * min(SLAB, s.ffn * s.hidden),
    )
    inputs_bytes = length * m.hidden_bytes * m.shape.layers
    held = ledger.fill(WINDOWS, inputs_bytes, windows)
    spooled = (windows - held) * inputs_bytes
    return StageCost(
        name="sensitivity",
        read_bytes=2 * m.nbytes + spooled + slabs * 3 * m.head_bytes,
        written_bytes=spooled,
        peak_bytes=ledger.peak_bytes,
        flops=4 * forward_flops(m, windows * length, length)
        + slabs * 4 * windows * length * m.head_params,
        stays=ledger.filled,
    )
