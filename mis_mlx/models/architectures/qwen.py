"""Qwen 2 and Qwen 3: biases of queries, keys and values, or norms of their heads."""

from mis_mlx.models.architectures.base import Architecture


class Qwen2(Architecture):
    """Biases in front of attention alone."""

    name = "qwen2"
    mlx = "qwen2"
    gguf = "qwen2"
    qkv_bias = True
    other_biases = False
    rope_theta = 1e6
    head_dim_follows = True


class Qwen3(Architecture):
    """No biases; norms of heads."""

    name = "qwen3"
    mlx = "qwen3"
    gguf = "qwen3"
    qkv_bias = False
    other_biases = False
    head_norms = "each"
    heads_fill_hidden = False
