"""Write a model's weights in MLX's affine 4-bit format, one tensor at a time. Every matrix, or an error.

mlx-lm leaves a matrix unquantized without a word when its input size does not divide by the group; here
that is a sentence with the remedy. Does not recover what rounding costs: others may bring rounded matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.disk import checkpoint as protocol
from mis_mlx.disk.files import Files
from mis_mlx.disk.safetensors import Writer, spec_bytes
from mis_mlx.maths import rounding
from mis_mlx.model import arch, load, slice
from mis_mlx.types import Checkpoint, MisError

BITS = 4
WIDE_BITS = 8  # where 4 bits cost most: the embedding, which makes the logits too when it is tied, and `bridges`
Layout = Mapping[str, tuple[int, int]]  # {module path: (bits, group size)}
Rounded = Callable[[Layout], Iterator[Mapping[str, rounding.Packed]]]  # block by block, {module path: its matrix}


def bridges(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Blocks of a depth-pruned student that stand in for removed ones, and its last block.

    Their down_proj carries what reconstruction put there, and its outliers: on the default student the
    four of them cost 0.14 of the 0.28 nats of rounding, at 2 % of the bytes (benchmarks/rounding.py).
    """
    keep = slice.read_keep(checkpoint.path)
    if keep is None:
        return ()
    jumps = [j for j, (a, b) in enumerate(pairwise(keep.layers)) if b != a + 1]
    return (*jumps, len(keep.layers) - 1) if jumps else ()


def layout(config: Mapping[str, Any], group_size: int, wide: tuple[int, ...] = ()) -> dict[str, tuple[int, int]]:
    """{module path: (bits, group size)} of every matrix; down_proj of the blocks in `wide` gets 8 bits.

    MisError when a matrix cannot be cut into groups.
    """
    eight = {f"model.layers.{i}.mlp.down_proj" for i in wide} | {"model.embed_tokens", "lm_head"}
    plan = {}
    for name, shape in arch.tensors_of(config).items():
        if len(shape) != 2:
            continue
        if shape[1] % group_size:
            fits = [g for g in (64, 32) if all(d[1] % g == 0 for d in arch.tensors_of(config).values() if len(d) == 2)]
            remedy = f"use --q-group-size {fits[0]}" if fits else "prune that axis to a multiple of 32, or --quantize 0"
            raise MisError(f"{name} has rows of {shape[1]} weights, which {group_size} does not divide: {remedy}")
        path = name.removesuffix(".weight")
        plan[path] = (WIDE_BITS if path in eight else BITS, group_size)
    return plan


def write_quantized(
    checkpoint: Checkpoint, out: Path, group_size: int, files: Files, rounded: Rounded | None = None
) -> dict[str, Any]:
    """Commit the new folder `out`: packed weights, float16 scales and biases, config that stock mlx-lm reads.

    rounded: the matrices of the blocks, where somebody rounds them (model/gptq); default: to the nearest values.
    """
    if arch.is_quantized(checkpoint.tensors):
        raise MisError(f"{checkpoint.path} is quantized already: start from the unquantized model")
    plan = layout(checkpoint.config, group_size, bridges(checkpoint))
    settings: dict[str, Any] = {"group_size": group_size, "bits": BITS, "mode": "affine"}
    settings |= {path: {"group_size": g, "bits": b, "mode": "affine"} for path, (b, g) in plan.items() if b != BITS}
    config = {**checkpoint.config, "quantization": settings, "quantization_config": settings}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in arch.tensors_of(checkpoint.config).items():
        path = name.removesuffix(".weight")
        if path in plan:
            bits, group = plan[path]
            specs[name] = ("U32", (shape[0], shape[1] * bits // 32))
            specs |= {f"{path}.{part}": ("F16", (shape[0], shape[1] // group)) for part in ("scales", "biases")}
        else:
            specs[name] = (checkpoint.tensors[name].dtype, shape)

    def fill(folder: Path) -> None:
        writer = Writer(folder, specs, files)
        coming, block = rounded(plan) if rounded else None, dict[str, rounding.Packed]()
        for name in arch.tensors_of(checkpoint.config):
            path = name.removesuffix(".weight")
            if path not in plan:
                writer.add(name, _finite(checkpoint, name))
                continue
            while coming and arch.block_of(name) is not None and path not in block:
                block = dict(next(coming))
            parts = block.pop(path, None) or rounding.nearest(_finite(checkpoint, name), plan[path][1], plan[path][0])
            for part, array in zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=True):
                writer.add(part, array)
            mx.clear_cache()
        writer.close()
        files.write(folder / "config.json", json.dumps(config, indent=2).encode())
        slice.copy_tokenizer(checkpoint.path, folder)

    nbytes = sum(map(spec_bytes, specs.values()))
    protocol.commit_folder(out, fill, files, nbytes)
    count = sum(math.prod(s) for s in arch.tensors_of(checkpoint.config).values())
    return {"bits_per_weight": 8 * nbytes / count, "nbytes": nbytes, "group_size": group_size}


def _finite(checkpoint: Checkpoint, name: str) -> mx.array:
    weight = load.dense(checkpoint, name)
    if bad := (~mx.isfinite(weight)).sum().item():
        raise MisError(f"{checkpoint.path}: {name} holds {bad} values that are not numbers: download the model again")
    return weight
