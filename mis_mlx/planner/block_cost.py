"""What a block holds while it is trained: activations, and the backward pass.

Formulas for every device, and for this one what planner/measured_block has found of them.
"""

from mis_mlx.models.architectures import arch, mixer_sizes
from mis_mlx.models.architectures.shape import Config
from mis_mlx.models.architectures.sizes import norms_outputs, versions
from mis_mlx.models.opening.model_size import ModelSize

FLOAT32_BYTES = 4


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
    kept += FLOAT32_BYTES * tokens * mixer_sizes.above_mean(m.config, length)
    arrays = 5
    if norms_outputs(m.config):
        arrays = 8
    by_formula = 11 * kept // (arrays * m.shape.layers)
    return int(m.block_factors.backward * by_formula)


def _kept_bytes(config: Config, batch: int, length: int) -> int:
    """Activations by formula.

    Measured within 3 %. Gemma's blocks keep more: norms behind attention and MLP, and the terms of
    GELU.
    """
    s = arch.widest(config)
    hidden_arrays = 6
    ffn_arrays = 5
    if norms_outputs(config):
        hidden_arrays = 10
        ffn_arrays = 10
    hidden = hidden_arrays * s.hidden * versions(config)
    ffn = ffn_arrays * arch.active_ffn_size(config)
    mixers = mixer_sizes.of_all(config, length)
    # of channels: rows, their projection, that behind its norm, and the sum
    channels = 4 * arch.channels(config)
    per_token = s.layers * (hidden + ffn) + mixers + channels
    tokens = batch * length
    return FLOAT32_BYTES * tokens * per_token
