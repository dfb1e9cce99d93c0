"""Numbers that a block holds for each token of a window besides its MLP's and hidden states.

Measured on a CPU in float32 (benchmarks/hybrids.py): what a way back through a block keeps.
"""

from mis_mlx.models.architectures import sizes
from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config


def attention(config: Config, length: int) -> int:
    """Of attention in windows of this length: queries, keys, values, and scores."""
    return family(config).attention_numbers(length)


def other(config: Config) -> int:
    """Of what stands in place of attention; 0 where all blocks have it."""
    return family(config).mixer_numbers()


def state_bytes(config: Config, item: int) -> int:
    """What all blocks without attention carry of one text; 0 where all have it.

    item: bytes of a number, except in a gated delta rule's matrices, which are float32.
    """
    blocks = int(config["num_hidden_layers"]) - sizes.attending(config)
    return blocks * family(config).state_bytes(item)


def largest(config: Config, length: int) -> int:
    """Of the block that holds most."""
    with_attention = attention(config, length)
    without = other(config)
    return max(with_attention, without)


def of_all(config: Config, length: int) -> int:
    """Of all blocks together."""
    with_attention = sizes.attending(config)
    without = int(config["num_hidden_layers"]) - with_attention
    total = with_attention * attention(config, length)
    total += without * other(config)
    return total
