"""Which axes of a model can shrink, and what tensors a config promises: pure functions of the
config.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mis_mlx.models import experts
from mis_mlx.models.config import (
    Shape,
    ffn_size,
    head_size,
    inside_names,
    key_owners,
    keys_of,
    normalised,
    shape_of,
)
from mis_mlx.models.families import ALL, family
from mis_mlx.types import Checkpoint, MisError, TensorAt

# A ratio per axis, kept / before. redyk and gazda: what was measured best at GÓRAL's size on
# SmolLM2-135M, with half of its tokens (benchmarks/vocabulary.py) and with all of them (28 of 30
# layers, half of the FFN, benchmarks/recovery.py). The others: table 1 of the paper, on its
# 96-layer 8192/28672 teacher.
SCENARIOS: dict[str, dict[str, float]] = {
    "stado": {"experts": 3 / 4},
    "redyk": {"layers": 29 / 30, "ffn": 2 / 3, "vocab": 1 / 2},
    "gazda": {"layers": 28 / 30, "ffn": 1 / 2},
    "goral": {"layers": 64 / 96, "ffn": 22528 / 28672},
    "baca": {"hidden": 6144 / 8192},
    "halny": {"ffn": 16384 / 28672},
    "juhas": {"layers": 64 / 96},
    "zbojnik": {"layers": 48 / 96, "ffn": 12288 / 28672},
}
# The paper's teacher; it leaves kv heads and vocabulary open: those of today's 70B models.
PUBLISHED: dict[str, dict[str, Any]] = {  # configs without weights, for plans
    name: json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))
    for name in ("mis-137b", "qwen3-30b-a3b", "gemma-4-e2b", "gemma-4-e4b")
}
# what the names of the table of per-layer inputs begin with
PER_LAYER = "model.embed_tokens_per_layer."
FFN_MULTIPLE = 256  # Metal's fast 4-bit kernels and GGUF K-quants need it
READERS = {
    "ffn": ("mlp", ("down_proj",)),
    "heads": ("self_attn", ("o_proj",)),
    "norm1": ("self_attn", ("q_proj", "k_proj", "v_proj", "qkv_proj")),
    # axis -> part, its readers  # fmt: skip
    "norm2": ("mlp", ("gate_proj", "up_proj", "gate_up_proj")),
}


def readers(block: Mapping[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """{axis: (part of the block, its matrices that read the axis)}: the input of one is that of
    all. Of a mixture of experts those of attention.
    """
    found = {
        axis: (part, [n for n in names if n in block.get(part, ())])
        for axis, (part, names) in READERS.items()
    }
    return {axis: (part, names) for axis, (part, names) in found.items() if names}


def layer_tensors(
    config: Mapping[str, Any], stacked: bool = False, block: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Names (without `model.layers.N.`) and shapes (out, in) of one block's tensors, in forward
    order. stacked: all experts' matrices in one (E, out, in), as mlx-lm has them. block: which one,
    where they differ; default: the largest.
    """
    s = shape_of(config)
    of = family(config)
    block = largest_block(config) if block is None else block
    tensors = _attention_tensors(config, block)
    if of.experts:
        return tensors | experts.tensors_of(config, stacked)
    ffn = ffn_size(config, block)
    wide = (("gate_up_proj", 2 * ffn),) if of.joined else (("gate_proj", ffn), ("up_proj", ffn))
    for name, out, into in (
        *((name, out, s.hidden) for name, out in wide),
        ("down_proj", s.hidden, ffn),
    ):
        tensors[f"mlp.{name}.weight"] = (out, into)
        if of.other_biases and config.get("mlp_bias"):
            tensors[f"mlp.{name}.bias"] = (out,)
    if of.per_layer:
        tensors["per_layer_input_gate.weight"] = (config[of.per_layer], s.hidden)
        tensors["per_layer_projection.weight"] = (s.hidden, config[of.per_layer])
        tensors["post_per_layer_input_norm.weight"] = (s.hidden,)
    if of.block_scale:
        tensors["layer_scalar"] = (1,)
    return tensors


