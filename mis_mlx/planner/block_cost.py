"""What a block holds while it is trained: activations, and the backward pass.

Formulas for every device, and for this one what planner/measured_block has found of them.
"""

from mis_mlx.models import arch, families, mixer_sizes
from mis_mlx.models.config import shape_of, versions
from mis_mlx.models.families import Config
from mis_mlx.models.model_size import ModelSize


def activation_bytes(m: ModelSize, batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks."""
    return int(m.block_factors.kept * _kept_bytes(m.config, batch, length))


def backward_bytes(m: ModelSize, batch: int, length: int) -> int:
    """The most that the backward pass through one block holds, with what its forward pass kept.

    Without the block's gradients. Measured; as much in a Gemma's block, though that keeps more.
    """
    kept = _kept_bytes(m.config, batch, length)
    kept += 4 * batch * length * mixer_sizes.above_mean(m.config, length)
    arrays = 8 if families.family(m.config).post_norms else 5
    of_one = 11 * kept // (arrays * shape_of(m.config).layers)
    return int(m.block_factors.backward * of_one)


def _kept_bytes(config: Config, batch: int, length: int) -> int:
    """Activations by formula.

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
