"""The names and shapes of the tensors that a config promises: pure functions of the config."""

import math
import re

from mis_mlx.models.architectures import experts
from mis_mlx.models.architectures.families import Config, Family, Shapes, family
from mis_mlx.models.architectures.sizes import (
    attends,
    ffn_size,
    head_size,
    key_owners,
    shape_of,
    versions,
)

# what the names of small matrices end with, whose rows are too short to be packed
COEFFICIENTS = ("_coefs.weight", ".modality_router.weight")
# what the names of the table of per-layer inputs begin with
PER_LAYER = "model.embed_tokens_per_layer."


def layer_tensors(config: Config, stacked: bool = False, block: int | None = None) -> Shapes:
    """Names (without `model.layers.N.`) and shapes (out, in) of one block's tensors.

    They come in forward order. stacked: all experts' matrices in one (E, out, in), as mlx-lm has
    them. block: its number, where blocks differ; default: the largest block's.
    """
    s = shape_of(config)
    row = family(config)
    if block is None:
        block = largest_block(config)
    tensors = _altup_tensors(config)
    if attends(config, block):
        tensors |= _attention_tensors(config, block)
    elif row.stateful == "conv":
        tensors |= _convolution_tensors(config)
    else:
        tensors |= _delta_tensors(config)
    if row.experts:
        return tensors | experts.tensors_of(config, stacked)
    ffn = ffn_size(config, block)
    bias = row.other_biases and bool(config.get("mlp_bias"))
    sizes = {"gate_proj": ffn, "up_proj": ffn}
    if row.joined:
        sizes = {"gate_up_proj": 2 * ffn}
    for name, out in sizes.items():
        tensors |= _linear(f"mlp.{name}", out, s.hidden, bias=bias)
    tensors |= _linear("mlp.down_proj", s.hidden, ffn, bias=bias)
    if row.per_layer:
        channels = config[row.per_layer]
        tensors["per_layer_input_gate.weight"] = (channels, s.hidden)
        tensors["per_layer_projection.weight"] = (s.hidden, channels)
        tensors["post_per_layer_input_norm.weight"] = (s.hidden,)
    if row.block_scale:
        tensors["layer_scalar"] = (1,)
    return tensors


def _convolution_tensors(config: Config) -> Shapes:
    """The tensors of a short convolution, and of the norms around it.

    The kernel is (D, width, 1): one for each channel.
    """
    hidden = shape_of(config).hidden
    return {
        "input_layernorm.weight": (hidden,),
        "conv.in_proj.weight": (3 * hidden, hidden),
        "conv.conv.weight": (hidden, config["conv_L_cache"], 1),
        "conv.out_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
    }


