"""The pruned folder: of every tensor of the teacher the rows and columns that are kept; of the
residual stream ranked channels, or the directions in which it moves, after a rotation.

The rotated model is an ordinary one: RMSNorm does not notice a rotation once its gain is folded
into the matrices that read behind it (SliceGPT, arXiv 2401.15024, has a basis and skip matrices for
each block; here all share one).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mis_mlx.models import arch, experts, families, load, model_writer, policy, stream
from mis_mlx.models.config import Shape, ffn_size, shape_of
from mis_mlx.storage.files import Files
from mis_mlx.storage.safetensors import InParts, Tensor
from mis_mlx.types import Checkpoint, KeptUnits

# axis -> modules whose weights have a row for each unit of it (and biases a number), and those with
# a column for each
CUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ffn": (arch.READERS["norm2"][1], arch.READERS["ffn"][1]),
    "heads": (("q_proj",), arch.READERS["heads"][1]),
    "kv_heads": (("k_proj", "v_proj"), ()),
    "hidden": (
        ("o_proj", "down_proj", "norm", "input_layernorm", "post_attention_layernorm"),
        (*arch.READERS["norm1"][1], *arch.READERS["norm2"][1], "embed_tokens", "lm_head"),
    ),
}
FINAL = f"{load.NORM}weight"
HEAD = "lm_head.weight"
# behind which READERS read the stream
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


@dataclass(frozen=True)
class Rotation:
    """Directions of the residual stream that stay, and what calibration saw of them. float64.

    basis (D, d): orthonormal columns, by falling share of the stream. energy: {name of a norm's
    weight: the share of the stream's square that the d columns hold there}.
    """

    basis: np.ndarray
    energy: Mapping[str, float]


Directions = Callable[[int], Rotation]  # for a cut to so many channels


def _entering(
    checkpoint: Checkpoint, batches: stream.Batches, hidden: stream.Hidden
) -> Iterator[tuple[str, mx.array]]:
    """Norm by norm, in one streamed pass: (its weight's name, float32 tokens (n, D) that enter it,
    over their rms).
    """
    source = stream.Stream(
        checkpoint, policy.compute_dtype(checkpoint), direct=not isinstance(hidden, list)
    )
    hidden = source.embed(batches, hidden)
    for i, block in source.blocks():
        for name in NORMS.values():
            block[name] = stream.InputRecorder(block[name])
        for b, into in enumerate(hidden):
            out = source.run(i, block, b, into)
            seen = [_even(block[name].take()) for name in NORMS.values()]
            stream.evaluate_now(out, seen)
            hidden[b] = source.finite(out) if b == 0 else out
            for name, tokens in zip(NORMS.values(), seen, strict=True):
                yield f"model.layers.{i}.{name}.weight", tokens
    for h in hidden:
        yield FINAL, _even(h)


def _even(x: mx.array) -> mx.array:
    """(B, T, D) -> (B T, D) float32, mean square 1 each; a token of zeros stays zeros."""
    x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return x * mx.rsqrt(mx.maximum(mx.square(x).mean(axis=-1, keepdims=True), 1e-30))


def turned(basis: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """The same subspace (D, d) in the coordinates in which diag(`gain`), within it, is diagonal
    again.
    """
    _, turn = np.linalg.eigh(basis.T @ (gain[:, None] * basis))
    return basis @ turn


def directions(
    teacher: Checkpoint, batches: stream.Batches, hidden: Callable[[], stream.Hidden] = list
) -> Directions:
    """The principal directions of what enters all norms over token ids [(B, T)], all norms alike;
    for a tied head `turned` for the last norm's gain.

    Two streamed passes: the second sees how much of each norm's input they hold. Products of one
    batch are float32, sums over batches float64. hidden: makes a place for the hidden states of a
    pass.
    """
    moments = np.zeros((shape_of(teacher.config).hidden,) * 2)
    for _, x in _entering(teacher, batches, hidden()):
        moments += np.asarray(x.T @ x)
    basis = np.ascontiguousarray(np.linalg.eigh(moments)[1][:, ::-1])  # by falling eigenvalue
    turn = mx.array(basis.astype(np.float32))
    held: dict[str, np.ndarray] = {}
    for name, x in _entering(teacher, batches, hidden()):
        held[name] = held.get(name, 0.0) + np.array(mx.square(x @ turn).sum(axis=0), np.float64)

    def kept(size: int) -> Rotation:
        some = basis[:, :size]
        if shape_of(teacher.config).tied:
            some = turned(some, np.array(load.dense(teacher, FINAL).astype(mx.float32), np.float64))
            some = some[:, np.argsort(-np.einsum("ij,ij->j", some, moments @ some), kind="stable")]
        return Rotation(
            some,
            {name: float((square / square.sum())[:size].sum()) for name, square in held.items()},
        )

    return kept


def rotated(teacher: Checkpoint, rotation: Rotation) -> Callable[[str], mx.array]:
    """name -> the teacher's tensor, float32, in the d coordinates of `rotation` instead of its D
    channels.

    Norms get one gain for all coordinates, sqrt(D energy / d): the rms of a cut stream is over d
    numbers instead of D. Gains go into what reads behind the norm; with d = D and an untied head
    the function is the teacher's, to rounding. A tied head cannot take the last gain, for the
    embedding also writes the stream: there the last norm keeps diag(Q^T diag(gain) Q), all of the
    gain that stays within the subspace when the basis is `turned` for it.
    """
    inner, size = rotation.basis.shape
    q = mx.array(rotation.basis.astype(np.float32))
    tied = shape_of(teacher.config).tied

    def whole(name: str) -> mx.array:
        return load.dense(teacher, name).astype(mx.float32)

    def tensor(name: str) -> mx.array:
        block = name.rsplit(".", 3)[0]
        (module, kind) = name.split(".")[-2:]
        before = next(
            (f"{block}.{n}.weight" for axis, n in NORMS.items() if module in arch.READERS[axis][1]),
            FINAL,
        )
        if name in rotation.energy:
            gain = whole(name) @ mx.square(q) if tied and name == FINAL else mx.ones((size,))
            return (inner * rotation.energy[name] / size) ** 0.5 * gain
        if kind == "weight" and (before != FINAL or name == HEAD):
            return (whole(name) * whole(before)) @ q
        if module in ("o_proj", "down_proj"):  # what writes into the stream
            return q.T @ whole(name)
        return whole(name) @ q if name == f"{load.EMBEDDING}weight" else whole(name)

    return tensor


def _cut(name: str, layer: int, before: Shape, keep: KeptUnits, weight: mx.array) -> mx.array:
    """The kept part of one teacher tensor: rows, of each of joined matrices, where an axis is
    written, else columns.
    """
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
            weight = mx.take(
                weight, mx.concatenate([indices + n for n in range(0, len(weight), size)]), axis=0
            )
        elif module in columns and kind == "weight":
            weight = mx.take(weight, indices, axis=1)
    return weight


def _side(teacher: Checkpoint, name: str, layers: Sequence[int]) -> Tensor:
    """The kept blocks' part of what makes per-layer inputs: columns of the table, rows of the
    projection.
    """
    width = teacher.config[families.family(teacher.config).per_layer]
    kept = mx.array([i * width + channel for i in layers for channel in range(width)])
    every = len(layers) == teacher.config["num_hidden_layers"]
    whole = model_writer.dense(teacher, name)
    if isinstance(whole, InParts):
        rows, _ = whole.spec[1]
        parts = whole.parts if every else (mx.take(part, kept, axis=1) for part in whole.parts)
        return InParts((whole.spec[0], (rows, len(layers) * width)), parts)
    is_norm = whole.ndim == 1
    return whole if is_norm or every else mx.take(whole, kept, axis=0)


def _mixed_cut(name: str, layer: int, before: Shape, keep: KeptUnits, weight: mx.array) -> mx.array:
    """The same of a tensor of a mixture: rows of the router are experts, neurons are an expert's
    own.
    """
    if (
        experts.is_router(name)
        and len(weight) == before.experts
        and (kept := keep.kept.get((layer, "experts")))
    ):
        return mx.take(weight, mx.array(kept), axis=0)
    first = (experts.expert_of(name) or 0) * before.ffn
    neurons = keep.kept.get((layer, "ffn"))
    if experts.expert_of(name) is None or neurons is None:
        return weight
    if (last := name.split(".")[-2] in ("down_proj", "w2")) and weight.ndim == 1:
        return weight
    return mx.take(
        weight,
        mx.array([n - first for n in neurons if first <= n < first + before.ffn]),
        axis=int(last),
    )


def write_student(
    teacher: Checkpoint,
    shape: Shape,
    keep: KeptUnits,
    out: Path,
    dtype: str,
    files: Files,
    directions: Callable[[], Directions] | None = None,
    tensor: Callable[[str], mx.array] | None = None,
) -> KeptUnits:
    """Commit the pruned model to the new folder `out`: what is kept. directions(): asked for where
    hidden is cut, but `keep` does not say by which channels; then it is by the rotation that they
    give. tensor(name): the teacher's tensor that is cut, where it is not the one on disk. Memory:
    the largest tensor, twice.
    """
    before = shape_of(teacher.config)
    if directions and shape.hidden < before.hidden and (-1, "hidden") not in keep.kept:
        rotation = directions()(shape.hidden)
        share = round(float(np.mean(list(rotation.energy.values()))), 4)
        kept = {**keep.kept, (-1, "hidden"): tuple(range(shape.hidden))}
        basis = rotation.basis.astype(np.float32)
        report = {**keep.report, "hidden_by": "pca", "hidden_energy": share}
        keep = replace(keep, kept=kept, report=report, basis=basis)
        tensor = rotated(teacher, rotation)
    config = arch.student_config(teacher.config, shape, keep.layers, dtype)
    whole = tensor or partial(load.dense, teacher)

    def take(name: str) -> Tensor:
        if name in arch.side_tensors(teacher.config):
            return _side(teacher, name, keep.layers)
        if (number := arch.block_of(name)) is None:
            return _cut(name, -1, before, keep, whole(name))
        layer = keep.layers[number]
        source = name.replace(f".layers.{number}.", f".layers.{layer}.")
        if (e := experts.expert_of(name)) is not None and (
            chosen := keep.kept.get((layer, "experts"))
        ):
            source = source.replace(f".experts.{e}.", f".experts.{chosen[e]}.")
        block = replace(before, ffn=ffn_size(teacher.config, layer))
        return _cut(source, layer, block, keep, whole(source))

    model_writer.write_model(
        config, take, teacher.path, out, dtype, files, model_writer.keep_files(keep)
    )
    return keep
