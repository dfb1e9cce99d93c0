"""Write a model's weights in MLX's quantized formats, one tensor at a time: every matrix, or an
error.

mlx-lm leaves a matrix that the group does not divide unquantized without a word; here that is an
error and a remedy.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import (
    arch,
    experts,
    stored_form,
)
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage import safetensors
from mis_mlx.types import Checkpoint, MisError

PARTS = ("weight", "scales", "biases")
# beside a mixed model: the cost of every matrix in every number of bits
SENSITIVITY = "sensitivity.json"
# beside a mixture: of every block, how many tokens each expert was rounded by
EXPERT_TOKENS = "expert_tokens.json"
USUAL_BITS = 4
# where 4 bits cost most: the embedding, which makes the logits too when it is tied
WIDE_BITS = 8


class Format(NamedTuple):
    """How a matrix is packed; mlx-lm's config has it under the matrix's path, if it is an exception
    from the model's own.
    """

    bits: int
    group: int  # weights that share one scale
    mode: rounding.Mode = "affine"

    @property
    def settings(self) -> dict[str, Any]:
        """mlx-lm's names."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    @property
    def bits_per_weight(self) -> float:
        """With scales, and the biases that affine groups have."""
        overhead = 32 if self.mode == "affine" else 8
        return self.bits + overhead / self.group

    def specs(self, path: str, *shape: int) -> dict[str, safetensors.Spec]:
        """{tensor's name: (type, shape)} of a packed matrix (rows, columns), or of a stack."""
        *rows, columns = shape
        groups = (*rows, columns // self.group)
        specs: dict[str, safetensors.Spec] = {
            f"{path}.weight": ("U32", (*rows, columns * self.bits // 32))
        }
        if self.mode == "affine":
            specs[f"{path}.scales"] = ("F16", groups)
            specs[f"{path}.biases"] = ("F16", groups)
        else:
            specs[f"{path}.scales"] = ("U8", groups)
        return specs


Formats = Mapping[str, Format]  # by module path
RoundedBlock = Mapping[str, rounding.Packed]  # a block's matrices, by module path
Rounded = Iterator[RoundedBlock]


def of_mixture(config: Mapping[str, Any], asked: QuantizationConfig) -> dict[str, Any]:
    """Settings that differ from `asked` for a mixture of experts, {} for other models.

    A mixture has one number of bits, and nothing learns. Says so if `asked` asks for it.
    """
    if not shape_of(config).experts:
        return {}
    if asked.target_bpw is not None or asked.q_iters:
        cli.say(
            "a mixture of experts is rounded to 4 bits: --target-bpw and --q-iters are for dense "
            "models"
        )
    return {"target_bpw": None, "q_iters": 0}


def formats_of(config: Mapping[str, Any], group_size: int) -> dict[str, Format]:
    """The format of every matrix, by module path: 4 bits, or 8.

    8 bits are for the embedding, the head and `wide_projections`. MisError when a matrix cannot be
    cut into groups.
    """
    eight_bit = {"model.embed_tokens", "lm_head"} | wide_projections(config)
    floors = family(config).bit_floors()
    shapes = {}
    plan = {}
    for name, shape in arch.tensors_of(config, stacked=True).items():
        if len(shape) < 2 or name.endswith(".bias") or experts.is_router(name):
            continue
        if stored_form.is_kernel(name):
            continue
        path = name.removesuffix(".weight")
        shapes[path] = shape
        plan[path] = Format(USUAL_BITS, group_size)
        if path in eight_bit:
            plan[path] = Format(WIDE_BITS, group_size)
        elif path in floors:
            plan[path] = Format(floors[path], group_size)
    for path, shape in shapes.items():
        group = max(plan[path].group, 32)  # MLX packs no shorter rows
        if shape[-1] % group:
            raise MisError(
                f"{path}.weight has rows of {shape[-1]} weights, which are not divisible by "
                f"{group}: {_group_remedy(shapes)}"
            )
    return plan


def _group_remedy(shapes: Mapping[str, tuple[int, ...]]) -> str:
    for group in (64, 32):
        if all(shape[-1] % group == 0 for shape in shapes.values()):
            return f"use --q-group-size {group}"
    return "prune that axis to a multiple of 32, or --quantize 0"


def wide_projections(config: Mapping[str, Any]) -> set[str]:
    """Module paths of the small matrices that always have 8 bits.

    Per-layer inputs come in through them. In a gated delta rule they say what each
    head forgets and learns.
    """
    architecture = family(config)
    return architecture.state_gates() | architecture.gates()


def write_quantized(
    checkpoint: Checkpoint,
    out: Path,
    plan: Formats,
    *,
    rounded: Rounded | None = None,
    extra: Mapping[str, bytes] | None = None,
    fit: bool = False,
) -> dict[str, Any]:
    """Commit the new folder `out`, which stock mlx-lm reads.

    It has packed weights, and scales and biases in float16 (or scales of 8 bits, in other modes).
    rounded: the blocks' matrices, and then the head where `compensated_head` names it, from
    quantization/stage; default: the nearest values. extra: more files, by name. fit: nearest values
    are those of `rounding.fitted` in place of MLX's own, in affine formats. Returns the bits per
    weight, bytes and the group size used most. MisError when the model is quantized already, or has
    weights that are not numbers or too large.
    """
    check_dense(checkpoint)
    common = _usual_format(plan)
    settings = common.settings
    for path, kind in plan.items():
        if kind != common:
            settings[path] = kind.settings
    config = {**checkpoint.config, "quantization": settings, "quantization_config": settings}
    last = compensated_head(checkpoint, plan) if rounded else None
    specs = _specs(checkpoint, plan, last)
    model_writer.write_folder(
        config,
        specs,
        _packed(checkpoint, plan, rounded, last=last, fit=fit),
        source=checkpoint.path,
        out=out,
        extra=extra,
    )
    return figures(checkpoint, plan)


def compensated_head(checkpoint: Checkpoint, plan: Formats) -> str | None:
    """The module path of a head that is rounded by what reaches it, behind the blocks.

    None where it has so many bits that it gets its nearest values. A tied head is the embedding,
    too.
    """
    path = load.head_prefix(checkpoint).rstrip(".")
    kind = plan.get(path)
    if kind is None or kind.bits >= rounding.ENOUGH_BITS:
        return None
    return path


def _usual_format(plan: Formats) -> Format:
    """The format that most matrices of blocks have."""
    in_blocks = [kind for path, kind in plan.items() if arch.block_of(path) is not None]
    return max(set(in_blocks), key=lambda kind: (in_blocks.count(kind), kind))


def _names(config: Mapping[str, Any], last: str | None) -> list[str]:
    """A dense model's tensors in the order of a file. last: the module that is rounded last."""
    names = list(arch.tensors_of(config, stacked=True))
    return sorted(names, key=lambda name: name == f"{last}.weight")


def _specs(
    checkpoint: Checkpoint, plan: Formats, last: str | None = None
) -> dict[str, safetensors.Spec]:
    """{name: (type, shape)} of a dense model's tensors, once its matrices are packed as planned.

    last: as of `_names`.
    """

    def stored_type(name: str) -> str:
        first = family(checkpoint.config).one_by_one(name)[0]
        return checkpoint.tensors[first].dtype

    return _specs_of(checkpoint.config, plan, stored_type, last)


def _specs_of(
    config: Mapping[str, Any],
    plan: Formats,
    type_of: Callable[[str], str],
    last: str | None = None,
) -> dict[str, safetensors.Spec]:
    """`_specs` of a config. type_of: of a tensor that is not packed, as safetensors calls it."""
    specs: dict[str, safetensors.Spec] = {}
    shapes = arch.tensors_of(config, stacked=True)
    for name in _names(config, last):
        shape = shapes[name]
        path = name.removesuffix(".weight")
        if path in plan:
            specs |= plan[path].specs(path, *shape)
        else:
            specs[name] = (type_of(name), shape)
    return specs


def packed_bytes(config: Mapping[str, Any], plan: Formats, dtype: str) -> int:
    """Bytes of a model packed as planned. dtype: of what is not packed: 'bfloat16'."""
    usual = model_writer.SAFETENSORS_NAMES[dtype]

    def type_of(name: str) -> str:
        return "F32" if family(config).always_float32(name) else usual

    return sum(map(safetensors.spec_bytes, _specs_of(config, plan, type_of).values()))


def figures(checkpoint: Checkpoint, plan: Formats) -> dict[str, Any]:
    """Bits per weight, bytes and the group size used most, of a dense model packed as planned."""
    nbytes = sum(map(safetensors.spec_bytes, _specs(checkpoint, plan).values()))
    return {
        "bits_per_weight": 8 * nbytes / arch.params(checkpoint.config),
        "bits_per_block_weight": block_bits(checkpoint.config, plan),
        "nbytes": nbytes,
        "group_size": _usual_format(plan).group,
    }


def expert_figures(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens rounded an expert of the mixture in `folder`; {} where none was counted.

    below_inputs: experts that saw fewer tokens than one of their matrices has inputs.
    """
    path = folder / EXPERT_TOKENS
    if not path.is_file():
        return {}
    counts = [count for block in json.loads(path.read_text("utf-8")) for count in block]
    shape = shape_of(config)
    inputs = max(shape.hidden, shape.ffn)
    return {
        "expert_tokens": {
            "fewest": min(counts),
            "median": statistics.median(counts),
            "below_inputs": sum(count < inputs for count in counts),
            "experts": len(counts),
        }
    }


def _packed(
    checkpoint: Checkpoint,
    plan: Formats,
    rounded: Rounded | None,
    *,
    last: str | None,
    fit: bool,
) -> Iterator[tuple[str, safetensors.Tensor]]:
    """(name, tensor) of everything in the folder to be written. last: as of `_names`."""
    names = _names(checkpoint.config, last)
    block: dict[str, rounding.Packed] = {}
    for name in cli.show_progress("tensor", names):
        path = name.removesuffix(".weight")
        if path not in plan:
            yield name, _plain(checkpoint, name)
            continue
        if name in load.TABLES and path != last:
            yield from _table_in_parts(checkpoint, plan[path], path, fit=fit)
            continue
        comes = path == last or arch.block_of(name) is not None
        while rounded and comes and path not in block:
            block = dict(next(rounded))
        parts = block.pop(path, None)
        if parts is None:
            parts = _nearest(checkpoint, plan[path], name, fit=fit)
        refuse_beyond(checkpoint.path, name, parts)
        for part, array in zip(PARTS, parts, strict=False):
            yield f"{path}.{part}", array


def _plain(checkpoint: Checkpoint, name: str) -> safetensors.Tensor:
    """A tensor that is not quantized, of all experts stacked where it belongs to experts."""
    if name in load.TABLES:
        table = load.stored_parts(checkpoint, name)
        return table._replace(parts=finite_parts(checkpoint, name, table.parts))
    arrays = [_finite(checkpoint, part) for part in family(checkpoint.config).one_by_one(name)]
    if len(arrays) == 1:
        return arrays[0]
    return mx.stack(arrays)


def _table_in_parts(
    checkpoint: Checkpoint,
    kind: Format,
    path: str,
    *,
    fit: bool,
) -> Iterator[tuple[str, safetensors.Tensor]]:
    """A table with a row for each token rounded to nearest values, some rows at a time.

    Its scales, a thirty-second of its numbers, wait in memory until the integers are written.
    """
    name = f"{path}.weight"
    shape = arch.tensors_of(checkpoint.config)[name]
    specs = kind.specs(path, *shape)
    scales: list[list[mx.array]] = []  # of each part, with its biases

    def integers() -> Iterator[mx.array]:
        table = load.dense_parts(checkpoint, name)
        for rows in finite_parts(checkpoint, name, table):
            packed, *others = _rounded_rows(rows, kind, fit=fit)
            stream.evaluate_now(packed, others)
            refuse_beyond(checkpoint.path, name, others)
            del rows
            scales.append(others)
            yield packed

    yield name, safetensors.InParts(specs[name], integers())
    for part, arrays in zip(PARTS[1:], zip(*scales, strict=True), strict=False):
        yield f"{path}.{part}", mx.concatenate(list(arrays))


def _nearest(
    checkpoint: Checkpoint,
    kind: Format,
    name: str,
    *,
    fit: bool,
) -> rounding.Packed:
    """A matrix, or those of all experts stacked, rounded to nearest values."""
    rounded = []
    for part in family(checkpoint.config).one_by_one(name):
        rounded.append(rounded_matrix(_finite(checkpoint, part), kind, fit=fit))
    if len(rounded) == 1:
        return rounded[0]
    return tuple(mx.stack(list(arrays)) for arrays in zip(*rounded, strict=True))


def rounded_matrix(weight: mx.array, kind: Format, *, fit: bool = False) -> rounding.Packed:
    """A matrix (out, in) rounded to nearest values, some rows at a time.

    An embedding can be most of a model, too large to be widened as a whole.
    """
    parts = []
    step = max(1, rounding.PART // weight.shape[1])
    for start in range(0, len(weight), step):
        end = start + step
        parts.append(_rounded_rows(weight[start:end], kind, fit=fit))
        stream.evaluate_now(*parts[-1])
    return rounding.concatenated(parts)


def _rounded_rows(rows: mx.array, kind: Format, *, fit: bool) -> rounding.Packed:
    """Rows (n, in) of a matrix rounded to nearest values, on fitted grids or on MLX's."""
    if fit and kind.mode == "affine":
        return rounding.fitted(rows, kind.group, kind.bits, fused=precision.compiles())
    return rounding.nearest(rows, kind.group, kind.bits, kind.mode)


def formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """The format of every packed matrix of a quantized model, by module path."""
    plan = {}
    for name in checkpoint.tensors:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            stored = load.packing(checkpoint, path)
            plan[path] = Format(stored["bits"], stored["group_size"], stored["mode"])
    return plan


def check_dense(checkpoint: Checkpoint) -> None:
    """MisError when the model is quantized already."""
    if arch.is_quantized(checkpoint.tensors):
        raise MisError(f"{checkpoint.path} is quantized already: start from the unquantized model")


def check_learns(checkpoint: Checkpoint) -> None:
    """MisError when the model has no scales and biases that can learn."""
    modes = {kind.mode for kind in formats(checkpoint).values()}
    if not modes:
        raise MisError(f"{checkpoint.path} is not quantized, so it has no scales: `quantize` it")
    if modes != {"affine"} or shape_of(checkpoint.config).experts:
        what = "a mixture of experts" if modes == {"affine"} else f"in {', '.join(sorted(modes))}"
        raise MisError(
            f"{checkpoint.path} is {what}, whose scales do not learn here: use --fine-tune-type "
            f"lora, or a dense model in affine formats"
        )


def block_bits(config: Mapping[str, Any], plan: Formats) -> float:
    """Mean bits per weight of the blocks' matrices, scales and biases included.

    A plan may name experts one by one, or stacked as mlx-lm has them.
    """
    shapes = {**arch.tensors_of(config), **arch.tensors_of(config, stacked=True)}
    bits = 0.0
    weights = 0
    for path, kind in plan.items():
        if arch.block_of(path) is not None:
            size = math.prod(shapes[f"{path}.weight"])
            bits += kind.bits_per_weight * size
            weights += size
    return bits / weights


def _finite(checkpoint: Checkpoint, name: str) -> mx.array:
    """A tensor, de-quantized where it is packed. MisError where it holds NaN or infinity."""
    weight = load.dense(checkpoint, name)
    refuse_not_numbers(checkpoint.path, name, weight)
    return weight


def refuse_not_numbers(folder: Path, name: str, array: mx.array) -> None:
    """MisError where a tensor of a model folder holds NaN or infinity."""
    bad = stream.not_numbers(array)
    if bad:
        raise MisError(
            f"{folder}: {name} holds {bad} values that are not numbers: download the model again"
        )


def finite_parts(
    checkpoint: Checkpoint, name: str, parts: Iterable[mx.array]
) -> Iterator[mx.array]:
    """The parts of a table. MisError where one holds NaN or infinity."""
    for rows in parts:
        refuse_not_numbers(checkpoint.path, name, rows)
        yield rows
        del rows  # before the next are read


def refuse_beyond(folder: Path, name: str, packed: Sequence[mx.array]) -> None:
    """MisError where scales or biases are beyond the type that they are stored in."""
    for array in packed:
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise MisError(f"{folder}: {name}: {rounding.BEYOND}")


def weight_of(packed: rounding.Packed, kind: Format, dtype: mx.Dtype) -> mx.array:
    """The matrix (out, in) that an affine one stands for, in `dtype` and evaluated.

    Made part by part, as `rounding.value_parts` says.
    """
    parts = []
    for values in rounding.value_parts(packed, kind.group, kind.bits):
        part = values.astype(dtype)
        stream.evaluate_now(part)
        parts.append(part)
    weight = mx.concatenate(parts)
    stream.evaluate_now(weight)
    return weight
