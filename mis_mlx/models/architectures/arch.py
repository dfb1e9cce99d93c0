"""Which axes of a model can shrink, and how large it is: pure functions of the config.

`tensor_shapes` names every tensor of a config; here they are counted, and compared with the tensors
of a file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.models.architectures import experts, gemma4, stored_form, tensor_shapes
from mis_mlx.models.architectures.families import family, mixture, shape_of
from mis_mlx.models.architectures.readers import READERS as READERS
from mis_mlx.models.architectures.readers import WRITERS as WRITERS
from mis_mlx.models.architectures.readers import readers as readers
from mis_mlx.models.architectures.readers import readers_of as readers_of
from mis_mlx.models.architectures.shape import ALL, Config, Shape, Shapes, weight_count
from mis_mlx.models.architectures.stored_form import inside_names
from mis_mlx.models.architectures.tensor_shapes import layer_tensors
from mis_mlx.models.architectures.tensor_shapes import tensors_of as tensors_of
from mis_mlx.types import Checkpoint, MisError, TensorAt

# The paper's teacher; it leaves kv heads and vocabulary open: those of today's 70B models.
PUBLISHED: dict[str, dict[str, Any]] = {  # configs without weights, for plans
    name: json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))
    for name in (
        "mis-137b",
        "qwen3-30b-a3b",
        "gemma-4-e2b",
        "gemma-4-e4b",
    )
}
PER_LAYER = gemma4.PER_LAYER
FFN_MULTIPLE = 256  # Metal's fast 4-bit kernels and GGUF K-quants need it


def layer_phase(config: Config) -> tuple[int, ...]:
    """A number for each block: blocks of different numbers cannot replace each other.

    mlx-lm computes a block of some families by its place, counted from the first.
    """
    architecture = family(config)
    period = architecture.period
    return tuple(int((i + 1) % period == 0) for i in range(architecture.layers))


def block_prefix(i: int) -> str:
    """What the names of block i's tensors have before them in the whole model."""
    return f"model.layers.{i}."


