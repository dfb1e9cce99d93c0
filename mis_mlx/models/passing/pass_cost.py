"""What a pass of a streamed model takes (models/passing/stream): bytes moved, memory, operations.

Arithmetic on configs and sizes: reads no weights, starts nothing. Numbers that come from the engine
name their origin, and tests hold the two together.
"""

import math
from typing import NamedTuple

from mis_mlx.compute import streams
from mis_mlx.compute.logits import logit_bytes
from mis_mlx.hardware.memory import headroom_bytes
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost
from mis_mlx.models.architectures import (
    arch,
    side_inputs,
)
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import residency
from mis_mlx.models.passing.residency import batches_per_pass, pass_bytes
from mis_mlx.models.passing.stream import GROUP_BYTES

SMALL_BYTES = 2**20  # norms, masks, whole pages: too little for a formula
# Of a number in float32 on its way from one file to another: as stored, twice where it was packed,
# converted
DENSE_ITEM = 12
# that Python and MLX take to know of a tensor: its name and place (measured on 24,302)
TENSOR_BYTES = 3 * 1024


def tensor_bytes(m: ModelSize) -> int:
    """Memory to rewrite the largest tensor.

    A matrix of a block lies there as stored, cut and converted; or, of a packed model, de-quantized
    and converted. Of a table with a row for each token so do some rows at a time.
    """
    item = DENSE_ITEM
    if not m.packed:
        item = 2 * math.ceil(m.nbytes / m.params) + 2
    matrix = item * block_matrix(m) + stacked_bytes(m)
    return max(matrix, DENSE_ITEM * table_part(m))


def block_matrix(m: ModelSize) -> int:
    """Numbers in the largest matrix of a block: of the FFN, or of the queries."""
    return m.wide.hidden * max(m.wide.ffn, m.wide.heads * m.wide.head_dim)


def table_part(m: ModelSize) -> int:
    """Numbers of the embedding or the head that are read and written at a time."""
    return min(load.TABLE_PART, m.head_params)


def whole_bytes(m: ModelSize) -> int:
    """Memory of a model that is opened whole: all weights as they compute, and `opening_bytes`."""
    return m.whole_work + opening_bytes(m)


def opening_bytes(m: ModelSize) -> int:
    """What opening a model tensor by tensor holds besides: the largest as stored, if converted.

    A matrix of experts is there as stored, each apart and all in one.
    """
    numbers = 0 if m.as_stored else max(m.shape.vocab, m.shape.ffn) * m.shape.hidden
    numbers = max(numbers, 2 * m.shape.experts * m.shape.ffn * m.shape.hidden)
    return math.ceil(m.nbytes / m.params * numbers)


def stacked_bytes(m: ModelSize) -> int:
    """A matrix of all experts, each packed, and those put together."""
    return 2 * 5 * m.shape.experts * m.shape.ffn * m.shape.hidden // 8


def forward_flops(m: ModelSize, tokens: int, length: int, head: bool = True) -> float:
    """Operations of a forward pass over `tokens` in windows of `length`.

    2 for each parameter a token meets (looking up an embedding is free), and causal attention.
    head: with logits.
    """
    s = m.wide
    attention = s.heads * s.head_dim * length  # 2 products x 2 x length / 2 positions seen
    rows = m.config.get("vocab_size_per_layer_input", 0)
    projected = m.side_params - rows * arch.channels(m.config)
    params = (
        m.active_share * m.all_block_params + family(m.config).attending * attention + projected
    )
    if head:
        params += m.head_params
    return 2.0 * tokens * params


def side_bytes(m: ModelSize, tokens: int) -> int:
    """What a pass over so many tokens keeps for later blocks besides hidden states.

    Per-layer channels of every block for each token that occurs, all of them at the most; keys and
    values that several blocks use.
    """
    owners = {owner for owner in family(m.config).key_owners() if owner is not None}
    shared = sum(2 * m.shape.kv_heads * family(m.config).head_size(i) for i in owners)
    numbers = m.side_numbers(tokens)
    return m.item * (numbers + tokens * shared)


def parallel_windows(m: ModelSize) -> int:
    """How many windows go through a block side by side."""
    return 1 if m.gpu else streams.count()


def workspace_bytes(m: ModelSize, tokens: int, length: int, in_pass: int = 0) -> int:
    """The most that a block's forward pass over one micro-batch holds, in float32.

    Times the number of micro-batches that go side by side here. Experts answer for as many of the
    tokens of a pass (`in_pass`) as GROUP_BYTES hold the outputs of; as much again are their inputs
    and what the outputs are added to.
    """
    by_formula = pass_bytes(m.config, tokens, length)
    of_one = int(m.block_factors.forward * by_formula)
    workspace = parallel_windows(m) * of_one
    if m.shape.experts:
        of_token = m.hidden_bytes * m.config["num_experts_per_tok"]
        workspace += 2 * max(tokens * of_token, min(in_pass * of_token, GROUP_BYTES))
    return workspace


