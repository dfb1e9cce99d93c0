"""A model's tensors and facts as llama.cpp has them: names, types, order of rows, what its loader
asks for; their file.

What MLX packed is not rounded again where llama.cpp has the same format: affine groups of up to 4
bits are Q4_1 blocks and those of 5 bits Q5_1 (scale · q + bias, repeated in a group's blocks of
32), mxfp4 and nvfp4 MXFP4 and NVFP4.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
from gguf.gguf_writer import WriterState

from mis_mlx.maths import rounding
from mis_mlx.models import arch, experts, families, load, wheel_model
from mis_mlx.models.config import normalised, shape_of
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint, MisError

BLOCK = 32  # weights of a Q4_1 or Q5_1 block
SLAB_BYTES = 16 * 2**20  # float32 rows converted at once
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT  # bytes, at a multiple of which every tensor begins
# rewrapped: MLX's mode and bits, and ggml's type of the same numbers. freqs: what frequencies are
# divided by. yarn: keys of stretched positions; own: a family's own ones; with the `GGUFWriter`'s
# word for each. file_types: those that are not MOSTLY_ and their name.
WORDS = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))
REWRAPPED = WORDS["rewrapped"]
YARN = WORDS["yarn"]
OWN = WORDS["own"]


class Part(NamedTuple):
    """One tensor of the GGUF: its name there and here, shape (out, in), ggml's type. heads: of q
    and k, whose rows llama.cpp wants interleaved; 0 leaves the order. exact: MLX's packing
    re-wrapped.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    heads: int = 0
    exact: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding. ValueError when a row cannot be cut into the type's
        blocks.
        """
        return math.prod(
            gguf.quant_shape_to_byte_shape(self.shape, gguf.GGMLQuantizationType[self.kind])
        )


def out_type(checkpoint: Checkpoint) -> str:
    """The type that suits a model: one that holds what MLX packed exactly; q8_0 where none does;
    f16 if not packed.
    """
    if not arch.is_quantized(checkpoint.tensors):
        return "f16"
    packed = [
        own
        for name in arch.tensors_of(checkpoint.config)
        if (own := load.packing(checkpoint, name))
    ]
    exact = [own["mode"] for own in packed if f"{own['mode']} {own['bits']}" in REWRAPPED]
    most = Counter(exact).most_common(1)[0][0] if exact else "q8_0"
    return "q4_1" if most == "affine" else most


def parts(checkpoint: Checkpoint, wanted: str) -> list[Part]:
    """Every tensor of the GGUF in order. `wanted`: --out-type. Vectors are float32. Of a packed
    model q4_1, mxfp4 and nvfp4 keep exactly what some type of llama.cpp holds; other matrices get
    Q8_0. q4_k_m: the types that llama.cpp will choose. MisError where rows do not divide by a
    block, or nothing is packed in the mode that was asked for.
    """
    config, s, of = (
        checkpoint.config,
        shape_of(checkpoint.config),
        families.family(checkpoint.config),
    )
    names = wheel_model.gguf_names(config)
    heads = {"q_proj": s.heads, "k_proj": s.kv_heads} if of.interleaved else {}
    every = []
    for name, shape in arch.tensors_of(config, True).items():
        one = experts.one_by_one(name, config)[0]
        plain = len(shape) == 1 or name.endswith(".bias") or experts.is_router(name)
        kind, exact = ("F32", False) if plain else _kind(checkpoint, one, wanted, shape[-1])
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        if shape[-1] % block:
            why = f"which {kind}'s block of {block} does not divide"
            raise MisError(f"{name} has rows of {shape[-1]} weights, {why}: use --out-type f16")
        if (gguf_name := names[name]) is None:
            raise MisError(f"llama.cpp's {of.gguf} has no place for {name}: use --format hf")
        every.append(Part(gguf_name, name, shape, kind, heads.get(name.split(".")[-2], 0), exact))
    if wanted in ("mxfp4", "nvfp4") and not any(
        p.exact and p.kind == wanted.upper() for p in every
    ):
        raise MisError(
            f"--out-type {wanted} re-wraps what MLX packed so, here nothing is: take another "
            f"--out-type"
        )
    freqs = WORDS["freqs"].get(_rope(config)[0], ())
    return every + [Part(f"rope_{name}.weight", "", _freqs(config).shape, "F32") for name in freqs]


def _kind(checkpoint: Checkpoint, name: str, wanted: str, columns: int) -> tuple[str, bool]:
    """(ggml's type of a matrix, whether MLX's packing goes into it as it is)."""
    if wanted == "q4_k_m":
        return _k_mixture(checkpoint.config, name, columns), False
    if wanted in ("f32", "f16", "bf16", "q8_0"):
        return wanted.upper(), False
    own = load.packing(checkpoint, name)
    common = checkpoint.config.get("quantization") or {}
    bits, group, mode = (own.get(key, 0) for key in ("bits", "group_size", "mode"))
    if wanted in ("q4_1", "mxfp4", "nvfp4") and arch.is_quantized(checkpoint.tensors):
        whole = (
            group % BLOCK == 0
            if mode == "affine"
            else columns % (64 if mode == "nvfp4" else BLOCK) == 0
        )
        exact = REWRAPPED.get(f"{mode} {bits}") if whole else None
        return exact or "Q8_0", exact is not None
    wide = name in (load.EMBEDDING + "weight", "lm_head.weight") or (
        own and 4 < bits != common["bits"]
    )
    return "Q8_0" if wide else wanted.upper(), False


def _k_mixture(config: Mapping[str, Any], name: str, columns: int) -> str:
    """The type that llama.cpp chooses for a matrix of a Q4_K_M file (llama_tensor_get_type,
    llama-cpp-python 0.3.36). More bits for the head, for v_proj, qkv_proj and down_proj of the
    first and last eighth of the blocks and every third between; where a row is not of whole blocks
    of 256, types with blocks of 32, which take 1 to 2 bits more.
    """
    s = shape_of(config)
    i = arch.block_of(name)
    eighth = s.layers // 8
    more = i is not None and (i < eighth or i >= 7 * s.layers // 8 or (i - eighth) % 3 == 2)
    wide = (
        more and name.endswith(("v_proj.weight", "down_proj.weight"))
    ) or name == "lm_head.weight"
    wide = wide or (s.tied and name == load.EMBEDDING + "weight")
    if columns % 256:
        return "F16" if columns % BLOCK else "Q8_0" if wide else "Q5_0"
    return "Q6_K" if wide else "Q4_K"


def rows(checkpoint: Checkpoint, part: Part, tally: Counter[str]) -> Iterator[np.ndarray]:
    """The bytes of one tensor, uint8 (rows, bytes of a row), slab by slab. Memory: the tensor as
    stored, and a slab. tally: "inexact" counts scales and biases that float16 does not hold
    exactly. MisError at NaN or infinity.
    """
    if not part.source:
        yield _freqs(checkpoint.config).view(np.uint8)
        return
    convert = _rewrapped if part.exact else _converted
    shape = part.shape[-2:]
    step = max(1, SLAB_BYTES // (4 * math.prod(shape[1:])))
    order = wheel_model.row_order(shape[0], part.heads) if part.heads else np.arange(shape[0])
    # one, or several that are stacked
    for source in experts.one_by_one(part.source, checkpoint.config):
        one = part._replace(source=source, shape=shape)
        stem = source.removesuffix(".weight")
        stored = [
            n for n in (source, f"{stem}.scales", f"{stem}.biases") if n in checkpoint.tensors
        ]
        raw = safetensors.lazy(checkpoint.tensors, stored)
        for at in range(0, shape[0], step):
            index = mx.array(order[at : at + step]) if part.heads else slice(at, at + step)
            slab = {name: array[index] for name, array in raw.items()}
            yield np.ascontiguousarray(convert(checkpoint, one, slab, tally)).view(np.uint8)
    mx.clear_cache()


def _finite(part: Part, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(a).all() for a in arrays):
        raise MisError(
            f"{part.source} holds NaN or infinity: this model is broken, export the one it was "
            f"made from"
        )


def _converted(checkpoint: Checkpoint, part: Part, slab: load.Raw, _: Counter[str]) -> np.ndarray:
    values = np.array(load.dense(checkpoint, part.source, slab).astype(mx.float32))
    if "norm" in part.source:
        values = (values + families.family(checkpoint.config).gain_offset) * _query_gain(
            checkpoint.config, part.name
        )
    _finite(part, values)
    if (
        part.kind == "F16"
        and values.size
        and (most := np.abs(values).max()) > np.finfo(np.float16).max
    ):
        raise MisError(f"{part.source} has {most:.4g}, float16 ends at 65504: use bf16")
    return gguf.quantize(values, gguf.GGMLQuantizationType[part.kind])


def _rewrapped(
    checkpoint: Checkpoint, part: Part, slab: load.Raw, tally: Counter[str]
) -> np.ndarray:
    """MLX's packed rows as ggml's blocks: scale, bias, then the integers, half a block of them in
    low nibbles.
    """
    stem = part.source.removesuffix(".weight")
    bits, group, mode = (
        load.packing(checkpoint, part.source)[key] for key in ("bits", "group_size", "mode")
    )
    q = np.array(rounding.integers(slab[part.source], BLOCK, bits))  # whatever the group is
    if mode != "affine":  # nvfp4: scales of four groups of 16 stand together
        scales = np.array(slab[f"{stem}.scales"]).reshape(len(q), -1, 4 if mode == "nvfp4" else 1)
        nibbles = _halves(q, 16 if mode == "nvfp4" else BLOCK).reshape(*scales.shape[:2], -1)
        return np.concatenate([scales, nibbles], axis=-1).reshape(len(q), -1)
    both = [np.array(slab[f"{stem}.{which}"].astype(mx.float32)) for which in ("scales", "biases")]
    with np.errstate(over="ignore"):  # an overflow is infinity, and that is refused
        halves = [values.astype(np.float16) for values in both]
    _finite(part, *halves)
    tally["inexact"] += sum(int((h != v).sum()) for h, v in zip(halves, both, strict=True))
    head = np.stack([np.repeat(h, group // BLOCK, axis=1) for h in halves], axis=-1).view(np.uint8)
    fifth = np.packbits(q >> 4, axis=1, bitorder="little").reshape(*head.shape[:2], -1)[
        ..., : 4 * (bits == 5)
    ]
    return np.concatenate([head, fifth, _halves(q & 15, BLOCK)], axis=-1).reshape(len(q), -1)


def _halves(q: np.ndarray, block: int) -> np.ndarray:
    """4-bit integers (rows, in) as bytes (rows, in / block, block / 2): weight j low, j + block / 2
    high.
    """
    q = q.reshape(len(q), -1, block)
    return q[..., : block // 2] | (q[..., block // 2 :] << 4)


def _query_gain(config: Mapping[str, Any], name: str) -> float:
    """For query_pre_attn_scalar, in queries' norm: llama.cpp's gemma3 divides by head_dim, or
    hidden / heads.
    """
    if (
        not name.endswith("attn_q_norm.weight")
        or "query_pre_attn_scalar" not in families.family(config).numbers
    ):
        return 1.0
    s = shape_of(config)
    return math.sqrt(
        (s.hidden // s.heads if s.layers == 62 else s.head_dim) / config["query_pre_attn_scalar"]
    )


def _rope(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(kind of rotary positions, its settings). MisError for one that llama.cpp cannot be told
    of.
    """
    of = families.family(config)
    c = normalised(config)
    arch = of.gguf
    scaling = c.get("rope_scaling") or {}
    rope = scaling.get("rope_type") or scaling.get("type") or "default"
    usual = [int(i % 4 != 3) for i in range(c["num_hidden_layers"])]
    if of.kinds and (c[of.kinds] != usual or c.get("attention_bias") or c.get("mlp_bias")):
        why = (
            f"llama.cpp's {arch} has no biases, and rotary positions in all blocks but every fourth"
        )
        raise MisError(
            f"{why}, unlike this model: use --format hf, which transformers and mlx-lm open"
        )
    slides = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    if (
        any(slides)
        and not of.period
        and not (of.sinks and slides == [i % 2 == 0 for i in range(len(slides))])
    ):
        raise MisError(
            f"llama.cpp's {arch} has no sliding windows, some layers here do: use --format hf"
        )
    known = {"type", "rope_type", "rope_theta", *YARN} - {"mscale_all_dim"}
    if of.scaled_queries:  # llama.cpp takes mscale for 1
        known |= {"mscale_all_dim", "llama_4_scaling_beta"} | (
            {"mscale"} if scaling.get("mscale", 1) == 1 else set()
        )
    odd = sorted(set(scaling) - known) if rope == "yarn" else []
    lost = rope == "yarn" and not scaling.get("original_max_position_embeddings")
    other = (
        rope == "dynamic"
        or (rope == "llama3" and arch != "llama")
        or (rope != "yarn" and of.scaled_queries)
    )
    if other or odd or lost:
        detail = (
            f" with {odd[0]}"
            if odd
            else " without original_max_position_embeddings"
            if lost
            else ""
        )
        raise MisError(
            f"rotary positions of type {rope}{detail} have no place in a {arch} GGUF: use --format "
            f"hf"
        )
    return rope, scaling


