"""Numbers that a block holds for each token of a window besides its MLP's and hidden states.

Measured on a CPU in float32 (benchmarks/hybrids.py): what a way back through a block keeps.
"""

from mis_mlx.models.architectures import sizes
from mis_mlx.models.architectures.arch import widest
from mis_mlx.models.architectures.families import Config, family


def attention(config: Config, length: int) -> int:
    """Of attention in windows of this length: queries, keys, values, and scores."""
    s = widest(config)
    heads = s.heads + s.kv_heads
    numbers = 2 * heads * s.head_dim
    numbers += s.heads * length
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
    value_heads = config["linear_num_value_heads"]
    key_heads = config["linear_num_key_heads"]
    values = value_heads * config["linear_value_head_dim"]
    keys = key_heads * config["linear_key_head_dim"]
    joined = 2 * keys + values
    return int(3 * joined + 4 * values)


def state_bytes(config: Config, item: int) -> int:
    """What all blocks without attention carry of one text; 0 where all have it.

    item: bytes of a number, except in a gated delta rule's matrices, which are float32.
    """
    kind = family(config).stateful
    if not kind:
        return 0
    layers = int(config["num_hidden_layers"])
    blocks = layers - sizes.attending(config)
    if kind == "conv":
        reach = int(config["conv_L_cache"]) - 1
        hidden = int(config["hidden_size"])
        rows = reach * hidden
        return blocks * rows * item
    key_width = int(config["linear_key_head_dim"])
    keys = int(config["linear_num_key_heads"]) * key_width
    heads = int(config["linear_num_value_heads"])
    values = heads * int(config["linear_value_head_dim"])
    reach = int(config["linear_conv_kernel_dim"]) - 1
    joined = 2 * keys + values
    rows = reach * joined
    matrices = values * key_width
    of_block = rows * item
    of_block += 4 * matrices
    return blocks * of_block


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


def above_mean(config: Config, length: int) -> int:
    """What is missing to all blocks being as large as the largest."""
    layers = int(config["num_hidden_layers"])
    most = layers * largest(config, length)
    return most - of_all(config, length)