def _attention_tensors(config: Mapping[str, Any], block: int) -> dict[str, tuple[int, ...]]:
    """Those of attention and of the norms around it and around the MLP."""
    s = shape_of(config)
    of = family(config)
    head_dim = head_size(config, block)
    shares_keys = key_owners(config)[block] is not None
    q = s.heads * head_dim
    kv = s.kv_heads * head_dim
    tensors: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (s.hidden,)}
    apart = (("q_proj", q),) if shares_keys else (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
    for name, out in (("qkv_proj", q + 2 * kv),) if of.joined else apart:
        tensors[f"self_attn.{name}.weight"] = (out, s.hidden)
        if config.get("attention_bias") if of.qkv_bias is None else of.qkv_bias:
            tensors[f"self_attn.{name}.bias"] = (out,)
    normed = {"q": q, "k": kv} if of.head_norms == "all" else {"q": head_dim, "k": head_dim}
    for name, size in normed.items() if of.head_norms else ():
        if name == "q" or not shares_keys:
            tensors[f"self_attn.{name}_norm.weight"] = (size,)
    tensors["self_attn.o_proj.weight"] = (s.hidden, q)
    if of.other_biases and config.get("attention_bias"):
        tensors["self_attn.o_proj.bias"] = (s.hidden,)
    if of.sinks:
        tensors["self_attn.sinks"] = (s.heads,)
    tensors["post_attention_layernorm.weight"] = (s.hidden,)
    if of.sandwich:
        tensors |= {f"{when}_feedforward_layernorm.weight": (s.hidden,) for when in ("pre", "post")}
    return tensors


def largest_block(config: Mapping[str, Any]) -> int:
    """The number of a block that has as many parameters as any."""
    layers = config["num_hidden_layers"]
    if not family(config).sharing:
        return 0
    return max(range(layers), key=lambda i: (ffn_size(config, i), head_size(config, i)))


def widest(config: Mapping[str, Any]) -> Shape:
    """The shape, with FFN and heads as large as they are in any block."""
    s = shape_of(config)
    if not family(config).sharing:
        return s
    sizes = [head_size(config, i) for i in range(s.layers)]
    return replace(s, ffn=ffn_size(config, largest_block(config)), head_dim=max(sizes))


def side_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what makes the inputs that each block has for itself: for every token and
    block some channels of a table, and as many that are projected from the embedding.
    """
    s = shape_of(config)
    of = family(config)
    if not of.per_layer:
        return {}
    width = config[of.per_layer]
    return {
        f"{PER_LAYER}weight": (s.vocab, s.layers * width),
        "model.per_layer_model_projection.weight": (s.layers * width, s.hidden),
        "model.per_layer_projection_norm.weight": (width,),
    }


def places(config: Mapping[str, Any]) -> tuple[int, ...]:
    """A number for each block: those that differ are no places for each other's, because mlx-lm
    counts them.
    """
    period = normalised(config)[key] if (key := family(config).period) else 1
    return tuple(int((i + 1) % period == 0) for i in range(config["num_hidden_layers"]))


def fixed_blocks(config: Mapping[str, Any]) -> set[int]:
    """Blocks that no cut in depth may take: those whose keys and values later ones use, and the
    last one there, which transformers makes see all tokens whatever its kind is.
    """
    owners = {owner for owner in key_owners(config) if owner is not None}
    return owners | ({config["num_hidden_layers"] - 1} if owners else set())


def block_of(name: str) -> int | None:
    """The number of the block that the tensor `model.layers.N. ...` belongs to; None outside of
    blocks.
    """
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def tensors_of(config: Mapping[str, Any], stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of an unquantized model of this config, in forward order; stacked:
    `layer_tensors`.
    """
    s = shape_of(config)
    blocks = dict[str, tuple[int, ...]]()
    for i in range(s.layers):
        blocks |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in layer_tensors(config, stacked, i).items()
        }
    table = {"model.embed_tokens.weight": (s.vocab, s.hidden), **side_tensors(config)}
    head = {} if s.tied else {"lm_head.weight": (s.vocab, s.hidden)}
    return {**table, **blocks, "model.norm.weight": (s.hidden,), **head}


