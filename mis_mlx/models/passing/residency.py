"""What a model's blocks hold: those that stay between passes, and what one takes while it works.

A block is read into a slot: memory of the block's size, which the next block can take over. Whether
a block needs its slot as long as it lives decides what a resident block costs. What it takes while
it works is said by formulas, which planner/measured_block corrects for this device.
"""

import math
from collections import defaultdict

from mis_mlx.models.architectures import (
    arch,
    experts,
    side_inputs,
)
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import Config
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.types import Checkpoint, TensorAt

FLOAT32_BYTES = 4
STACK = 8  # windows that a GPU takes through a block in one pass, at most,
STACK_BYTES = 2**27  # and what that pass may hold
Tensors = dict[str, TensorAt]


def slot_groups(
    checkpoint: Checkpoint,
) -> tuple[dict[int, Tensors], dict[tuple[int, int], Tensors]]:
    """The tensors that are read together: ({block: its own}, {(block, expert): its own})."""
    layers = checkpoint.config["num_hidden_layers"]
    blocks: dict[int, Tensors] = {i: {} for i in range(layers)}
    by_expert = defaultdict[tuple[int, int], Tensors](dict)
    for name, tensor in checkpoint.tensors.items():
        i = arch.block_of(name)
        if i is None:
            continue
        e = experts.expert_of(name)
        if e is None:
            blocks[i][name] = tensor
        else:
            by_expert[i, e][name] = tensor
    return blocks, by_expert


def plan(m: ModelSize, headroom_bytes: int | None, slot_bytes: list[int]) -> tuple[bool, int, int]:
    """(whether the head stays in memory, how many blocks stay, how many experts).

    headroom_bytes: for the head first, then blocks, then experts; None: everything stays.
    slot_bytes: of a block's slot and of an expert's, where weights stay in them; empty where they
    leave them, so that their size in computation counts.
    """
    shape = m.shape
    if headroom_bytes is None:
        return True, shape.layers, shape.layers * shape.experts
    left_bytes = headroom_bytes - m.head_work
    if left_bytes < 0:
        return False, 0, 0
    item_bytes = slot_bytes or _converted_bytes(m)
    blocks = min(shape.layers, left_bytes // item_bytes[0])
    kept_experts = 0
    if shape.experts:
        left_bytes -= blocks * item_bytes[0]
        kept_experts = left_bytes // item_bytes[1]
    return True, blocks, kept_experts


def _converted_bytes(m: ModelSize) -> list[int]:
    """Bytes in computation of the largest block without its experts, and of one expert."""
    block = 0
    expert = 0
    for name, shape in arch.layer_tensors(m.config).items():
        e = experts.expert_of(name)
        if e is None:
            block += math.prod(shape) * m.item
        elif e == 0:
            expert += math.prod(shape) * m.item
    return [block, expert]


def pass_bytes(settings: Config, tokens: int, length: int) -> int:
    """The most bytes that a block's forward pass over so many tokens holds in float32.

    length: of the windows.
    """
    shape = family(settings).widest
    ffn = 3 * family(settings).active_ffn_size()
    per_token = 8 * shape.hidden + ffn
    per_token += family(settings).largest_numbers(length)
    return 4 * tokens * per_token


def activation_bytes(m: ModelSize, batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks."""
    by_formula = _kept_bytes(m.config, batch, length)
    return int(m.block_factors.kept * by_formula)


def backward_bytes(m: ModelSize, batch: int, length: int) -> int:
    """The most that the backward pass through one block holds, with what its forward pass kept.

    Without the block's gradients. Measured; as much in a Gemma's block, though that keeps more.
    """
    kept = _kept_bytes(m.config, batch, length)
    tokens = batch * length
    # What is missing to all blocks being as large as the largest.
    most = m.shape.layers * family(m.config).largest_numbers(length)
    kept += FLOAT32_BYTES * tokens * (most - family(m.config).all_numbers(length))
    arrays = 5
    if family(m.config).norms_outputs:
        arrays = 8
    by_formula = 11 * kept // (arrays * m.shape.layers)
    return int(m.block_factors.backward * by_formula)


def _kept_bytes(config: Config, batch: int, length: int) -> int:
    """Activations by formula.

    Measured within 3 %. Gemma's blocks keep more: norms behind attention and MLP, and the terms of
    GELU.
    """
    s = family(config).widest
    hidden_arrays = 6
    ffn_arrays = 5
    if family(config).norms_outputs:
        hidden_arrays = 10
        ffn_arrays = 10
    hidden = hidden_arrays * s.hidden
    ffn = ffn_arrays * family(config).active_ffn_size()
    mixers = family(config).all_numbers(length)
    # of channels: rows, their projection, that behind its norm, and the sum
    channels = 4 * arch.channels(config)
    per_token = s.layers * (hidden + ffn) + mixers + channels
    tokens = batch * length
    return FLOAT32_BYTES * tokens * per_token


def batches_per_pass(settings: Config, tokens: int, length: int) -> int:
    """The number of batches of so many tokens, in windows of `length`, in one pass on a GPU.

    One window is little work for it, and it waits for each to be evaluated. Experts are computed
    batch by batch, and so are blocks that take more than hidden states.
    """
    if shape_of(settings).experts or not side_inputs.plain(settings):
        return 1
    windows = max(1, tokens // length)
    by_windows = STACK // windows
    by_memory = STACK_BYTES // pass_bytes(settings, tokens, length)
    return max(1, min(by_windows, by_memory))
