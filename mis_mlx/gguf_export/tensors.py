"""A model's tensors and facts as llama.cpp has them, and the file of them.

Names, types, the order of rows, and every key that llama.cpp's loader asks for. What MLX packed is
not rounded again where llama.cpp has the same format: affine groups of up to 4 bits are Q4_1 blocks
and those of 5 bits Q5_1 (scale · q + bias, repeated in a group's blocks of 32), mxfp4 and nvfp4 are
MXFP4 and NVFP4.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
from gguf.gguf_writer import WriterState

from mis_mlx.gguf_export import gemma, ggml_blocks, positions
from mis_mlx.gguf_export.ggml_blocks import BLOCK
from mis_mlx.gguf_export.positions import Config
from mis_mlx.gguf_export.rerounding import Rerounding
from mis_mlx.gguf_export.words import FILE_TYPES, FREQS, REWRAPPED
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch, experts, families, stored_form
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load, wheel_model
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError

NVFP4_BLOCK = 64  # four groups of 16
SLAB_BYTES = 16 * 2**20  # float32 rows converted at once
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT  # bytes, at a multiple of which every tensor begins


class Part(NamedTuple):
    """One tensor of the GGUF.

    name, source: llama.cpp's name and Hugging Face's. shape: (out, in), behind the experts where
    they are stacked. kind: ggml's type. heads: of q and k, whose rows llama.cpp wants interleaved;
    0 leaves the order. exact: MLX's packed numbers are kept.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    heads: int = 0
    exact: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding.

        ValueError when a row cannot be cut into the type's blocks.
        """
        type_ = gguf.GGMLQuantizationType[self.kind]
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, type_))


def out_type(checkpoint: Checkpoint) -> str:
    """The type that keeps exactly what MLX packed.

    q8_0 where no type does; f16 for a model that is not packed.
    """
    if not arch.is_quantized(checkpoint.tensors):
        return "f16"
    modes = Counter[str]()
    for name in arch.tensors_of(checkpoint.config):
        packing = load.packing(checkpoint, name)
        if not packing:
            continue
        mode = packing["mode"]
        if f"{mode} {packing['bits']}" in REWRAPPED:
            modes[mode] += 1
    if not modes:
        return "q8_0"
    mode = modes.most_common(1)[0][0]
    return "q4_1" if mode == "affine" else mode


def parts(checkpoint: Checkpoint, wanted: str) -> list[Part]:
    """Every tensor of the GGUF, in order. wanted: --out-type.

    Vectors are float32. Of a packed model q4_1, mxfp4 and nvfp4 keep exactly what some type of
    llama.cpp holds; other matrices get Q8_0. MisError where rows do not divide by a block, or
    nothing is packed in the mode that was asked for.
    """
    config = checkpoint.config
    architecture = families.family(config)
    architecture.check_gguf()
    shape = shape_of(config)
    listed_shapes = arch.tensors_of(config, stacked=True)
    names = wheel_model.gguf_names(config, listed_shapes)
    heads = {}
    if architecture.interleaved:
        heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}
    listed = []
    for source, size in listed_shapes.items():
        kind, exact = _kind(checkpoint, source, wanted, size)
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        columns = size[-1]
        if columns % block:
            why = f"which {kind}'s block of {block} does not divide"
            raise MisError(f"{source} has rows of {columns} weights, {why}: use --out-type f16")
        name = names[source]
        if name is None:
            raise MisError(
                f"llama.cpp's {architecture.gguf} has no place for {source}: use --format hf"
            )
        module = source.split(".")[-2]
        if stored_form.is_kernel(source):
            size = size[:2]
        part = Part(
            name=name,
            source=source,
            shape=size,
            kind=kind,
            heads=heads.get(module, 0),
            exact=exact,
        )
        listed.append(part)
    if wanted in ("mxfp4", "nvfp4"):
        kept = {part.kind for part in listed if part.exact}
        if wanted.upper() not in kept:
            raise MisError(
                f"--out-type {wanted} needs matrices that MLX packed in this way, and this model "
                f"has none: use another --out-type"
            )
    for name in FREQS.get(positions.rope(config)[0], ()):
        count = positions.frequency_factors(config).shape
        listed.append(Part(f"rope_{name}.weight", "", count, "F32"))
    return listed


def _kind(
    checkpoint: Checkpoint,
    source: str,
    wanted: str,
    size: tuple[int, ...],
) -> tuple[str, bool]:
    """(ggml's type of a tensor, whether MLX's packed numbers go into it unchanged)."""
    # A router decides which experts a token meets: it is never quantized.
    small = len(size) == 1 or source.endswith(".bias")
    if small or experts.is_router(source):
        return "F32", False
    if stored_form.is_kernel(source):  # llama.cpp convolves in float32
        return "F32", False
    # All experts of a stacked matrix are packed alike, so the first one answers for them.
    name = family(checkpoint.config).one_by_one(source)[0]
    if wanted in ("f32", "f16", "bf16", "q8_0"):
        return wanted.upper(), False
    packing = load.packing(checkpoint, name)
    if wanted in ("q4_1", "mxfp4", "nvfp4") and arch.is_quantized(checkpoint.tensors):
        exact = _same_numbers(packing, size[-1])
        return exact or "Q8_0", exact is not None
    # Of 4-bit types, embedding and head keep 8 bits, and so does what MLX gave more than 4.
    common = checkpoint.config.get("quantization") or {}
    wide = packing and 4 < packing.get("bits", 0) != common["bits"]
    if wide or name in (load.EMBEDDING + "weight", "lm_head.weight"):
        return "Q8_0", False
    return wanted.upper(), False


def _same_numbers(packing: Config, columns: int) -> str | None:
    """ggml's type that holds MLX's packed numbers unchanged; None where no type does."""
    mode = packing.get("mode")
    if mode == "affine":
        # Scale and bias of a group are repeated in its blocks: no block may lie in two groups.
        divides = packing.get("group_size", 0) % BLOCK == 0
    else:
        block = NVFP4_BLOCK if mode == "nvfp4" else BLOCK
        divides = columns % block == 0
    return REWRAPPED.get(f"{mode} {packing.get('bits')}") if divides else None


def rows(
    checkpoint: Checkpoint,
    part: Part,
    tally: Rerounding,
) -> Iterator[np.ndarray]:
    """The bytes of one tensor, uint8 (rows, bytes of a row), slab by slab.

    Memory: the tensor as stored, and a slab. tally: counts what is not the same number any more.
    MisError at NaN or infinity.
    """
    if not part.source:  # of the positions: no weight of the model
        yield positions.frequency_factors(checkpoint.config).view(np.uint8)
        return
    convert = _rewrapped if part.exact else _converted
    # A stacked tensor of the GGUF, (experts, out, in), comes from one matrix of each expert.
    shape = part.shape[-2:]
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, SLAB_BYTES // row_bytes)
    order = None
    if part.heads:
        # llama.cpp's rotation pairs neighbouring rows, Hugging Face's the halves of a head. In
        # another order the model runs without an error and talks nonsense.
        order = wheel_model.row_order(shape[0], part.heads)
    for source in family(checkpoint.config).one_by_one(part.source):
        matrix = part._replace(source=source, shape=shape)
        stem = source.removesuffix(".weight")
        names = (source, f"{stem}.scales", f"{stem}.biases")
        stored = [name for name in names if name in checkpoint.tensors]
        raw: Any = safetensors.lazy(checkpoint.tensors, stored)
        if source.startswith(arch.PER_LAYER):
            raw = {name: gemma.TableRows(checkpoint, name) for name in stored}
        # Rows do not depend on each other, so a slab of them at a time bounds the float32 copy.
        for start in range(0, shape[0], step):
            index: Any = slice(start, start + step)
            if order is not None:
                index = mx.array(order[index])
            slab = {name: array[index] for name, array in raw.items()}
            yield np.ascontiguousarray(convert(checkpoint, matrix, slab, tally)).view(np.uint8)
    mx.clear_cache()


def _finite(part: Part, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise MisError(
            f"{part.source} holds NaN or infinity: this model is broken, export the one it was "
            f"made from"
        )


def _converted(
    checkpoint: Checkpoint,
    part: Part,
    slab: load.Raw,
    tally: Rerounding,
) -> np.ndarray:
    """Rows of any kind, de-quantized to float32 and rounded to the part's type."""
    values = np.array(load.dense(checkpoint, part.source, slab).astype(mx.float32))
    if "norm" in part.source:
        # llama.cpp multiplies by the weight alone; Gemma's norms multiply by 1 + weight.
        architecture = families.family(checkpoint.config)
        values = values + architecture.gain_offset
        if part.name.endswith("attn_q_norm.weight"):
            values = values * architecture.query_gain()
    _finite(part, values)
    if part.kind == "F16" and values.size:
        # Beyond float16's range numbers would become infinity in silence.
        largest = np.abs(values).max()
        if largest > np.finfo(np.float16).max:
            raise MisError(f"{part.source} has {largest:.4g}, but float16 ends at 65504: use bf16")
    kind = gguf.GGMLQuantizationType[part.kind]
    converted = gguf.quantize(values, kind)
    if load.packing(checkpoint, part.source):
        tally.add(values, gguf.dequantize(converted, kind))
    return converted