def params(config: Mapping[str, Any]) -> int:
    """Number of parameters, computed from the shape; a tied embedding counts once."""
    s = shape_of(config)
    sides = sum(math.prod(shape) for shape in side_tensors(config).values())
    return blocks_params(config) + sides + s.vocab * s.hidden * (1 if s.tied else 2) + s.hidden


def channels(config: Mapping[str, Any]) -> int:
    """Channels that all blocks together get of a token beside its hidden states."""
    key = family(config).per_layer
    return int(config["num_hidden_layers"] * config[key]) if key else 0


def row_params(config: Mapping[str, Any]) -> int:
    """Number of parameters that each token has for itself: a row of the embedding, the head and
    other tables.
    """
    s = shape_of(config)
    return int(s.hidden * (1 if s.tied else 2) + channels(config))


def blocks_params(config: Mapping[str, Any]) -> int:
    """Number of parameters of all blocks."""
    layers = config["num_hidden_layers"]
    if not family(config).sharing:
        return int(layers * sum(map(math.prod, layer_tensors(config, True).values())))
    return sum(
        math.prod(shape) for i in range(layers) for shape in layer_tensors(config, True, i).values()
    )


def met(config: Mapping[str, Any]) -> int:
    """FFN neurons that a token goes through in a block, the widest one: of several experts those of
    as many as it meets.
    """
    s = shape_of(config)
    of = family(config)
    shared = config[of.shared_expert] if of.shared_expert else 0
    return int(widest(config).ffn * (config["num_experts_per_tok"] if s.experts else 1) + shared)


def shares(config: Mapping[str, Any]) -> tuple[float, float]:
    """Of a block's parameters (those in memory at a time while it streams past, those that a token
    meets): all, but of a mixture one expert, and as many as it meets.
    """
    s = shape_of(config)
    whole = sum(map(math.prod, layer_tensors(config, True).values()))
    expert = 3 * s.ffn * s.hidden
    here, used = (
        s.experts - n if s.experts else 0 for n in (1, config.get("num_experts_per_tok", 1))
    )
    return 1 - here * expert / whole, 1 - used * expert / whole


def inside(tensors: Mapping[str, TensorAt], config: Mapping[str, Any]) -> dict[str, TensorAt]:
    """Tensors by the names of the config's family. Matrices that lie joined are rows of one, in
    their order.
    """
    found = dict[str, TensorAt]()
    due = tensors_of(config)
    unused = unused_tensors(config)
    for name, at in tensors.items():
        if inside_names(name)[0] in unused:
            continue
        if name.endswith("_proj_blocks"):
            raise MisError(
                f"{at.file}: experts lie as openai packs them: run mlx_lm.convert on the model "
                f"first"
            )
        if stacked := experts.STACKED.fullmatch(name):
            found |= dict(experts.apart(stacked, name, at, config))
            continue
        if len(names := [name] if family(config).joined else inside_names(name)) == 1:
            found[names[0]] = at if names == [name] else replace(at, stored=(name, at))
            continue
        row = at.nbytes // at.shape[0]
        first = 0
        for own in names:
            rows = due.get(re.sub(r"\w+$", "weight", own), (0,))[0]
            part = replace(
                at, shape=(rows, *at.shape[1:]), offset=at.offset + first * row, nbytes=rows * row
            )
            found[own], first = replace(part, stored=(name, at)), first + rows
        if first != at.shape[0]:
            raise MisError(
                f"{at.file}: {name} has {at.shape[0]} rows, config.json makes it {first}: download "
                f"it again"
            )
    return found