def pass_workspace(m: ModelSize, tokens: int, micro_tokens: int, length: int) -> int:
    """The workspace of a pass over `tokens` in micro-batches; a GPU takes several at once."""
    workspace = workspace_bytes(m, micro_tokens, length, tokens)
    if m.gpu:
        batches = math.ceil(tokens / micro_tokens)
        workspace *= min(batches, batches_per_pass(m.config, micro_tokens, length))
    return workspace


def keys_bytes(m: ModelSize, tokens: int) -> int:
    """Keys and values of `tokens` tokens, in all blocks."""
    numbers = 2 * m.shape.kv_heads * m.shape.head_dim  # of a token, in a block
    blocks = family(m.config).attending
    return blocks * tokens * numbers * m.item


def texts_bytes(m: ModelSize, texts: int, tokens: int) -> int:
    """What all blocks keep of so many texts, of so many tokens each: keys, values and states."""
    states = family(m.config).states_bytes(m.item)
    return texts * (keys_bytes(m, tokens) + states)


def block_texts_bytes(m: ModelSize, texts: int, tokens: int) -> int:
    """What the block that keeps most keeps of so many texts."""
    with_attention = family(m.config).attending
    without = m.shape.layers - with_attention
    keys = keys_bytes(m, tokens) // max(1, with_attention)
    state = family(m.config).states_bytes(m.item) // max(1, without)
    return texts * max(keys, state)


class Stays(NamedTuple):
    """What stays in memory between passes: the head, and so many blocks.

    share: of the weights, which every further pass reads. nbytes: in memory.
    """

    blocks: int
    share: float
    nbytes: int


def stays(m: ModelSize, headroom_bytes: int) -> Stays:
    """What so many bytes keep between passes, as of `residency.plan`, in whole blocks."""
    head, blocks, _ = residency.plan(m, headroom_bytes, [m.block_work, m.block_work])
    if not head:
        return Stays(0, 1.0, 0)
    others_bytes = (m.shape.layers - blocks) * m.block_bytes
    return Stays(blocks, others_bytes / once_bytes(m), m.head_work + blocks * m.block_work)


def once_bytes(m: ModelSize) -> int:
    """Bytes that a pass reads where nothing stays."""
    return m.head_bytes + m.shape.layers * m.block_bytes


def stream_bytes(m: ModelSize, tokens: int) -> int:
    """What a stream holds in any pass over so many tokens, besides block and hidden states."""
    return m.slots_bytes + SMALL_BYTES + side_bytes(m, tokens)


def streamed_pass(
    name: str,
    m: ModelSize,
    *,
    tokens: int,
    length: int,
    micro_tokens: int = 0,
    limit_bytes: int = 0,
    head: bool = True,
    spool: bool = True,
    beside_bytes: int = 0,
) -> StageCost:
    """One pass from disk over `tokens`, block by block, as `stream.Stream` does.

    Every block sees all micro-batches; default: of one window. head: with logits at the end. spool:
    hidden states that find no room are written and read once a block. beside_bytes: held by
    others.
    """
    s = m.shape
    micro_tokens = micro_tokens or length
    workspace = pass_workspace(m, tokens, micro_tokens, length)
    body = m.body_bytes(workspace) + m.in_flight(workspace)
    if head:
        logits = logit_bytes(m.shape.vocab, micro_tokens, gpu=m.gpu) + m.widened_bytes
        body = max(body, m.head_work + max(logits, head_opening_bytes(m)))
    peak_bytes = beside_bytes + stream_bytes(m, tokens) + body
    hidden = tokens * m.hidden_bytes
    batch_bytes = micro_tokens * m.hidden_bytes
    stays = {}
    scratch = 0
    if spool:
        room = headroom_bytes(limit_bytes, peak_bytes)
        stays[WINDOWS] = min(tokens // micro_tokens, room // batch_bytes)
        scratch = hidden - batch_bytes * stays[WINDOWS]
    moved = scratch * (s.layers + 1)
    # A block's experts are read once a group of tokens (stream.Stream.run_experts).
    groups = math.ceil(hidden * m.config.get("num_experts_per_tok", 0) / GROUP_BYTES)
    reads = 1 + max(0, groups - 1) * (1 - m.memory_share)
    # Before any block runs: channels of so many tokens, and what some are made of. That is rows as
    # stored and as looked up, what is projected, that behind its norm, and their sum: 5.4 times the
    # channels, measured.
    filling = side_bytes(m, tokens)
    filling += 11 * m.item * min(m.side_numbers(tokens), side_inputs.PART) // 2
    return StageCost(
        name=name,
        read_bytes=int(s.layers * m.block_bytes * reads) + (m.head_bytes if head else 0) + moved,
        written_bytes=moved,
        peak_bytes=max(peak_bytes + hidden - scratch, beside_bytes + filling),
        flops=forward_flops(m, tokens, length, head=head),
        scratch_bytes=scratch,
        stays=stays,
    )


def head_opening_bytes(m: ModelSize) -> int:
    """What opening the head holds besides it: de-quantizing it, MLX runs ahead here too."""
    if m.packed and not m.as_stored:
        return m.head_work * 3 // 2
    return 0