def _delta_tensors(config: Config) -> Shapes:
    """The tensors of a gated delta rule, and of the norms around it.

    Queries, keys and values go through one convolution; z is the gate of the output, a and b are
    what each head forgets and learns of a token.
    """
    hidden = shape_of(config).hidden
    heads = config["linear_num_value_heads"]
    values = heads * config["linear_value_head_dim"]
    joined = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values
    return {
        "input_layernorm.weight": (hidden,),
        "linear_attn.in_proj_qkv.weight": (joined, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (joined, config["linear_conv_kernel_dim"], 1),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
        "post_attention_layernorm.weight": (hidden,),
    }


def _altup_tensors(config: Config) -> Shapes:
    """What predicts and corrects a block's versions of the hidden states, and its second way."""
    hidden = shape_of(config).hidden
    row = family(config)
    tensors: Shapes = {}
    if row.versions:
        versions = config[row.versions]
        tensors["altup.correct_output_scale"] = (hidden,)
        tensors["altup.correction_coefs.weight"] = (versions, versions)
        tensors["altup.prediction_coefs.weight"] = (versions**2, versions)
        tensors["altup.modality_router.weight"] = (versions, hidden)
        tensors["altup.router_norm.weight"] = (hidden,)
    if row.laurel:
        rank = config[row.laurel]
        tensors["laurel.linear_left.weight"] = (rank, hidden)
        tensors["laurel.linear_right.weight"] = (hidden, rank)
        tensors["laurel.post_laurel_norm.weight"] = (hidden,)
    return tensors


def _linear(name: str, out: int, into: int, *, bias: bool) -> Shapes:
    """The tensors of one linear layer."""
    tensors: Shapes = {f"{name}.weight": (out, into)}
    if bias:
        tensors[f"{name}.bias"] = (out,)
    return tensors


def _attention_tensors(config: Config, block: int) -> Shapes:
    """The tensors of attention, and of the norms around attention and around the MLP."""
    s = shape_of(config)
    row = family(config)
    has_keys = key_owners(config)[block] is None
    q_size = s.heads * head_size(config, block)
    kv_size = s.kv_heads * head_size(config, block)
    biased = bool(config.get("attention_bias"))
    qkv_bias = biased if row.qkv_bias is None else row.qkv_bias
    # with the delta rule, queries have as many rows again, for a gate of attention's output
    gates = 2 if row.stateful == "linear_attention" else 1
    sizes = {"q_proj": gates * q_size}
    if row.joined:
        sizes = {"qkv_proj": q_size + 2 * kv_size}
    elif has_keys:
        sizes["k_proj"] = kv_size
        sizes["v_proj"] = kv_size
    tensors: Shapes = {"input_layernorm.weight": (s.hidden,)}
    for name, out in sizes.items():
        tensors |= _linear(f"self_attn.{name}", out, s.hidden, bias=qkv_bias)
    if row.head_norms:
        tensors |= _head_norms(config, row, block)
    o_bias = row.other_biases and biased
    tensors |= _linear("self_attn.o_proj", s.hidden, q_size, bias=o_bias)
    if row.sinks:
        tensors["self_attn.sinks"] = (s.heads,)
    tensors["post_attention_layernorm.weight"] = (s.hidden,)
    if row.post_norms:
        tensors["pre_feedforward_layernorm.weight"] = (s.hidden,)
        tensors["post_feedforward_layernorm.weight"] = (s.hidden,)
    return tensors


def _head_norms(config: Config, row: Family, block: int) -> Shapes:
    """The norms of queries and keys: over each head, or over all heads as one vector."""
    s = shape_of(config)
    head_dim = head_size(config, block)
    q_heads = 1
    k_heads = 1
    if row.head_norms == "all":
        q_heads = s.heads
        k_heads = s.kv_heads
    norms: Shapes = {"self_attn.q_norm.weight": (q_heads * head_dim,)}
    if key_owners(config)[block] is None:
        norms["self_attn.k_norm.weight"] = (k_heads * head_dim,)
    return norms


def weight_count(tensors: Shapes) -> int:
    """The number of weights in tensors of these shapes."""
    return sum(map(math.prod, tensors.values()))


def largest_block(config: Config) -> int:
    """The number of a block that has as many parameters as any other."""
    unlike = unlike_blocks(config)
    if family(config).stateful:
        return max(unlike, key=lambda i: weight_count(layer_tensors(config, block=i)))
    return max(unlike, key=lambda i: (ffn_size(config, i), head_size(config, i)))


def unlike_blocks(config: Config) -> list[int]:
    """The first block of every size.

    Blocks of a kind have one size, those with keys of their own and those that use another's.
    """
    row = family(config)
    if row.blocks:
        sizes = [ffn_size(config, i) for i in range(config["num_hidden_layers"])]
        return [sizes.index(size) for size in sorted(set(sizes))]
    if not row.stateful and not row.sharing:
        return [0]
    first: dict[tuple[str, bool], int] = {}
    for i, owner in enumerate(key_owners(config)):
        kind = config["layer_types"][i]
        first.setdefault((kind, owner is None), i)
    return list(first.values())


def side_tensors(config: Config) -> Shapes:
    """Names and shapes of the tensors that make the per-layer inputs.

    For every token and block a table has some channels, and as many are projected from the
    embedding.
    """
    s = shape_of(config)
    row = family(config)
    if not row.per_layer:
        return {}
    width = config[row.per_layer]
    return {
        f"{PER_LAYER}weight": (config["vocab_size_per_layer_input"], s.layers * width),
        "model.per_layer_model_projection.weight": (s.layers * width, s.hidden),
        "model.per_layer_projection_norm.weight": (width,),
    }


def gates(config: Config) -> set[str]:
    """Module paths of the small matrices that always have 8 bits; none in most families.

    Per-layer inputs come in through them; AltUp's ends and second ways have such ones, too.
    """
    row = family(config)
    if not row.per_layer:
        return set()
    paths = {"model.per_layer_model_projection"}
    inside = ["per_layer_input_gate", "per_layer_projection"]
    if row.laurel:
        inside += ["laurel.linear_left", "laurel.linear_right"]
    for i in range(config["num_hidden_layers"]):
        paths.update(f"model.layers.{i}.{name}" for name in inside)
    paths.update(name.removesuffix(".weight") for name in end_tensors(config))
    return paths


def end_tensors(config: Config) -> Shapes:
    """Names and shapes of the matrices between the embedding and all versions of the hidden states.

    There is one at the first block and one behind the last for all versions but the first.
    """
    hidden = shape_of(config).hidden
    tensors: Shapes = {}
    for kind in ("altup_projections", "altup_unembed_projections"):
        for number in range(versions(config) - 1):
            tensors[f"model.{kind}.{number}.weight"] = (hidden, hidden)
    return tensors


def tensors_of(config: Config, stacked: bool = False) -> Shapes:
    """{Hugging Face name: shape} of an unquantized model of this config, in forward order.

    stacked: as in `layer_tensors`.
    """
    s = shape_of(config)
    tensors: Shapes = {"model.embed_tokens.weight": (s.vocab, s.hidden)}
    tensors |= side_tensors(config)
    tensors |= end_tensors(config)
    for i in range(s.layers):
        block = layer_tensors(config, stacked, i)
        for name, shape in block.items():
            tensors[f"model.layers.{i}.{name}"] = shape
    tensors["model.norm.weight"] = (s.hidden,)
    if not s.tied:
        tensors["lm_head.weight"] = (s.vocab, s.hidden)
    return tensors


def unused_tensors(config: Config) -> set[str]:
    """Names of keys and values that a published model has, but does not use.

    Its blocks that use those of another block still have weights for their own.
    """
    names = set[str]()
    for name in unused_shapes(config):
        stem = name.removesuffix("weight")
        for kind in ("weight", "scales", "biases"):
            names.add(stem + kind)
    return names


def unused_shapes(config: Config) -> Shapes:
    """Names and shapes of these weights."""
    shape = shape_of(config)
    unused: Shapes = {}
    for i, owner in enumerate(key_owners(config)):
        if owner is None:
            continue
        head_dim = head_size(config, i)
        rows = shape.kv_heads * head_dim
        stem = f"model.layers.{i}.self_attn"
        unused[f"{stem}.k_proj.weight"] = (rows, shape.hidden)
        unused[f"{stem}.v_proj.weight"] = (rows, shape.hidden)
        unused[f"{stem}.k_norm.weight"] = (head_dim,)
    return unused


def outer_name(name: str) -> str:
    """The name that one of our tensors or modules has in a model that contains this one."""
    return re.sub(r"^model\.", "model.language_model.", name)