def unused_tensors(config: Mapping[str, Any]) -> set[str]:
    """Names of keys and values that a published model still has in blocks which use those of
    another block.
    """
    parts = [
        f"{name}.{kind}"
        for name in ("k_proj", "v_proj", "k_norm")
        for kind in ("weight", "scales", "biases")
    ]
    shared = [i for i, owner in enumerate(key_owners(config)) if owner is not None]
    return {f"model.layers.{i}.self_attn.{part}" for i in shared for part in parts}


def check_tensors(checkpoint: Checkpoint) -> None:
    """Predict every tensor from the config and compare with the headers: names and shapes,
    quantized or not.
    """
    stored = checkpoint.tensors
    expected = tensors_of(checkpoint.config)
    for name, shape in expected.items():
        if (at := stored.get(name)) is None:
            lost = f"config.json promises {name} {list(shape)}, no file holds it"
            raise MisError(f"{checkpoint.path}: {lost}: download the model again")
        packed = at.dtype == "U32" and name.removesuffix(".weight") + ".scales" in stored
        if at.shape != shape and not (packed and len(shape) == 2 and at.shape[0] == shape[0]):
            why = f"{name} is {list(at.shape)}, config.json makes it {list(shape)}"
            raise MisError(f"{at.file}: {why}: files and config belong to different models")
        if not packed and at.dtype not in ("F32", "F16", "BF16"):
            why = f"{name} is stored as {at.dtype}, weights are F32, F16 or BF16"
            raise MisError(
                f"{at.file}: {why}: download the model again, or convert it with mlx_lm.convert"
            )
    for name, at in stored.items():
        packing = (
            name.endswith((".scales", ".biases")) and name.rsplit(".", 1)[0] + ".weight" in expected
        )
        if name in expected or name == "lm_head.weight" or "rotary_emb" in name or packing:
            continue
        model = f"a {family(checkpoint.config).name} of {shape_of(checkpoint.config)}"
        raise MisError(
            f"{at.file}: holds {name}, which {model} has no place for: files and config differ"
        )


def is_quantized(tensors: Mapping[str, TensorAt]) -> bool:
    """Whether any weight is packed (has scales beside it)."""
    return any(name.endswith(".scales") for name in tensors)


def count(flag: str, asked: str | None, of: int, what: str) -> int | None:
    """What `flag` leaves of so many: a number, or a share of them such as 0.5x, rounded down. None:
    not given.
    """
    if asked is None:
        return None
    match = re.fullmatch(r"\s*(\d+|(?:\d*\.)?\d+(?=x))(x?)\s*", asked)
    wanted = float(match[1]) * (of if match[2] else 1) if match else 0.0
    if not 1 <= wanted <= of:
        raise MisError(
            f"{flag} {asked} is no number of {what} from 1 to {of:,}: give one, or a share such as "
            f"0.5x"
        )
    return int(wanted)