def _freqs(config: Mapping[str, Any]) -> np.ndarray:
    """What llama.cpp divides each frequency by for Llama 3's long contexts or LongRoPE's, float32,
    one for each.
    """
    kind, r = _rope(config)
    if kind == "longrope":
        return np.array(r["long_factor"], np.float32)
    d = shape_of(config).head_dim
    context = r["original_max_position_embeddings"]
    turns = context * normalised(config)["rope_theta"] ** (-np.arange(0, d, 2) / d) / (2 * np.pi)
    low = r["low_freq_factor"]
    high = r["high_freq_factor"]
    # 1 where a wave turns often within the old context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / r["factor"] + smooth)).astype(np.float32)


def _of_mixture(c: Mapping[str, Any]) -> dict[str, int]:
    """What llama.cpp is told of experts, by the `GGUFWriter`'s words. MisError where it would
    compute another thing.
    """
    s = shape_of(c)
    of = families.family(c)
    if not of.experts:
        return {}
    if of.head_norms == "all" and s.kv_heads != s.heads:
        raise MisError(
            f"llama.cpp's {of.gguf} has a key-value head for every head, this model fewer: use "
            f"--format hf"
        )
    if c.get("norm_topk_prob", of.gates_sum_to_1) != of.gates_sum_to_1:
        other = (
            f"norm_topk_prob is {not of.gates_sum_to_1}, of which llama.cpp's {of.gguf} knows "
            f"the other"
        )
        raise MisError(f"{other}: use --format hf")
    words = {
        "count": s.experts,
        "used_count": c["num_experts_per_tok"],
        "feed_forward_length": s.ffn,
    }
    words |= {"shared_feed_forward_length": c[of.shared_expert]} if of.shared_expert else {}
    return {f"expert_{word}": value for word, value in words.items()}


