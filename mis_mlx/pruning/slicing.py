"""The pruned folder: of every tensor of the teacher the rows and columns that are kept."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx

from mis_mlx.models import arch, experts, load, model_writer
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.pruning import rotate
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint, KeptUnits

Tensor = Callable[[str], mx.array]  # a model's, by name
# axis -> modules whose weights have a row for each unit of it (and biases a number), and those with a column for each
CUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ffn": (arch.READERS["norm2"][1], arch.READERS["ffn"][1]),
    "heads": (("q_proj",), arch.READERS["heads"][1]),
    "kv_heads": (("k_proj", "v_proj"), ()),
    "hidden": (("o_proj", "down_proj", "norm", "input_layernorm", "post_attention_layernorm"),
               (*arch.READERS["norm1"][1], *arch.READERS["norm2"][1], "embed_tokens", "lm_head")),
}  # fmt: skip


def _cut(name: str, layer: int, before: Shape, keep: KeptUnits, weight: mx.array) -> mx.array:
    """The kept part of one teacher tensor: rows, of each of joined matrices, where an axis is written, else columns."""
    module, kind = name.split(".")[-2:]
    if before.experts:
        return _mixed_cut(name, layer, before, keep, weight)
    for axis, (rows, columns) in CUTS.items():
        kept = keep.kept.get((layer if axis != "hidden" else -1, axis))
        unit = before.head_dim if axis.endswith("heads") else 1  # rows that go together
        size = getattr(before, axis) * unit
        if kept is None or len(kept) * unit == size:
            continue
        indices = mx.array([i * unit + u for i in kept for u in range(unit)], dtype=mx.int32)
        if module in rows:
            weight = mx.take(weight, mx.concatenate([indices + n for n in range(0, len(weight), size)]), axis=0)
        elif module in columns and kind == "weight":
            weight = mx.take(weight, indices, axis=1)
    return weight


def _mixed_cut(name: str, layer: int, before: Shape, keep: KeptUnits, weight: mx.array) -> mx.array:
    """The same of a tensor of a mixture: rows of the router are experts, neurons are an expert's own."""
    if experts.is_router(name) and len(weight) == before.experts and (kept := keep.kept.get((layer, "experts"))):
        return mx.take(weight, mx.array(kept), axis=0)
    first, neurons = (experts.expert_of(name) or 0) * before.ffn, keep.kept.get((layer, "ffn"))
    if experts.expert_of(name) is None or neurons is None:
        return weight
    own = mx.array([n - first for n in neurons if first <= n < first + before.ffn])
    if (last := name.split(".")[-2] in ("down_proj", "w2")) and weight.ndim == 1:
        return weight
    return mx.take(weight, own, axis=int(last))


def write_student(
    teacher: Checkpoint, shape: Shape, keep: KeptUnits, out: Path, dtype: str, files: Files,
    directions: Callable[[], rotate.Directions] | None = None, tensor: Tensor | None = None,
) -> KeptUnits:  # fmt: skip
    """Commit the pruned model to the new folder `out`: what is kept. directions(): asked for where hidden is cut, but
    `keep` does not say by which channels; then it is by the rotation that they give. tensor(name): the teacher's tensor
    that is cut, where it is not the one on disk. Memory: the largest tensor, twice."""
    before = shape_of(teacher.config)
    if directions and shape.hidden < before.hidden and (-1, "hidden") not in keep.kept:
        rotation = directions()(shape.hidden)
        keep, tensor = rotate.by(keep, rotation), rotate.rotated(teacher, rotation)
    config = arch.student_config(teacher.config, shape, keep.layers, dtype)
    whole = tensor or partial(load.dense, teacher)

    def take(name: str) -> mx.array:
        if (number := arch.block_of(name)) is None:
            return _cut(name, -1, before, keep, whole(name))
        layer = keep.layers[number]
        source = name.replace(f".layers.{number}.", f".layers.{layer}.")
        if (e := experts.expert_of(name)) is not None and (chosen := keep.kept.get((layer, "experts"))):
            source = source.replace(f".experts.{e}.", f".experts.{chosen[e]}.")
        return _cut(source, layer, before, keep, whole(source))

    model_writer.write_model(config, take, teacher.path, out, dtype, files, model_writer.keep_files(keep))
    return keep