def kv_heads(before: Shape, heads: int) -> int:
    """Key-value heads beside so many query heads: where the number allows it whole groups go, after
    which a model ends nearer to its teacher than with a part of each gone (SmolLM2, 9 to 6: 3.354
    nats for 3.424).
    """
    return before.kv_heads if heads % (each := before.heads // before.kv_heads) else heads // each


def target_shape(
    config: Mapping[str, Any], ratios: Mapping[str, float], **exact: int | None
) -> Shape:
    """The student's shape: each axis by scenario ratio, or exactly as given.

    By ratio the FFN is a multiple of 256 (or kept when smaller), hidden one of 16 and of the heads.
    MisError where no loader would accept the model.
    """
    s = shape_of(config)
    of = family(config)
    sizes: dict[str, Any] = {axis: getattr(s, axis) for axis in ALL}
    step = {
        "layers": 1,
        "ffn": FFN_MULTIPLE,
        "experts": 1,
        "kv_heads": 1,
        "heads": s.kv_heads,
        "hidden": math.lcm(16, s.heads),
    }
    for axis, before in sizes.items():
        wanted = exact.get(axis)
        if axis not in of.axes and (
            wanted not in (None, before) or (wanted is None and ratios.get(axis, 1) != 1)
        ):
            raise MisError(
                f"{axis} of a {of.name} cannot be cut: {of.why}; what can be is "
                f"{', '.join(of.axes)}"
            )
        if wanted is not None:
            if not 1 <= wanted <= before:
                raise MisError(
                    f"--{axis} {wanted} is outside 1 to {before}, which the teacher has: choose "
                    f"within"
                )
            sizes[axis] = wanted
        elif axis in ratios:
            # the nearest multiple; of what is smaller than one, all
            most = before // step[axis]
            unit = step[axis]
            sizes[axis] = min(max(round(before * ratios[axis] / unit), 1), most) * unit or before
    if exact.get("heads") and exact.get("kv_heads") is None:
        sizes["kv_heads"] = kv_heads(s, sizes["heads"])
    kv = sizes["kv_heads"]
    each = s.heads // s.kv_heads
    if exact.get("heads") is None and "heads" not in ratios:
        sizes["heads"] = each * kv
    if sizes["heads"] % kv or sizes["heads"] > each * kv:
        why = f"{kv} key-value heads, of which the teacher's have {each} query heads each"
        remedy = f"choose a multiple of {kv}, {each * kv} at most"
        raise MisError(f"--heads {sizes['heads']} does not divide into {why}: {remedy}")
    _check_sizes(config, sizes)
    return replace(s, **sizes)


def _check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """MisError where a model of these sizes would be one that transformers or mlx-lm does not
    build.
    """
    s = shape_of(config)
    of = family(config)
    if of.experts and sizes["experts"] < (met := config["num_experts_per_tok"]):
        raise MisError(
            f"--experts leaves {sizes['experts']}, a token meets {met} of them: keep {met} or more"
        )
    if sizes["layers"] < len(fixed := fixed_blocks(config)):
        why = (
            f"{len(fixed)} blocks stay, those that make keys and values for others and the last one"
        )
        raise MisError(
            f"{sizes['layers']} layers of a {of.name} are too few: {why}: keep {len(fixed)} or more"
        )
    if of.period and (n := sizes["layers"]) < (period := normalised(config)[of.period]):
        raise MisError(
            f"{n} layers of a {of.name} are fewer than {period}, which mlx-lm wants: keep more"
        )
    if of.heads_fill_hidden and sizes["hidden"] % sizes["heads"]:
        why = (
            f"is not a multiple of {sizes['heads']} heads, which transformers demands of a "
            f"{of.name}"
        )
        raise MisError(
            f"hidden {sizes['hidden']} {why}: choose --hidden as a multiple of {sizes['heads']}"
        )
    if of.head_dim_follows and sizes["hidden"] // sizes["heads"] != s.head_dim:
        why = (
            f"hidden ({s.hidden} to {sizes['hidden']}) or heads alone, its head size is their "
            f"quotient"
        )
        raise MisError(f"a {of.name} cannot change {why}: cut --layers and --ffn instead")


def student_config(
    config: Mapping[str, Any],
    shape: Shape,
    layers: Sequence[int] | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The teacher's config.json edited to `shape`, not quantized; what runtimes would guess
    differently spelled out. layers: of the teacher, by default the first ones.
    """
    c = normalised(config)
    # transformers 5 would believe dtype, not torch_dtype
    for key in ("quantization", "quantization_config", "dtype"):
        c.pop(key, None)
    of = family(c)
    kept = layers or range(shape.layers)
    if of.sharing:
        c[of.sharing] = sum(key_owners(config)[i] is not None for i in kept)
    if of.per_layer:
        c["vocab_size_per_layer_input"] = shape.vocab
    for key in ("layer_types", of.kinds):
        if c.get(key):
            c[key] = [c[key][i] for i in kept]
    c |= {key: getattr(shape, field) for field, key in keys_of(c).items()} | {"torch_dtype": dtype}
    if "full_attention" not in (rope := c.get("rope_parameters") or {}):
        rope = {
            "rope_type": "default",
            **rope,
            **(c.get("rope_scaling") or {}),
            "rope_theta": c["rope_theta"],
        }
        c["rope_parameters"] = rope
    return c