def _rewrapped(
    checkpoint: Checkpoint,
    part: Part,
    slab: load.Raw,
    tally: Rerounding,
) -> np.ndarray:
    """MLX's packed rows as ggml's blocks, uint8 (rows, bytes of a row)."""
    stem = part.source.removesuffix(".weight")
    packing = load.packing(checkpoint, part.source)
    mode = packing["mode"]
    q = np.array(rounding.unpacked(slab[part.source], packing["bits"]))  # (rows, in) uint8
    if mode != "affine":
        return ggml_blocks.of_floats(q, np.array(slab[f"{stem}.scales"]), mode)
    blocks_of_group = packing["group_size"] // BLOCK
    halves = []
    for key in ("scales", "biases"):
        stored = np.array(slab[f"{stem}.{key}"].astype(mx.float32))
        with np.errstate(over="ignore"):  # an overflow is infinity, and that is refused
            half = stored.astype(np.float16)
        _finite(part, half)
        tally.inexact += int((half != stored).sum())
        halves.append(np.repeat(half, blocks_of_group, axis=1))
    return ggml_blocks.of_groups(q, np.stack(halves, axis=-1), packing["bits"])


def describe(writer: Any, config: Config, name: str, wanted: str) -> None:
    """Put every key that llama.cpp's loader reads into the `GGUFWriter`, the tokenizer's aside.

    MisError where llama.cpp cannot be told how the model computes.
    """
    shape = shape_of(config)
    full = family(config).normalised()
    if type(full.get("max_position_embeddings")) is not int:
        raise MisError("config.json has no max_position_embeddings, which llama.cpp needs: add it")
    rope, scaling = positions.rope(config)
    file_type = FILE_TYPES.get(wanted, f"MOSTLY_{wanted.upper()}")
    words = {
        "type": "model",
        "name": name,
        "size_label": gguf.size_label(arch.params(config), 0, 0, 0),
        "file_type": gguf.LlamaFileType[file_type],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "context_length": full["max_position_embeddings"],
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "vocab_size": shape.vocab,
        "head_count": shape.heads,
        "head_count_kv": shape.kv_heads,
        # said, because heads · head_dim need not be the hidden size
        "key_length": shape.head_dim,
        "value_length": shape.head_dim,
        "layer_norm_rms_eps": full["rms_norm_eps"],
        "rope_dimension_count": int(shape.head_dim * full.get("partial_rotary_factor", 1)),
        "rope_freq_base": full["rope_theta"],
    }
    words |= positions.words(rope, scaling, full)
    words |= families.family(full).gguf_words()
    for word, value in words.items():
        getattr(writer, f"add_{word}")(value)


