"""What a block holds while it is trained: activations, and the backward pass."""

from collections.abc import Mapping
from typing import Any

from mis_mlx.models import arch, families, mixer_sizes
from mis_mlx.models.config import shape_of, versions


def activation_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks.

    Measured within 3 %. Gemma's blocks keep more: norms behind attention and MLP, and the terms of
    GELU.
    """
    s = arch.widest(config)
    hidden_arrays = 6
    ffn_arrays = 5
    if families.family(config).post_norms:
        hidden_arrays = 10
        ffn_arrays = 10
    per_token = hidden_arrays * s.hidden * versions(config)
    per_token += ffn_arrays * arch.active_ffn_size(config)
    numbers = s.layers * per_token + mixer_sizes.of_all(config, length)
    # of channels: rows, their projection, that behind its norm, and the sum
    return 4 * batch * length * (numbers + 4 * arch.channels(config))


def backward_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """The most that the backward pass through one block holds, with what its forward pass kept.

    Without the block's gradients. Measured; as much in a Gemma's block, though that keeps more.
    """
    kept = activation_bytes(config, batch, length)
    kept += 4 * batch * length * mixer_sizes.above_mean(config, length)
    arrays = 8 if families.family(config).post_norms else 5
    return 11 * kept // (arrays * shape_of(config).layers)
