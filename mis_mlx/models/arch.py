"""Which axes of a model can shrink, and what tensors a config promises: pure functions of the config."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mis_mlx.models import experts
from mis_mlx.models.config import Shape, inside_names, keys_of, normalised, shape_of
from mis_mlx.models.families import ALL, family
from mis_mlx.types import Checkpoint, MisError, TensorAt

# A ratio per axis, kept / before. redyk and gazda: what was measured best at GÓRAL's size on SmolLM2-135M, with half of
# its tokens (benchmarks/vocabulary.py) and with all of them (28 of 30 layers, half of the FFN, benchmarks/recovery.py).
# The others: table 1 of the paper, on its 96-layer 8192/28672 teacher.
SCENARIOS: dict[str, dict[str, float]] = {
    "stado": {"experts": 3 / 4},
    "redyk": {"layers": 29 / 30, "ffn": 2 / 3, "vocab": 1 / 2}, "gazda": {"layers": 28 / 30, "ffn": 1 / 2},
    "goral": {"layers": 64 / 96, "ffn": 22528 / 28672}, "baca": {"hidden": 6144 / 8192},
    "halny": {"ffn": 16384 / 28672}, "juhas": {"layers": 64 / 96}, "zbojnik": {"layers": 48 / 96, "ffn": 12288 / 28672},
}  # fmt: skip
# The paper's teacher; it leaves kv heads and vocabulary open: those of today's 70B models.
PUBLISHED: dict[str, dict[str, Any]] = {  # configs without weights, for plans
    name: json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))
    for name in ("mis-137b", "qwen3-30b-a3b")
}
FFN_MULTIPLE = 256  # Metal's fast 4-bit kernels and GGUF K-quants need it
READERS = {"ffn": ("mlp", ("down_proj",)), "heads": ("self_attn", ("o_proj",)),
           "norm1": ("self_attn", ("q_proj", "k_proj", "v_proj", "qkv_proj")),
           "norm2": ("mlp", ("gate_proj", "up_proj", "gate_up_proj"))}  # axis -> part, its readers  # fmt: skip


def readers(block: Mapping[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """{axis: (part of the block, its matrices that read the axis)}: the input of one is that of all. Of a mixture of
    experts those of attention."""
    found = {axis: (part, [n for n in names if n in block.get(part, ())]) for axis, (part, names) in READERS.items()}
    return {axis: (part, names) for axis, (part, names) in found.items() if names}


def layer_tensors(config: Mapping[str, Any], stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """Names (without `model.layers.N.`) and shapes (out, in) of one block's tensors, in forward order. stacked: all
    experts' matrices in one (E, out, in), as mlx-lm has them."""
    s, of = shape_of(config), family(config)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    tensors: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (s.hidden,)}
    for name, out in (("qkv_proj", q + 2 * kv),) if of.joined else (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        tensors[f"self_attn.{name}.weight"] = (out, s.hidden)
        if config.get("attention_bias") if of.qkv_bias is None else of.qkv_bias:
            tensors[f"self_attn.{name}.bias"] = (out,)
    if of.head_norms:
        normed = (q, kv) if of.head_norms == "all" else (s.head_dim, s.head_dim)
        tensors |= {f"self_attn.{name}_norm.weight": (size,) for name, size in zip("qk", normed, strict=True)}
    tensors["self_attn.o_proj.weight"] = (s.hidden, q)
    if of.other_biases and config.get("attention_bias"):
        tensors["self_attn.o_proj.bias"] = (s.hidden,)
    if of.sinks:
        tensors["self_attn.sinks"] = (s.heads,)
    tensors["post_attention_layernorm.weight"] = (s.hidden,)
    if of.sandwich:
        tensors |= {f"{when}_feedforward_layernorm.weight": (s.hidden,) for when in ("pre", "post")}
    if of.experts:
        return tensors | experts.tensors_of(config, stacked)
    wide = (("gate_up_proj", 2 * s.ffn),) if of.joined else (("gate_proj", s.ffn), ("up_proj", s.ffn))
    for name, out, into in (*((name, out, s.hidden) for name, out in wide), ("down_proj", s.hidden, s.ffn)):
        tensors[f"mlp.{name}.weight"] = (out, into)
        if of.other_biases and config.get("mlp_bias"):
            tensors[f"mlp.{name}.bias"] = (out,)
    return tensors


def places(config: Mapping[str, Any]) -> tuple[int, ...]:
    """A number for each block: those that differ are no places for each other's, because mlx-lm counts them."""
    period = normalised(config)[key] if (key := family(config).period) else 1
    return tuple(int((i + 1) % period == 0) for i in range(config["num_hidden_layers"]))


def block_of(name: str) -> int | None:
    """The number of the block that the tensor `model.layers.N. ...` belongs to; None outside of blocks."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def tensors_of(config: Mapping[str, Any], stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of an unquantized model of this config, in forward order; stacked: `layer_tensors`."""
    s, block = shape_of(config), layer_tensors(config, stacked)
    blocks = {f"model.layers.{i}.{name}": shape for i in range(s.layers) for name, shape in block.items()}
    head = {} if s.tied else {"lm_head.weight": (s.vocab, s.hidden)}
    return {"model.embed_tokens.weight": (s.vocab, s.hidden), **blocks, "model.norm.weight": (s.hidden,), **head}


def params(config: Mapping[str, Any]) -> int:
    """Number of parameters, computed from the shape; a tied embedding counts once."""
    s = shape_of(config)
    block = sum(math.prod(shape) for shape in layer_tensors(config, True).values())
    return s.layers * block + s.vocab * s.hidden * (1 if s.tied else 2) + s.hidden


def met(config: Mapping[str, Any]) -> int:
    """FFN neurons that a token goes through in a block: of several experts those of as many as it meets."""
    s, of = shape_of(config), family(config)
    shared = config[of.shared_expert] if of.shared_expert else 0
    return int(s.ffn * (config["num_experts_per_tok"] if s.experts else 1) + shared)


def shares(config: Mapping[str, Any]) -> tuple[float, float]:
    """Of a block's parameters (those in memory at a time while it streams past, those that a token meets): all, but of
    a mixture one expert, and as many as it meets."""
    s = shape_of(config)
    whole = sum(map(math.prod, layer_tensors(config, True).values()))
    expert = 3 * s.ffn * s.hidden
    here, used = (s.experts - n if s.experts else 0 for n in (1, config.get("num_experts_per_tok", 1)))
    return 1 - here * expert / whole, 1 - used * expert / whole


def inside(tensors: Mapping[str, TensorAt], config: Mapping[str, Any]) -> dict[str, TensorAt]:
    """Tensors by the names of the config's family. Matrices that lie joined are rows of one, in their order."""
    found, due = dict[str, TensorAt](), tensors_of(config)
    for name, at in tensors.items():
        if name.endswith("_proj_blocks"):
            raise MisError(f"{at.file}: experts lie as openai packs them: run mlx_lm.convert on the model first")
        if stacked := experts.STACKED.fullmatch(name):
            found |= dict(experts.apart(stacked, name, at, config))
            continue
        if len(names := [name] if family(config).joined else inside_names(name)) == 1:
            found[names[0]] = at if names == [name] else replace(at, stored=(name, at))
            continue
        row, first = at.nbytes // at.shape[0], 0
        for own in names:
            rows = due.get(re.sub(r"\w+$", "weight", own), (0,))[0]
            part = replace(at, shape=(rows, *at.shape[1:]), offset=at.offset + first * row, nbytes=rows * row)
            found[own], first = replace(part, stored=(name, at)), first + rows
        if first != at.shape[0]:
            raise MisError(f"{at.file}: {name} has {at.shape[0]} rows, config.json makes it {first}: download it again")
    return found


def check_tensors(checkpoint: Checkpoint) -> None:
    """Predict every tensor from the config and compare with the headers: names and shapes, quantized or not."""
    stored, expected = checkpoint.tensors, tensors_of(checkpoint.config)
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
            raise MisError(f"{at.file}: {why}: download the model again, or convert it with mlx_lm.convert")
    for name, at in stored.items():
        packing = name.endswith((".scales", ".biases")) and name.rsplit(".", 1)[0] + ".weight" in expected
        if name in expected or name == "lm_head.weight" or "rotary_emb" in name or packing:
            continue
        model = f"a {family(checkpoint.config).name} of {shape_of(checkpoint.config)}"
        raise MisError(f"{at.file}: holds {name}, which {model} has no place for: files and config differ")


def is_quantized(tensors: Mapping[str, TensorAt]) -> bool:
    """Whether any weight is packed (has scales beside it)."""
    return any(name.endswith(".scales") for name in tensors)


def count(flag: str, asked: str | None, of: int, what: str) -> int | None:
    """What `flag` leaves of so many: a number, or a share of them such as 0.5x, rounded down. None: not given."""
    if asked is None:
        return None
    match = re.fullmatch(r"\s*(\d+|(?:\d*\.)?\d+(?=x))(x?)\s*", asked)
    wanted = float(match[1]) * (of if match[2] else 1) if match else 0.0
    if not 1 <= wanted <= of:
        raise MisError(f"{flag} {asked} is no number of {what} from 1 to {of:,}: give one, or a share such as 0.5x")
    return int(wanted)


def kv_heads(before: Shape, heads: int) -> int:
    """Key-value heads beside so many query heads: where the number allows it whole groups go, after which a model ends
    nearer to its teacher than with a part of each gone (SmolLM2, 9 to 6: 3.354 nats for 3.424)."""
    return before.kv_heads if heads % (each := before.heads // before.kv_heads) else heads // each


def target_shape(config: Mapping[str, Any], ratios: Mapping[str, float], **exact: int | None) -> Shape:
    """The student's shape: each axis by scenario ratio, or exactly as given.

    By ratio the FFN is a multiple of 256 (or kept when smaller), hidden one of 16 and of the heads. MisError where no
    loader would accept the model."""
    s, of = shape_of(config), family(config)
    sizes: dict[str, Any] = {axis: getattr(s, axis) for axis in ALL}
    step = {"layers": 1, "ffn": FFN_MULTIPLE, "experts": 1, "kv_heads": 1, "heads": s.kv_heads,
            "hidden": math.lcm(16, s.heads)}  # fmt: skip
    for axis, before in sizes.items():
        wanted = exact.get(axis)
        if axis not in of.axes and (wanted not in (None, before) or (wanted is None and ratios.get(axis, 1) != 1)):
            raise MisError(f"{axis} of a {of.name} cannot be cut: {of.why}; what can be is {', '.join(of.axes)}")
        if wanted is not None:
            if not 1 <= wanted <= before:
                raise MisError(f"--{axis} {wanted} is outside 1 to {before}, which the teacher has: choose within")
            sizes[axis] = wanted
        elif axis in ratios:
            most, unit = before // step[axis], step[axis]  # the nearest multiple; of what is smaller than one, all
            sizes[axis] = min(max(round(before * ratios[axis] / unit), 1), most) * unit or before
    if exact.get("heads") and exact.get("kv_heads") is None:
        sizes["kv_heads"] = kv_heads(s, sizes["heads"])
    kv, each = sizes["kv_heads"], s.heads // s.kv_heads
    if exact.get("heads") is None and "heads" not in ratios:
        sizes["heads"] = each * kv
    if sizes["heads"] % kv or sizes["heads"] > each * kv:
        why = f"{kv} key-value heads, of which the teacher's have {each} query heads each"
        remedy = f"choose a multiple of {kv}, {each * kv} at most"
        raise MisError(f"--heads {sizes['heads']} does not divide into {why}: {remedy}")
    _check_sizes(config, sizes)
    return replace(s, **sizes)


def _check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """MisError where a model of these sizes would be one that transformers or mlx-lm does not build."""
    s, of = shape_of(config), family(config)
    if of.experts and sizes["experts"] < (met := config["num_experts_per_tok"]):
        raise MisError(f"--experts leaves {sizes['experts']}, a token meets {met} of them: keep {met} or more")
    if of.period and (n := sizes["layers"]) < (period := normalised(config)[of.period]):
        raise MisError(f"{n} layers of a {of.name} are fewer than {period}, which mlx-lm wants: keep more")
    if of.heads_fill_hidden and sizes["hidden"] % sizes["heads"]:
        why = f"is not a multiple of {sizes['heads']} heads, which transformers demands of a {of.name}"
        raise MisError(f"hidden {sizes['hidden']} {why}: choose --hidden as a multiple of {sizes['heads']}")
    if of.head_dim_follows and sizes["hidden"] // sizes["heads"] != s.head_dim:
        why = f"hidden ({s.hidden} to {sizes['hidden']}) or heads alone, its head size is their quotient"
        raise MisError(f"a {of.name} cannot change {why}: cut --layers and --ffn instead")


def student_config(
    config: Mapping[str, Any], shape: Shape, layers: Sequence[int] | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The teacher's config.json edited to `shape`, not quantized; what runtimes would guess differently spelled out.
    layers: of the teacher, by default the first ones."""
    c = normalised(config)
    for key in ("quantization", "quantization_config", "dtype"):  # transformers 5 would believe dtype, not torch_dtype
        c.pop(key, None)
    for key in ("layer_types", family(c).kinds):
        if c.get(key):
            c[key] = [c[key][i] for i in (layers or range(shape.layers))]
    c |= {key: getattr(shape, field) for field, key in keys_of(c).items()} | {"torch_dtype": dtype}
    if "full_attention" not in (rope := c.get("rope_parameters") or {}):
        rope = {"rope_type": "default", **rope, **(c.get("rope_scaling") or {}), "rope_theta": c["rope_theta"]}
        c["rope_parameters"] = rope
    return c
