"""Round a model of any family of mlx-lm, whole in memory: GPTQ with taps on its linear layers.

For families that have no row in the table. Nothing is asked of the architecture but which layers
lie in which block, which their paths say. Each block is rounded on the outputs of the rounded ones
before it; mlx-lm's forward begins at the embedding each time, and MLX computes up to the taps.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.maths import gptq, reconstruction, rounding
from mis_mlx.models.opening.model_size import TEXT_BYTES
from mis_mlx.models.passing.stream import Batches
from mis_mlx.models.passing.sweep import recorded
from mis_mlx.models.writing import model_writer
from mis_mlx.quantization import packed_format, stage
from mis_mlx.quantization.packed_format import PARTS, USUAL_BITS, WIDE_BITS, Format, Formats
from mis_mlx.storage import safetensors

# Numbers of a window's hidden states that are alive beside the inputs of a block's layers, in
# widths of the widest of them
ALIVE = 8
BLOCK = re.compile(r".*?\.\d+(?=\.)")  # the part of a layer's path that names its block


def formats_of(model: nn.Module, group: int) -> dict[str, Format]:
    """The format of each matrix that is packed, by module path.

    4 bits, 8 for embeddings and what stands behind the blocks, or what mlx-lm's own rule says. Rows
    that are no multiple of the group stay as they are, which is said.
    """
    formats = {}
    kept = []
    rule: Any = getattr(model, "quant_predicate", None) or (lambda path, layer: True)
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, layer in leaves:
        asked = hasattr(layer, "to_quantized") and rule(path, layer)
        kind = Format(USUAL_BITS if BLOCK.match(path) else WIDE_BITS, group)
        if isinstance(asked, dict):
            kind = Format(asked["bits"], asked["group_size"])
        if asked and layer.weight.shape[-1] % kind.group:
            kept.append(path)
        elif asked:
            formats[path] = kind
    if kept:
        cli.say(
            f"{len(kept)} matrices stay as they are, because {group} does not divide their rows: "
            f"{', '.join(kept[:3])}"
        )
    return formats


def _blocks(model: nn.Module, formats: Formats) -> list[dict[str, nn.Module]]:
    """{module path: layer} of every block's matrices that GPTQ rounds, block by block."""
    layers = dict(model.named_modules())
    blocks: dict[str, dict[str, nn.Module]] = {}
    for path, kind in formats.items():
        block = BLOCK.match(path)
        if block and type(layers[path]) is nn.Linear and kind.bits < rounding.ENOUGH_BITS:
            blocks.setdefault(block[0], {})[path] = layers[path]
    return list(blocks.values())


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    """By mlx-lm's names."""
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def peak_bytes(model: nn.Module, formats: Formats, *, vocab: int, length: int) -> int:
    """What `write` holds, without the process around it.

    length: tokens of a window that GPTQ looks at; 0: nearest values, for which one matrix after the
    other is read. vocab: tokens, of an open tokenizer.
    """
    layers = dict(model.named_modules())
    packed = 0
    peaks = []
    parts = []
    for path, kind in formats.items():
        weight = layers[path].weight
        packed += int(kind.bits_per_weight * weight.size / 8)
        parts.append(4 * min(weight.size, rounding.PART) + weight.size)
        # the experts of a block are read one by one, then stacked
        peaks.append(packed + weight.nbytes * (weight.ndim - 1) + parts[-1])
    if not length:
        return max(peaks)
    for block in _blocks(model, formats):
        sides = [(layer.weight.shape[1], len(layer.weight)) for layer in block.values()]
        widths = [width for width, _ in sides]
        inputs = 4 * length * (sum(widths) + ALIVE * max(map(max, sides)))
        sums = sum(map(reconstruction.square_bytes, widths)) + 4 * max(widths) ** 2
        parts.append(inputs + sums + gptq.work_bytes(sides, fused=precision.compiles()))
    item = 4 if precision.policy() == "cpu" else 2
    weights = item * sum(array.size for array in _parameters(model).values())
    return TEXT_BYTES * vocab + weights + packed + max(parts)


