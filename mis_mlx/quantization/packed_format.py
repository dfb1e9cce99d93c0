"""Write a model's weights in MLX's quantized formats, one tensor at a time: every matrix, or an
error. And a packed model whole in memory, whose scales, biases and norms can learn; integers,
embedding and head stay.

mlx-lm leaves a matrix that the group does not divide unquantized without a word; here that is an
error and a remedy.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.maths import rounding
from mis_mlx.models import arch, experts, families, load, model_writer, stream
from mis_mlx.planner.recipe import QuantizationConfig
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint, MisError

PARTS = ("weight", "scales", "biases")
# beside a mixed model: what every matrix would cost in every number of bits
SENSITIVITY = "sensitivity.json"
BITS = 4
# where 4 bits cost most: the embedding, which makes the logits too when it is tied, and `bridges`
WIDE_BITS = 8


class Format(NamedTuple):
    """How a matrix is packed; in mlx-lm's config under its path, where it is not the model's
    own.
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
        return self.bits + (32 if self.mode == "affine" else 8) / self.group

    def specs(self, path: str, *shape: int) -> dict[str, safetensors.Spec]:
        """{tensor's name: (type, shape)} of one packed matrix (rows, columns), or of as many as lie
        stacked.
        """
        *rows, columns = shape
        groups = *rows, columns // self.group
        kinds = {"scales": "F16", "biases": "F16"} if self.mode == "affine" else {"scales": "U8"}
        weight: dict[str, safetensors.Spec] = {
            f"{path}.weight": ("U32", (*rows, columns * self.bits // 32))
        }
        return weight | {f"{path}.{part}": (kind, groups) for part, kind in kinds.items()}


GROUPS = {"mxfp4": 32, "nvfp4": 16}  # of the formats that have but one
Layout = Mapping[str, Format]  # by module path
Rounded = Iterator[Mapping[str, rounding.Packed]]  # block by block, {module path: its matrix}


def blocks_after_removed(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Blocks of a depth-pruned student that stand in for removed ones, and its last block.

    Their down_proj carries what reconstruction put there, and its outliers: on the default student
    the four of them cost 0.14 of the 0.28 nats of rounding, at 2 % of the bytes
    (benchmarks/rounding.py).
    """
    keep = model_writer.read_keep(checkpoint.path)
    if keep is None:
        return ()
    jumps = [j for j, (a, b) in enumerate(pairwise(keep.layers)) if b != a + 1]
    return (*jumps, len(keep.layers) - 1) if jumps else ()


def of_mixture(config: Mapping[str, Any], how: QuantizationConfig) -> dict[str, Any]:
    """What of `how` is another for a mixture of experts: its weights are rounded, nothing is
    measured or learned.
    """
    if not families.family(config).experts:
        return {}
    if how.q_method != "round" or how.target_bpw is not None or how.q_iters:
        cli.say(
            "a mixture of experts is rounded to 4 bits: gptq, --target-bpw and --q-iters are for "
            "models without"
        )
    return {"q_method": "round", "target_bpw": None, "q_iters": 0}


def layout(
    config: Mapping[str, Any],
    group_size: int,
    wide: tuple[int, ...] = (),
    mode: rounding.Mode = "affine",
) -> dict[str, Format]:
    """The format of every matrix: 4 bits, or 8 affine ones for the embedding, the head, and
    down_proj of blocks `wide`.

    MisError when a matrix cannot be cut into groups.
    """
    eight = (
        {f"model.layers.{i}.mlp.down_proj" for i in wide}
        | {"model.embed_tokens", "lm_head"}
        | gates(config)
    )
    every = (
        (n, d)
        for n, d in arch.tensors_of(config, True).items()
        if len(d) > 1 and not n.endswith(".bias")
    )
    shapes = {n.removesuffix(".weight"): d for n, d in every if not experts.is_router(n)}
    four = Format(BITS, GROUPS.get(mode, group_size), mode)
    plan = {path: Format(WIDE_BITS, group_size) if path in eight else four for path in shapes}
    for path, (*_, columns) in shapes.items():
        if columns % (group := max(plan[path].group, 32)):  # MLX packs no rows of less
            fits = [g for g in (64, 32) if all(d[-1] % g == 0 for d in shapes.values())]
            remedy = (
                f"use --q-group-size {fits[0]}"
                if fits
                else "prune that axis to a multiple of 32, or --quantize 0"
            )
            raise MisError(
                f"{path}.weight has rows of {columns} weights, which {group} does not divide: "
                f"{remedy}"
            )
    return plan


def gates(config: Mapping[str, Any]) -> set[str]:
    """Module paths of the small matrices through which per-layer inputs come in: always in 8
    bits.
    """
    if not families.family(config).per_layer:
        return set()
    inside = ("per_layer_input_gate", "per_layer_projection")
    paths = {
        f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in inside
    }
    return paths | {"model.per_layer_model_projection"}


def write_quantized(
    checkpoint: Checkpoint,
    out: Path,
    plan: Layout,
    files: Files,
    rounded: Rounded | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Commit the new folder `out`: packed weights, float16 scales and biases, config that stock
    mlx-lm reads.

    rounded: the blocks' matrices, from quantization/stage; default: the nearest values. extra: more
    files, by name.
    """
    check_dense(checkpoint)
    inner = [kind for path, kind in plan.items() if arch.block_of(path) is not None]
    common = max(set(inner), key=lambda kind: (inner.count(kind), kind))
    settings = common.settings | {
        path: kind.settings for path, kind in plan.items() if kind != common
    }
    config = {**checkpoint.config, "quantization": settings, "quantization_config": settings}
    specs: dict[str, safetensors.Spec] = {}
    for name, shape in arch.tensors_of(checkpoint.config, True).items():
        path = name.removesuffix(".weight")
        kind = checkpoint.tensors[experts.one_by_one(name, checkpoint.config)[0]].dtype
        specs |= plan[path].specs(path, *shape) if path in plan else {name: (kind, shape)}
    model_writer.write_folder(
        config, specs, _packed(checkpoint, plan, rounded), checkpoint.path, out, files, extra
    )
    nbytes = sum(map(safetensors.spec_bytes, specs.values()))
    return {
        "bits_per_weight": 8 * nbytes / arch.params(checkpoint.config),
        "bits_per_block_weight": block_bits(checkpoint.config, plan),
        "nbytes": nbytes,
        "group_size": common.group,
    }


def _packed(
    checkpoint: Checkpoint, plan: Layout, rounded: Rounded | None
) -> Iterator[tuple[str, safetensors.Tensor]]:
    """(name, tensor) of everything in the folder to be written."""
    names = arch.tensors_of(checkpoint.config, True)
    block = dict[str, rounding.Packed]()
    for name in cli.counted("tensor", names, len(names)):
        path = name.removesuffix(".weight")
        if path not in plan:
            plain = [
                _finite(checkpoint, one) for one in experts.one_by_one(name, checkpoint.config)
            ]
            yield name, mx.stack(plain) if len(plain) > 1 else plain[0]
            continue
        if name == f"{arch.PER_LAYER}weight":
            yield from _table_in_parts(checkpoint, plan[path], path)
            continue
        while rounded and arch.block_of(name) is not None and path not in block:
            block = dict(next(rounded))
        parts = block.pop(path, None) or _nearest(checkpoint, plan[path], name)
        for part, array in zip((f"{path}.{part}" for part in PARTS), parts, strict=False):
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise MisError(f"{checkpoint.path}: {name}: {rounding.BEYOND}")
            yield part, array


def _table_in_parts(
    checkpoint: Checkpoint, how: Format, path: str
) -> Iterator[tuple[str, safetensors.Tensor]]:
    """The table of per-layer inputs rounded to nearest values, some rows at a time; its scales wait
    until the integers are written, a thirty-second of its numbers.
    """
    name = f"{path}.weight"
    shape = arch.tensors_of(checkpoint.config)[name]
    specs = how.specs(path, *shape)
    beside = list[list[mx.array]]()

    def integers() -> Iterator[mx.array]:
        for rows in load.dense_parts(checkpoint, name, "float32"):
            if bad := stream.not_numbers(rows):
                why = f"{name} holds {bad} values that are not numbers"
                raise MisError(f"{checkpoint.path}: {why}: download the model again")
            packed, *more = rounding.nearest(rows, how.group, how.bits, how.mode)
            stream.evaluate_now(packed, more)
            beside.append(more)
            yield packed

    yield name, safetensors.InParts(specs[name], integers())
    for part, arrays in zip(PARTS[1:], zip(*beside, strict=True), strict=False):
        yield f"{path}.{part}", mx.concatenate(list(arrays))


def _nearest(checkpoint: Checkpoint, how: Format, name: str) -> rounding.Packed:
    """A matrix, or those of all experts stacked, rounded to nearest values."""
    every = [
        _by_parts(_finite(checkpoint, one), how)
        for one in experts.one_by_one(name, checkpoint.config)
    ]
    return (
        every[0]
        if len(every) == 1
        else tuple(mx.stack(list(part)) for part in zip(*every, strict=True))
    )


def _by_parts(weight: mx.array, how: Format) -> rounding.Packed:
    """A matrix (out, in) rounded to nearest values, so many rows at a time: an embedding is most of
    a model.
    """
    parts = list[rounding.Packed]()
    step = max(1, rounding.PART // weight.shape[1])
    for at in range(0, len(weight), step):
        parts.append(rounding.nearest(weight[at : at + step], how.group, how.bits, how.mode))
        stream.evaluate_now(*parts[-1])
    return tuple(mx.concatenate(list(part)) for part in zip(*parts, strict=True))


def formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """The format of every packed matrix of a quantized model, by module path."""
    paths = (
        name.removesuffix(".scales") for name in checkpoint.tensors if name.endswith(".scales")
    )
    packings = ((path, load.packing(checkpoint, path)) for path in paths)
    return {path: Format(s["bits"], s["group_size"], s["mode"]) for path, s in packings}


def check_dense(checkpoint: Checkpoint) -> None:
    """MisError when the model is quantized already."""
    if arch.is_quantized(checkpoint.tensors):
        raise MisError(f"{checkpoint.path} is quantized already: start from the unquantized model")


def block_bits(config: Mapping[str, Any], plan: Layout) -> float:
    """Bits for a weight of the blocks' matrices, scales and biases included."""
    shapes = arch.tensors_of(config, True)
    sizes = {
        path: math.prod(shapes[f"{path}.weight"])
        for path in plan
        if arch.block_of(path) is not None
    }
    return sum(plan[path].bits_per_weight * n for path, n in sizes.items()) / sum(sizes.values())


def _finite(checkpoint: Checkpoint, name: str) -> mx.array:
    weight = load.dense(checkpoint, name)
    if bad := stream.not_numbers(weight):
        raise MisError(
            f"{checkpoint.path}: {name} holds {bad} values that are not numbers: download the "
            f"model again"
        )
    return weight


class TrainableQuantizedLinear(nn.Module):
    """A linear layer of values integer * scale + bias: integers (out, groups, group), the others
    (out, groups).

    added: the layer's own bias (out,), which is no group's and learns too; None where it has none.
    """

    def __init__(self, packed: rounding.Packed, kind: Format, added: mx.array | None = None):
        super().__init__()
        whole = rounding.integers(packed[0], kind.group, kind.bits)
        self._integers = whole.reshape(len(whole), -1, kind.group)  # underscore: not a parameter
        self.scales, self.biases = (a.astype(mx.float32) for a in packed[1:])
        if added is not None:
            self.bias = added

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out)."""
        weight = self._integers.astype(mx.float32) * self.scales[..., None] + self.biases[..., None]
        weight = weight.reshape(len(weight), -1).T
        return mx.addmm(self.bias, x, weight) if "bias" in self else x @ weight


def resident(checkpoint: Checkpoint) -> nn.Module:
    """mlx-lm's Model of an affinely quantized folder, float32, evaluated: every matrix of the
    blocks can learn.
    """
    model = load.resident(checkpoint, mx.float32)
    for path, kind in formats(checkpoint).items():
        if (layer := arch.block_of(path)) is None:
            continue
        inside, _, name = path.split(".", 3)[3].rpartition(".")
        owner = dict(model.model.layers[layer].named_modules())[inside]
        stored = safetensors.lazy(checkpoint.tensors, names := [f"{path}.{part}" for part in PARTS])
        owner[name] = grid = TrainableQuantizedLinear(
            tuple(stored[n] for n in names), kind, owner[name].get("bias")
        )
        # whatever stays lazy keeps its file open
        stream.evaluate_now(grid._integers, grid.scales, grid.biases)
    sides = {"embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection"}
    fixed_parts = [part for name, part in model.model.children().items() if name in sides]
    for fixed in (*fixed_parts, *([model.lm_head] if hasattr(model, "lm_head") else [])):
        fixed.freeze()
    return stream.load_checked(model, f"{checkpoint.path}: ")


def write_learned(checkpoint: Checkpoint, model: nn.Module, out: Path, files: Files) -> None:
    """Commit the folder `out`: `checkpoint` with what the model has learned, in the types that it
    stores.
    """
    specs = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    learned = dict(tree_flatten(model.trainable_parameters()))

    def tensors() -> Iterator[tuple[str, safetensors.Tensor]]:
        for name in specs:
            if name.startswith(arch.PER_LAYER):
                yield name, load.stored_parts(checkpoint, name)
                continue
            stored = safetensors.lazy(checkpoint.tensors, [name])[name]
            yield name, learned[name].astype(stored.dtype) if name in learned else stored

    costs = checkpoint.path / SENSITIVITY
    extra = {costs.name: costs.read_bytes()} if costs.is_file() else {}
    model_writer.write_folder(
        checkpoint.config, specs, tensors(), checkpoint.path, out, files, extra
    )