def block_of(name: str) -> int | None:
    """The number N of the block of the tensor `model.layers.N. ...`; None outside of blocks."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def params(config: Config) -> int:
    """The number of parameters, computed from the shape; a tied embedding counts once."""
    shape = shape_of(config)
    embedding = shape.vocab * shape.hidden
    head = 0 if shape.tied else embedding
    sides = weight_count(family(config).side_tensors())
    return blocks_params(config) + sides + embedding + head + shape.hidden


def channels(config: Config) -> int:
    """The number of per-layer input channels of a token, over all blocks."""
    architecture = family(config)
    return architecture.layers * architecture.side_width


def row_params(config: Config) -> int:
    """The number of parameters of one token: its rows of embedding, head and other tables."""
    shape = shape_of(config)
    tables = 1 if shape.tied else 2
    return int(shape.hidden * tables + channels(config))


def blocks_params(config: Config) -> int:
    """The number of parameters of all blocks."""
    architecture = family(config)
    layers = architecture.layers
    if len(architecture.unlike_blocks()) == 1:
        return layers * weight_count(architecture.block_tensors(0, stacked=True))
    return sum(weight_count(architecture.block_tensors(i, stacked=True)) for i in range(layers))


def expert_shares(config: Config) -> tuple[float, float]:
    """(share of a block's parameters in memory while it streams past, share that a token uses).

    Both are 1, except in a mixture: one expert is in memory at a time, and a token uses a few.
    """
    shape = shape_of(config)
    if not shape.experts:
        return 1.0, 1.0
    block = weight_count(layer_tensors(config, stacked=True))
    expert = 3 * shape.ffn * shape.hidden
    absent = shape.experts - 1
    unused = shape.experts - config.get("num_experts_per_tok", 1)
    in_memory = 1 - absent * expert / block
    active = 1 - unused * expert / block
    return in_memory, active


def inside(tensors: Mapping[str, TensorAt], config: Config) -> dict[str, TensorAt]:
    """Tensors by the names that the config's family has for them.

    A matrix that is stored joined with others becomes some rows of the stored one, and an expert
    that is stored in a stack becomes a part of it. MisError where the parts do not add up.
    """
    own = dict[str, TensorAt]()
    expected = tensors_of(config)
    unused = tensor_shapes.unused_tensors(config)
    architecture = family(config)
    of_experts = mixture(config)
    for stored_name, tensor in tensors.items():
        name = architecture.own_name(stored_name)
        if name != stored_name or stored_form.is_kernel(name):
            own[name] = stored_form.own_tensor(name, stored_name, tensor)
            continue
        names = inside_names(name)
        if names[0] in unused:
            continue
        if name.endswith("_proj_blocks"):
            raise MisError(
                f"{tensor.file}: the experts are packed in OpenAI's own format: run mlx_lm.convert "
                f"on the model first"
            )
        stack = experts.STACKED.fullmatch(name)
        if stack and of_experts:
            own |= dict(of_experts.apart(stack, name, tensor))
        elif names == [name] or re.sub(r"\w+$", "weight", name) in expected:
            own[name] = tensor
        elif len(names) == 1:
            own[names[0]] = replace(tensor, stored=(name, tensor))
        else:
            own |= dict(_joined_parts(name, tensor, names, expected))
    return own


def _joined_parts(
    name: str, tensor: TensorAt, names: Sequence[str], expected: Shapes
) -> Iterator[tuple[str, TensorAt]]:
    """(own name, its rows of `tensor`) of every matrix that is joined in the stored tensor `name`.

    expected: the shapes by own names, which tell how many rows each has.
    """
    stored_rows = tensor.shape[0] if tensor.shape else 0
    row_bytes = tensor.nbytes // max(1, stored_rows)
    first = 0
    for own in names:
        # scales and biases of a packed matrix have its rows
        rows = expected.get(re.sub(r"\w+$", "weight", own), (0,))[0]
        part = replace(
            tensor,
            shape=(rows, *tensor.shape[1:]),
            offset=tensor.offset + first * row_bytes,
            nbytes=rows * row_bytes,
            stored=(name, tensor),
        )
        yield own, part
        first += rows
    if first != stored_rows:
        raise MisError(
            f"{tensor.file}: {name} has {stored_rows} rows, but config.json says {first}: "
            f"download it again"
        )


def check_tensors(checkpoint: Checkpoint) -> None:
    """Predict every tensor from the config, and compare names and shapes with the headers.

    Weights may be quantized or not. MisError names the first tensor that is missing, that has
    another shape or type, or that the model has no place for.
    """
    stored = checkpoint.tensors
    expected = tensors_of(checkpoint.config)
    for name, shape in expected.items():
        tensor = stored.get(name)
        if tensor is None:
            lost = f"config.json lists {name} {list(shape)}, but no file holds it"
            raise MisError(f"{checkpoint.path}: {lost}: download the model again")
        has_scales = name.removesuffix(".weight") + ".scales" in stored
        _check_tensor(name, tensor, shape, packed=tensor.dtype == "U32" and has_scales)
    for name, tensor in stored.items():
        if name in expected or name == "lm_head.weight" or "rotary_emb" in name:
            continue
        stem, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and f"{stem}.weight" in expected:
            continue
        model = f"a {family(checkpoint.config).name} of {shape_of(checkpoint.config)}"
        raise MisError(
            f"{tensor.file}: holds {name}, which {model} has no place for: files and config differ"
        )


def _check_tensor(name: str, tensor: TensorAt, shape: tuple[int, ...], *, packed: bool) -> None:
    """MisError where a stored tensor has another shape than the config gives it, or an odd type."""
    fits = tensor.shape == shape
    if packed and len(shape) == 2:  # a row of a packed matrix has fewer, larger numbers
        fits = tensor.shape[0] == shape[0]
    if not fits:
        why = f"{name} is {list(tensor.shape)}, but config.json says {list(shape)}"
        raise MisError(f"{tensor.file}: {why}: files and config belong to different models")
    if not packed and tensor.dtype not in ("F32", "F16", "BF16"):
        why = f"{name} is stored as {tensor.dtype}, but weights must be F32, F16 or BF16"
        raise MisError(
            f"{tensor.file}: {why}: download the model again, or convert it with mlx_lm.convert"
        )


def type_of(config: Config, name: str, dtype: mx.Dtype) -> mx.Dtype:
    """The type that a tensor computes in, and is written in, in a model of `dtype`."""
    return mx.float32 if family(config).always_float32(name) else dtype


def is_quantized(tensors: Mapping[str, TensorAt]) -> bool:
    """Whether any weight is packed, which the name of its scales tells."""
    return any(name.endswith(".scales") for name in tensors)


def count(flag: str, asked: str | None, total: int, what: str) -> int | None:
    """The number that `flag` keeps of `total` things; None where the flag is not given.

    asked: a number, or a share such as 0.5x, which is rounded down. what: the things' name, for the
    MisError where the number is not from 1 to `total`.
    """
    if asked is None:
        return None
    match = re.fullmatch(r"\s*(\d+|(?:\d*\.)?\d+(?=x))(x?)\s*", asked)
    wanted = 0.0
    if match:
        wanted = float(match[1])
        if match[2]:
            wanted *= total
    if not 1 <= wanted <= total:
        raise MisError(
            f"{flag} {asked} is not a number of {what} from 1 to {total:,}: give one, or a "
            f"share such as 0.5x"
        )
    return int(wanted)


def kv_heads(before: Shape, heads: int) -> int:
    """The number of key-value heads for a student of `heads` query heads.

    Where the number allows it, whole groups go: a model then ends nearer to its teacher than with a
    part of each group gone (SmolLM2, 9 to 6: 3.354 nats for 3.424).
    """
    group = before.heads // before.kv_heads
    return before.kv_heads if heads % group else heads // group


def target_shape(config: Config, ratios: Mapping[str, float], **exact: int | None) -> Shape:
    """The student's shape: each axis by scenario ratio, or exactly as given.

    By ratio the FFN is a multiple of 256 (or kept when smaller), hidden one of 16 and of the heads.
    MisError where no loader would accept the model.
    """
    teacher = shape_of(config)
    steps = {"ffn": FFN_MULTIPLE, "heads": teacher.kv_heads, "hidden": math.lcm(16, teacher.heads)}
    sizes: dict[str, Any] = {axis: getattr(teacher, axis) for axis in ALL}
    for axis, before in sizes.items():
        wanted = exact.get(axis)
        ratio = ratios.get(axis, 1)
        step = steps.get(axis, 1)
        _check_axis(config, axis, before, wanted, ratio=ratio)
        if wanted is not None:
            sizes[axis] = wanted
        elif axis in ratios:
            sizes[axis] = _nearest_multiple(before, ratio, step)
    _settle_heads(teacher, sizes, ratios, exact)
    family(config).check_sizes(sizes)
    return replace(teacher, **sizes)


def _check_axis(
    config: Config, axis: str, before: int, wanted: int | None, *, ratio: float
) -> None:
    """MisError where the family's axis cannot be cut, or not to the size that is wanted."""
    architecture = family(config)
    cut = ratio != 1
    if wanted is not None:
        cut = wanted != before
    if cut and axis not in architecture.axes:
        raise MisError(
            f"{axis} of a {architecture.name} cannot be cut: {architecture.why}; you can cut "
            f"{', '.join(architecture.axes)}"
        )
    if wanted is not None and not 1 <= wanted <= before:
        raise MisError(
            f"--{axis} {wanted} is outside 1 to {before}, the teacher's size: choose a number "
            f"in between"
        )


def _nearest_multiple(before: int, ratio: float, step: int) -> int:
    """The multiple of `step` nearest to before * ratio; `before` where it is smaller than one."""
    steps = max(round(before * ratio / step), 1)
    most = before // step
    return min(steps, most) * step or before


def _settle_heads(
    teacher: Shape,
    sizes: dict[str, Any],
    ratios: Mapping[str, float],
    exact: Mapping[str, int | None],
) -> None:
    """Make the student's heads and key-value heads fit each other, or raise MisError."""
    if exact.get("heads"):
        sizes["kv_heads"] = kv_heads(teacher, sizes["heads"])
    kv = sizes["kv_heads"]
    group = teacher.heads // teacher.kv_heads
    if exact.get("heads") is None and "heads" not in ratios:
        sizes["heads"] = group * kv
    heads = sizes["heads"]
    if heads % kv or heads > group * kv:
        why = f"{kv} key-value heads with {group} query heads each, as in the teacher"
        remedy = f"choose a multiple of {kv}, {group * kv} at most"
        raise MisError(f"--heads {heads} does not divide into {why}: {remedy}")


def student_config(
    config: Config,
    shape: Shape,
    layers: Sequence[int] | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The teacher's config.json edited to `shape`, not quantized.

    Values that runtimes would guess differently are spelled out. layers: the teacher's blocks that
    stay; default: the first ones.
    """
    edited = family(config).normalised()
    # transformers 5 would believe dtype, not torch_dtype
    for key in ("quantization", "quantization_config", "dtype"):
        edited.pop(key, None)
    kept = layers or range(shape.layers)
    edited["torch_dtype"] = dtype
    family(config).cut(edited, shape, kept)
    return edited