def padded_bytes(parts: Iterable[Part]) -> int:
    """Bytes of all tensors in the file, padding included."""
    total = 0
    for part in parts:
        nbytes = part.nbytes
        total += nbytes + -nbytes % ALIGNMENT
    return total


def head(writer: Any, parts: Iterable[Part]) -> bytes:
    """Everything in front of the first tensor: the facts given so far, and the table of tensors.

    The `GGUFWriter` gets a buffer in place of its file, so that every byte goes through `Files`.
    """
    for part in parts:
        type_ = gguf.GGMLQuantizationType[part.kind]
        shape = gguf.quant_shape_to_byte_shape(part.shape, type_)
        writer.add_tensor_info(
            name=part.name,
            tensor_shape=shape,
            tensor_dtype=np.dtype(np.uint8),
            tensor_nbytes=part.nbytes,
            raw_dtype=type_,
        )
    buffer = io.BytesIO()
    writer.fout = [buffer]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # The first tensor begins at a multiple of ALIGNMENT, too: the table's offsets count from there.
    return buffer.getvalue() + bytes(-buffer.tell() % ALIGNMENT)


def write(
    path: Path,
    head: bytes,
    parts: Sequence[Part],
    rows: Iterable[Iterator[np.ndarray]],
) -> None:
    """Write the new file `path`, slab by slab.

    rows: for each part in turn, its bytes. ValueError when a tensor has other than its due bytes.
    Use it inside `checkpoint.commit_folder`.
    """
    DISK.write(path, head)
    for part, slabs in zip(parts, rows, strict=True):
        count = 0
        for slab in slabs:
            DISK.extend(path, slab.data.cast("B"))
            count += slab.nbytes
        # One byte more or less would move every later tensor away from its offset in the table.
        if count != part.nbytes:
            raise ValueError(f"{part.name}: {count} bytes came, {part.nbytes} were due")
        DISK.extend(path, bytes(-count % ALIGNMENT))
