"""OLMo 2: norms behind attention and MLP, none before them; queries and keys normed together."""

from mis_mlx.models.architectures.base import Architecture


class Olmo2(Architecture):
    """Each norm takes in what attention or the MLP adds to the stream."""

    name = "olmo2"
    mlx = "olmo2"
    gguf = "olmo2"
    first_norms = ()
    second_norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    head_norms = "all"
    qkv_bias = False
    other_biases = False
    steps = 2
    # no published model has biases, transformers has none in the MLP, and llama.cpp has none
    only = (("attention_bias", False), ("mlp_bias", False))
    axes = ("layers", "ffn")
    why = "its queries and keys are normed over all heads, and norms stand behind attention and MLP"