def describe(writer: Any, config: Mapping[str, Any], name: str, wanted: str) -> None:
    """Put every key that llama.cpp's loader reads of these models, tokenizer aside, into the
    `GGUFWriter`.
    """
    s = shape_of(config)
    c = normalised(config)
    of = families.family(config)
    if type(c.get("max_position_embeddings")) is not int:
        raise MisError("config.json has no max_position_embeddings, which llama.cpp needs: add it")
    rope, scaling = _rope(config)
    words = {
        "type": "model",
        "name": name,
        "size_label": gguf.size_label(arch.params(config), 0, 0, 0),
        "file_type": gguf.LlamaFileType[
            WORDS["file_types"].get(wanted, f"MOSTLY_{wanted.upper()}")
        ],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "context_length": c["max_position_embeddings"],
        "embedding_length": s.hidden,
        "block_count": s.layers,
        "feed_forward_length": s.ffn,
        "vocab_size": s.vocab,
        "head_count": s.heads,
        "head_count_kv": s.kv_heads,
        "key_length": s.head_dim,
        "value_length": s.head_dim,
        "layer_norm_rms_eps": c["rms_norm_eps"],
        "rope_dimension_count": int(s.head_dim * c.get("partial_rotary_factor", 1)),
        "rope_freq_base": c["rope_theta"],
        **{OWN[key]: c.get(key) or 1.0 for key in sorted(of.own & OWN.keys())},
        **_of_mixture(c),
    }
    if rope in ("linear", "yarn"):
        words["rope_scaling_type"] = gguf.RopeScalingType(rope)
        keys = YARN.keys() & scaling if rope == "yarn" else {"factor"}
        words |= {f"rope_scaling_{YARN[key]}": scaling[key] for key in sorted(keys)}
    if rope == "longrope":
        words["rope_scaling_orig_ctx_len"] = old = c["original_max_position_embeddings"]
        words["rope_scaling_attn_factors"] = math.sqrt(
            1 + math.log(max(1, c["max_position_embeddings"] / old), old)
        )
    if of.scaled_queries:
        words["attn_temperature_scale"] = scaling["llama_4_scaling_beta"]
    if of.period or of.sinks:
        words["sliding_window"] = load.model_args(config).sliding_window
    for word, value in words.items():
        getattr(writer, f"add_{word}")(value)


