"""Write the student's folder: the kept rows and columns of the teacher's tensors, one tensor at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx

from mis_mlx.models import arch, load, model_writer
from mis_mlx.models.config import Shape
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint, KeptUnits, PrunableAxis


def _cut(
    name: str, teacher_layer: int, spaces: Mapping[str, PrunableAxis], keep: KeptUnits, weight: mx.array
) -> mx.array:
    """The kept part of one teacher tensor: rows, of each of joined matrices, where an axis is written, else columns."""
    pattern = name.replace(f".layers.{teacher_layer}.", ".layers.{i}.")
    for axis, space in spaces.items():
        kept = keep.kept.get((teacher_layer if axis != "hidden" else -1, axis))
        if kept is None or len(kept) * space.unit == space.size:
            continue
        indices = mx.array([i * space.unit + u for i in kept for u in range(space.unit)], dtype=mx.int32)
        if pattern in space.writes or pattern in space.vectors:
            weight = mx.take(weight, mx.concatenate([indices + n for n in range(0, len(weight), space.size)]), axis=0)
        elif pattern in space.reads:
            weight = mx.take(weight, indices, axis=1)
    return weight


def write_student(
    teacher: Checkpoint,
    shape: Shape,
    keep: KeptUnits,
    out: Path,
    dtype: str,
    files: Files,
    tensor: Callable[[str], mx.array] | None = None,
) -> None:
    """Commit the pruned model to the new folder `out`. Memory: the largest tensor, twice.

    tensor(name): the teacher's tensor that is cut, where it is not the one on disk (rotated, merged)."""
    config = arch.student_config(teacher.config, shape, keep.layers, dtype)
    spaces = arch.spaces(teacher.config)
    whole = tensor or partial(load.dense, teacher)

    def take(name: str) -> mx.array:
        if (number := arch.block_of(name)) is None:
            return _cut(name, -1, spaces, keep, whole(name))
        layer = keep.layers[number]
        source = name.replace(f".layers.{number}.", f".layers.{layer}.")
        return _cut(source, layer, spaces, keep, whole(source))

    model_writer.write_model(config, take, teacher.path, out, dtype, files, model_writer.keep_files(keep))
