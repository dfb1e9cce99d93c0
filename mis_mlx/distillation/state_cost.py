"""What a student that is trained holds: weights, gradients, moments, and one step of training."""

import math
from collections.abc import Mapping
from typing import Any

from mis_mlx.compute.token_losses import IN_ONE_GRAPH, Footprint
from mis_mlx.hardware.memory import in_flight_bytes
from mis_mlx.maths.optimizer import group_of
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.planner.block_cost import activation_bytes, backward_bytes

# a clipped gradient; the rest of an update is written over what it is made of (measured)
UPDATE_ARRAYS = 2
# of a trained parameter: weight, gradient and two moments, float32
STATE_BYTES = 16
GRADIENT_BYTES = 4


def training_bytes(
    m: ModelSize,
    batch: int,
    length: int,
    *,
    loss: Footprint = IN_ONE_GRAPH,
    accumulates: bool = False,
) -> int:
    """Memory to train a student that is whole in memory, on micro-batches (`batch`, `length`).

    Weights and moments, and the largest of: activations and the vocabulary's part of the loss; the
    backward pass; the update. loss: computed between the passes, with windows side by side that
    have gradients each; or all in one graph, of which the least that can be promised is the sum.
    accumulates: several micro-batches, so that the gradients of earlier ones wait meanwhile.
    """
    s = m.shape
    params = m.params
    activations = activation_bytes(m, batch, length)
    head = 4 * s.vocab * s.hidden
    block = backward_bytes(m, batch, length) - activations // s.layers
    logits = loss.logit_bytes(s.vocab, batch * length)
    gradients = GRADIENT_BYTES * params
    forward = activations + 2 * head + logits
    backward = gradients
    if loss.on_host:
        lane_gradients = min(batch, loss.streams) * (gradients - head)
        backward = max(activations + head, lane_gradients + 3 * head)
    backward += block
    if accumulates:
        forward += gradients
        backward += gradients
    if not loss.on_host:
        forward += gradients
    largest = max(map(math.prod, arch.tensors_of(m.config, True).values()))
    update = gradients + UPDATE_ARRAYS * 4 * largest
    ahead = min(activations, in_flight_bytes()) if loss.gpu else 0
    return (STATE_BYTES - GRADIENT_BYTES) * params + max(forward, backward, update) + ahead


def block_state_bytes(config: Mapping[str, Any], block: int | None = None) -> int:
    """A block that is trained block by block, in memory or in a checkpoint.

    float32 weights, and moments of 8 bits. block: which one; default: the largest.
    """
    total = 0
    for shape in arch.layer_tensors(config, block=block).values():
        numbers = math.prod(shape)
        group = group_of(shape)
        if group:
            total += 4 * numbers + (2 * numbers + 8 * numbers // group)
        else:
            total += 12 * numbers
    return total