def padded_bytes(parts: Iterable[Part]) -> int:
    """Bytes of all tensors in the file, padding included."""
    return sum(part.nbytes + -part.nbytes % ALIGNMENT for part in parts)


def head(writer: Any, parts: Iterable[Part]) -> bytes:
    """Everything in front of the first tensor: the facts given to the `GGUFWriter` so far, the
    table of tensors. The writer gets a buffer in place of its file, so that every byte goes through
    `Files`.
    """
    for part in parts:
        type_ = gguf.GGMLQuantizationType[part.kind]
        shape = gguf.quant_shape_to_byte_shape(part.shape, type_)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), part.nbytes, raw_dtype=type_)
    writer.fout, writer.state = [buffer := io.BytesIO()], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue() + bytes(-buffer.tell() % ALIGNMENT)


def write(
    path: Path,
    head: bytes,
    parts: Sequence[Part],
    rows: Iterable[Iterator[np.ndarray]],
    files: Files,
) -> None:
    """Write the new file `path`; `rows` gives, for each part in turn, its bytes slab by slab.
    ValueError when a tensor has other than its due bytes. Use it inside `checkpoint.commit_folder`.
    """
    files.write(path, head)
    for part, slabs in zip(parts, rows, strict=True):
        count = 0
        for slab in slabs:
            files.extend(path, slab.data.cast("B"))
            count += slab.nbytes
        if count != part.nbytes:
            raise ValueError(f"{part.name}: {count} bytes came, {part.nbytes} were due")
        files.extend(path, bytes(-count % ALIGNMENT))
