"""Numbers that a block holds for each token of a window besides its MLP's and hidden states.

Measured on a CPU in float32 (benchmarks/hybrids.py): what a way back through a block keeps.
"""

from mis_mlx.models import config as configs
from mis_mlx.models.arch import widest
from mis_mlx.models.families import Config, family


def attention(config: Config, length: int) -> int:
    """Of attention in windows of this length: queries, keys, values, and scores."""
    s = widest(config)
    numbers = 2 * (s.heads + s.kv_heads) * s.head_dim + s.heads * length
    if family(config).stateful == "linear_attention":  # queries have a gate
        numbers += s.heads * s.head_dim
    return numbers


def other(config: Config) -> int:
    """Of what stands in place of attention; 0 where all blocks have it."""
    kind = family(config).stateful
    if not kind:
        return 0
    if kind == "conv":
        return 6 * int(config["hidden_size"])
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    joined = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values
    return int(3 * joined + 4 * values)


def largest(config: Config, length: int) -> int:
    """Of the block that holds most."""
    return max(attention(config, length), other(config))


def of_all(config: Config, length: int) -> int:
    """Of all blocks together."""
    with_attention = configs.attending(config)
    without = int(config["num_hidden_layers"]) - with_attention
    return with_attention * attention(config, length) + without * other(config)


def above_mean(config: Config, length: int) -> int:
    """What is missing to all blocks being as large as the largest."""
    layers = int(config["num_hidden_layers"])
    return layers * largest(config, length) - of_all(config, length)
