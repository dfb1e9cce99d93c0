"""A student on disk while it is trained in parts: an ordinary float32 model folder, one file per block.

A block's file is replaced whole, by a rename, so the folder is a model at any moment."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx

from mis_mlx.models import load, model_writer
from mis_mlx.storage.files import Files, reported
from mis_mlx.storage.safetensors import spec_of, write_arrays
from mis_mlx.types import Checkpoint


def begin(source: Checkpoint, folder: Path, files: Files) -> Checkpoint:
    """The folder opened, made of `source` first if it is not there. Memory: the largest tensor."""
    if not folder.exists():
        config = {k: v for k, v in source.config.items() if not k.startswith("quantization")}
        config["torch_dtype"] = "float32"
        extra = model_writer.keep_files(model_writer.read_keep(source.path))
        take = partial(load.dense, source)
        model_writer.write_model(config, take, source.path, folder, "float32", files, extra, True)
    return load.open_checkpoint(folder)


def replace_block(parts: Checkpoint, i: int, weights: Mapping[str, mx.array], files: Files) -> None:
    """Put new float32 `weights` (names without `model.layers.N.`) in the place of block i's, durably."""
    prefix = f"model.layers.{i}."
    old = {name: t for name, t in parts.tensors.items() if name.startswith(prefix)}
    path = next(iter(old.values())).file
    new = {name: weights[name.removeprefix(prefix)] for name in sorted(old, key=lambda n: old[n].offset)}
    if {n for n, t in parts.tensors.items() if t.file == path} != set(old):
        raise ValueError(f"{path} holds more than block {i}")
    if any(spec_of(array) != ("F32", old[name].shape) for name, array in new.items()):
        raise ValueError(f"{path}: the new block {i} has other shapes or is not float32")
    nbytes = sum(t.nbytes for t in old.values())
    with reported(path.parent, f"block {i} of the student", nbytes), files.replacing(path) as temp:
        write_arrays(temp, new, files)