def _inputs(model: nn.Module, paths: Iterable[str], tokens: mx.array) -> dict[str, list[mx.array]]:
    """The inputs of some layers, lazy, by path; of those that read the same the same arrays."""
    with recorded(model, {path: tuple(path.split(".")) for path in paths}) as recorders:
        model(tokens)
    return {path: recorder.seen for path, recorder in recorders.items()}


def _compensated(
    model: nn.Module, formats: Formats, batches: Batches, where: Path
) -> dict[str, rounding.Packed]:
    """{module path: packed matrix} of all blocks, whose layers then compute with them."""
    if precision.policy() == "cpu":
        model.set_dtype(mx.float32)
    for array in _parameters(model).values():  # one by one: what is read goes when it is cast
        mx.eval(array)
    rounded: dict[str, rounding.Packed] = {}
    for linears in cli.show_progress("block", _blocks(model, formats)):
        leaders: dict[tuple[int, ...], str] = {}
        readers: dict[str, dict[str, nn.Module]] = {}  # of one input, by the path of the first
        for path, inputs in _inputs(model, linears, batches[0]).items():
            same = (linears[path].weight.shape[1], *map(id, inputs))
            readers.setdefault(leaders.setdefault(same, path), {})[path] = linears[path]
        sums = {}
        for path in readers:
            width = linears[path].weight.shape[1]
            sums[path] = np.zeros((width, width), reconstruction.precision(width))
        for tokens in batches:
            seen = _inputs(model, readers, tokens)
            mx.eval(list(seen.values()))
            for path, inputs in seen.items():
                for array in inputs:
                    stage.add(sums[path], stage.summand(array), f"{where}: {path}")
        for path, some in readers.items():
            # pop: a sum (in, in) goes when its matrices are done
            rounded |= stage.rounded_readers(some, formats, sums.pop(path))
    return rounded


def write(
    folder: Path,
    opened: tuple[Mapping[str, Any], nn.Module],
    formats: Formats,
    batches: Batches,
    out: Path,
) -> dict[str, Any]:
    """Commit the new folder `out`, which stock mlx-lm reads: every matrix packed.

    opened: (config, model), which is packed, too. batches: token ids [(B, T)] that GPTQ looks at;
    none: nearest values. Returns the bits per weight and the bytes. MisError where weights are not
    numbers or too large.
    """
    config, model = opened
    types = {name: array.dtype for name, array in _parameters(model).items()}
    count = sum(array.size for array in _parameters(model).values())
    rounded = {}
    if batches:
        rounded = _compensated(model, formats, batches, folder)
    layers = dict(model.named_modules())
    weights = {path: layers.pop(path).weight for path in formats}
    layers.clear()
    nn.quantize(model, class_predicate=lambda path, _: path in formats and formats[path].settings)
    layers = dict(model.named_modules())
    for path, kind in cli.show_progress("matrix", formats.items()):
        weight = weights.pop(path)
        packed_format.refuse_not_numbers(folder, path, weight)
        parts = rounded.pop(path, None)
        if parts is None:
            # the matrices of all experts are one of more rows
            flat = packed_format.rounded_matrix(
                weight.reshape(-1, weight.shape[-1]), kind, fit=bool(batches)
            )
            parts = tuple(part.reshape(*weight.shape[:-1], -1) for part in flat)
        packed_format.refuse_beyond(folder, path, parts)
        layers[path].update(dict(zip(PARTS, parts, strict=True)))
        del weight, types[f"{path}.weight"]
    tensors = {}
    for name, array in _parameters(model).items():
        tensors[name] = array.astype(types.get(name, array.dtype))
    specs = {name: safetensors.spec_of(array) for name, array in tensors.items()}
    common = max(formats.values(), key=list(formats.values()).count)
    packing = common.settings
    packing |= {path: kind.settings for path, kind in formats.items() if kind != common}
    config = {**config, "quantization": packing, "quantization_config": packing}
    shards = safetensors.split_into_shards(specs)  # given: names are those of files already
    model_writer.write_folder(config, specs, tensors.items(), source=folder, out=out, shards=shards)
    nbytes = sum(map(safetensors.spec_bytes, specs.values()))
    return {"bits_per_weight": 8 * nbytes / count, "nbytes": nbytes, "group_size": common.group}
