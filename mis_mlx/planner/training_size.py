"""What training a model takes beside its weights: activations, logits, gradients, the update. Arithmetic on configs.

Does not know what else is in memory (planner/phases). What is measured was measured on a CPU."""

import math
from collections.abc import Mapping
from typing import Any

from mis_mlx.maths.losses import chunk_rows
from mis_mlx.maths.optimizer import group_of
from mis_mlx.models import arch
from mis_mlx.models.config import shape_of

CHUNKS_AHEAD = 3  # of `losses.kl_sum`, whose memory MLX takes before the first of them is done (measured)
PACKED_UPDATE_ARRAYS = 4  # opened moments, a new weight, and codes (measured)
UPDATE_ARRAYS = 2  # a clipped gradient; what else an update makes is written over what it was made of (measured)
STATE_BYTES, GRADIENT_BYTES = 16, 4  # of a trained parameter: weight, gradient and two moments, float32


def activation_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks. Measured within 3 %."""
    s = shape_of(config)
    per_token = 6 * s.hidden + 5 * arch.met(config) + 2 * (s.heads + s.kv_heads) * s.head_dim + s.heads * length
    return 4 * s.layers * batch * length * per_token


def backward_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """The most that the way back through one block holds, its gradients not among it; what it kept is. Measured."""
    return 11 * activation_bytes(config, batch, length) // (5 * shape_of(config).layers)


def logit_bytes(vocab: int, tokens: int, host: bool = False) -> int:
    """Logits under way: chunks of five float32 arrays (maths/losses); on the host two, of one chunk (host_losses)."""
    rows = chunk_rows(vocab)
    if host:
        return 2 * min(tokens, rows) * vocab * 4
    return 5 * min(CHUNKS_AHEAD, math.ceil(tokens / rows)) * rows * vocab * 4


def training_bytes(config: Mapping[str, Any], batch: int, length: int, host_lanes: int = 0) -> int:
    """A student whole in memory: weights and moments, and the largest of: activations and the vocabulary's part of the
    loss; the way back; the update. host_lanes: of the way where numpy computes the loss between the passes
    (live_teacher), each with gradients; 0: all in one graph, of which the least that can be promised is the sum."""
    s, params = shape_of(config), arch.params(config)
    kept, head = activation_bytes(config, batch, length), 4 * s.vocab * s.hidden
    block = backward_bytes(config, batch, length) - kept // s.layers
    loss, gradients = 2 * head + logit_bytes(s.vocab, batch * length, bool(host_lanes)), GRADIENT_BYTES * params
    forth, back = kept + loss, gradients + block
    if host_lanes:
        back = max(kept + head, host_lanes * (gradients - head) + 3 * head) + block
    else:
        forth += gradients
    largest = max(map(math.prod, arch.tensors_of(config, True).values()))
    update = gradients + UPDATE_ARRAYS * 4 * largest
    return (STATE_BYTES - GRADIENT_BYTES) * params + max(forth, back, update)


def block_state_bytes(config: Mapping[str, Any]) -> int:
    """A block that is trained block by block, in memory or in a checkpoint: float32 weights, and moments of 8 bits."""
    nbytes = 0
    for shape in arch.layer_tensors(config).values():
        size, group = math.prod(shape), group_of(shape)
        nbytes += 4 * size + (2 * size + 8 * size // group if group else 8 * size)
    return nbytes


def way_back_bytes(
    config: Mapping[str, Any], batch: int, parts: int, length: int, lanes: int, host: bool, rank: int = 0
) -> int:
    """What a step of `parts` micro-batches holds while a student is trained block by block (distillation/sharded),
    beside its weights and moments: what entered each block, the head, and the largest of: the loss, the way back of a
    block, its update. lanes: windows side by side, a gradient each. host: as of `logit_bytes`. rank: of adapters."""
    s, shapes = shape_of(config), arch.layer_tensors(config).values()
    sizes = [rank * sum(shape) if rank else math.prod(shape) for shape in shapes]
    gradient, side_by_side = 4 * sum(sizes), min(lanes, batch)
    back = backward_bytes(config, batch, length) + (side_by_side + (parts > 1)) * gradient
    loss = logit_bytes(s.vocab, batch * length, host)
    loss += activation_bytes(config, batch, length) // s.layers + (parts > 1) * gradient if host else back
    update = gradient + lanes * PACKED_UPDATE_ARRAYS * 4 * max(sizes)
    return 4 * (s.layers * batch * parts * length + s.vocab) * s.hidden + max(loss, back, update)
