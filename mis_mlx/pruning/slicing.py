"""The pruned folder: of every tensor of the teacher the rows and columns that are kept.

Of the residual stream ranked channels stay, or the directions in which it moves, after a rotation.
The rotated model is an ordinary one: RMSNorm does not notice a rotation once its gain is folded
into the matrices that read behind it (SliceGPT, arXiv 2401.15024, has a basis and skip matrices for
each block; here all share one).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision
from mis_mlx.models.architectures import arch, experts
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream, sweep
from mis_mlx.models.passing.pass_cost import (
    DENSE_ITEM,
    block_matrix,
    table_part,
    tensor_bytes,
)
from mis_mlx.models.writing import model_writer
from mis_mlx.storage.safetensors import InParts, Tensor
from mis_mlx.types import Checkpoint, KeptUnits

# axis -> (modules whose weights have a row for each unit of it, and biases a number; modules whose
# weights have a column for each)
CUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ffn": (arch.READERS["norm2"][1], arch.READERS["ffn"][1]),
    "heads": (("q_proj",), arch.READERS["heads"][1]),
    "kv_heads": (("k_proj", "v_proj"), ()),
    # of a short convolution: its kernel, and three joined matrices
    "channels": (("in_proj", "conv"), arch.readers_of("channels")),
    "hidden": (
        (*arch.WRITERS, "norm", "input_layernorm", "post_attention_layernorm"),
        (*arch.readers_of("norm1"), *arch.readers_of("norm2"), "embed_tokens", "lm_head"),
    ),
}
FINAL = f"{load.NORM}weight"
HEAD = "lm_head.weight"
# axis -> the norm behind which READERS read the stream
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
Dense = Callable[[str], Tensor]  # a teacher's tensor by its name


def _entering(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    hidden: stream.Hidden,
) -> Iterator[tuple[str, mx.array]]:
    """Norm by norm, in one streamed pass: (its weight's name, tokens (n, D) that enter it).

    Tokens are float32, over their rms.
    """
    # Spooled hidden states: the budget is small, and weights bypass the page cache, too.
    direct = not isinstance(hidden, list)
    source = stream.Stream(checkpoint, precision.dtype_of(checkpoint), direct=direct)
    hidden = source.embed(batches, hidden)
    places = {name: (name,) for name in NORMS.values()}
    for turn in source.sweep(hidden):
        for _, seen in turn.through(_even_windows, places):
            for name, tokens in seen:
                yield f"model.layers.{turn.number}.{name}.weight", tokens
    for final in hidden:  # which enter the last norm
        yield FINAL, _even(final)


def _even_windows(stack: sweep.Stack) -> list[tuple[str, mx.array]]:
    """(name of a norm, the tokens that enter it) of every window, as `_even`."""
    found = []
    for window in stack.apart():
        for name, array in window.taken.items():
            found.append((name, _even(array)))
    return found


def _even(x: mx.array) -> mx.array:
    """(B, T, D) -> (B T, D) float32, mean square 1 each; a token of zeros stays zeros."""
    x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    mean_square = mx.square(x).mean(axis=-1, keepdims=True)
    return x * mx.rsqrt(mx.maximum(mean_square, 1e-30))


def rotated_basis(basis: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """The same subspace (D, d) in coordinates that make diag(`gain`), within it, diagonal again."""
    within = basis.T @ (gain[:, None] * basis)
    _, turn = np.linalg.eigh(within)
    return basis @ turn


def principal_directions(
    teacher: Checkpoint,
    batches: stream.Batches,
    hidden: Callable[[], stream.Hidden] = list,
) -> Directions:
    """The principal directions of what enters all norms over token ids [(B, T)], all norms alike.

    For a tied head they are `rotated_basis` for the last norm's gain. Two streamed passes: the
    second sees how much of each norm's input they hold. Products of one batch are float32, sums
    over batches float64. hidden: makes a place for the hidden states of a pass.
    """
    size = shape_of(teacher.config).hidden
    moments = np.zeros((size, size))  # sums over tokens of x x^T
    for _, tokens in _entering(teacher, batches, hidden()):
        moments += np.asarray(tokens.T @ tokens)
    # Eigenvalues come in rising order; the columns stand by falling ones.
    _, vectors = np.linalg.eigh(moments)
    basis = np.ascontiguousarray(vectors[:, ::-1])
    del vectors
    # The second pass: by norm, the square of the stream along each direction (D,).
    turn = mx.array(basis.astype(np.float32))
    held: dict[str, np.ndarray] = {}
    for name, tokens in _entering(teacher, batches, hidden()):
        squares = np.array(mx.square(tokens @ turn).sum(axis=0), np.float64)
        held[name] = held.get(name, 0.0) + squares

    def kept(size: int) -> Rotation:
        columns = basis[:, :size]
        if shape_of(teacher.config).tied:
            gain = np.array(load.dense(teacher, FINAL).astype(mx.float32), np.float64)
            columns = rotated_basis(columns, gain)
            # Turned columns hold other shares than before, so they are sorted anew.
            shares = np.einsum("ij,ij->j", columns, moments @ columns)
            columns = columns[:, np.argsort(-shares, kind="stable")]
        energy = {}
        for name, square in held.items():
            energy[name] = float((square / square.sum())[:size].sum())
        return Rotation(columns, energy)

    return kept


def rotated_teacher(teacher: Checkpoint, rotation: Rotation) -> Dense:
    """name -> the teacher's tensor, float32, in the d coordinates of `rotation`, not D channels.

    Tables come in parts.

    Norms get one gain for all coordinates, sqrt(D energy / d): the rms of a cut stream is over d
    numbers instead of D. Gains go into what reads behind the norm; with d = D and an untied head
    the function is the teacher's, to rounding. A tied head cannot take the last gain, for the
    embedding also writes the stream: there the last norm keeps diag(Q^T diag(gain) Q), all of the
    gain that stays within the subspace when the basis is `rotated_basis` for it.
    """
    inner, size = rotation.basis.shape
    q = mx.array(rotation.basis.astype(np.float32))
    tied = shape_of(teacher.config).tied

    def dense(name: str) -> mx.array:
        return load.dense(teacher, name).astype(mx.float32)

    def tensor(name: str) -> Tensor:
        module, kind = name.split(".")[-2:]
        if name in rotation.energy:  # a norm
            gain = mx.ones((size,))
            if tied and name == FINAL:
                gain = dense(name) @ mx.square(q)
            return (inner * rotation.energy[name] / size) ** 0.5 * gain
        if name in load.TABLES:
            gain = mx.ones((inner,))
            if name == HEAD:  # which reads the stream behind the last norm
                gain = dense(FINAL)
            # its channels times gain (D,), in the coordinates of q (D, d)
            table = model_writer.table(teacher, name)
            return table.mapped(lambda part: (part * gain) @ q, columns=q.shape[1])
        norm = _norm_before(name)
        if kind == "weight" and norm != FINAL:  # reads the stream behind a norm
            return (dense(name) * dense(norm)) @ q
        if module in arch.WRITERS:  # writes into the stream
            return q.T @ dense(name)
        return dense(name)

    return tensor


def _norm_before(name: str) -> str:
    """The weight of the norm behind which a block's tensor reads the stream; else the last one."""
    block = name.rsplit(".", 3)[0]
    module = name.split(".")[-2]
    for axis, norm in NORMS.items():
        if module in arch.readers_of(axis):
            return f"{block}.{norm}.weight"
    return FINAL


def _cut(
    name: str,
    layer: int,
    before: Shape,
    keep: KeptUnits,
    *,
    weight: Tensor,
) -> Tensor:
    """The kept part of one teacher tensor.

    Rows, of each of joined matrices, where the module writes an axis, else columns.
    """
    module, kind = name.split(".")[-2:]
    if isinstance(weight, InParts):
        return _cut_table(weight, before, keep)
    if before.experts:
        return _mixed_cut(name, layer, before, keep, weight)
    for axis, (rows, columns) in CUTS.items():
        place = -1 if axis == "hidden" else layer
        kept = keep.kept.get((place, axis))
        unit = before.head_dim if axis.endswith("heads") else 1  # rows that go together
        # a short convolution is as wide as the stream
        field = "hidden" if axis == "channels" else axis
        size = getattr(before, field) * unit
        if kept is None or len(kept) * unit == size:
            continue
        indices = _numbers(kept, unit)
        if module in rows:
            # Joined matrices (q, k and v; gate and up) lie one below the other.
            starts = range(0, len(weight), size)
            weight = mx.take(weight, mx.concatenate([indices + n for n in starts]), axis=0)
        elif module in columns and kind == "weight":
            weight = mx.take(weight, indices, axis=1)
    return weight


def _cut_table(table: InParts, before: Shape, keep: KeptUnits) -> InParts:
    """The kept channels of a table, part by part."""
    kept = keep.kept.get((-1, "hidden"))
    if before.experts or kept is None or len(kept) == before.hidden:
        return table
    columns = _numbers(kept, 1)
    return table.mapped(lambda part: mx.take(part, columns, axis=1), columns=len(kept))


def _numbers(units: Iterable[int], size: int) -> mx.array:
    """The rows or columns of these units, each of `size` of them."""
    numbers = list[int]()
    for unit in units:
        numbers += range(unit * size, (unit + 1) * size)
    return mx.array(numbers, dtype=mx.int32)


def _side(teacher: Checkpoint, name: str, layers: Sequence[int]) -> Tensor:
    """The kept blocks' part of what makes per-layer inputs.

    Columns of the table, rows of the projection.
    """
    weight = model_writer.dense(teacher, name)
    all_stay = len(layers) == teacher.config["num_hidden_layers"]
    width = family(teacher.config).side_width
    kept = _numbers(layers, width)
    if isinstance(weight, InParts):  # the table, too large to be in memory whole
        if all_stay:
            return weight
        return weight.mapped(
            lambda part: mx.take(part, kept, axis=1),
            columns=len(kept),
        )
    if all_stay or weight.ndim == 1:  # a norm is of one block's width
        return weight
    return mx.take(weight, kept, axis=0)


def _mixed_cut(
    name: str,
    layer: int,
    before: Shape,
    keep: KeptUnits,
    weight: mx.array,
) -> mx.array:
    """The same of a tensor of a mixture.

    Rows of the router are experts, and neurons are an expert's own.
    """
    chosen = keep.kept.get((layer, "experts"))
    if chosen and experts.is_router(name) and len(weight) == before.experts:
        return mx.take(weight, mx.array(chosen), axis=0)
    neurons = keep.kept.get((layer, "ffn"))
    expert = experts.expert_of(name)
    if expert is None or neurons is None:
        return weight
    is_last = name.split(".")[-2] in ("down_proj", "w2")  # whose inputs are the neurons
    if is_last and weight.ndim == 1:
        return weight
    # Neurons of all experts are numbered one expert after another.
    first = expert * before.ffn
    own = [n - first for n in neurons if first <= n < first + before.ffn]
    return mx.take(weight, mx.array(own), axis=1 if is_last else 0)


def write_student(
    teacher: Checkpoint,
    shape: Shape,
    keep: KeptUnits,
    out: Path,
    *,
    dtype: str,
    directions: Callable[[], Directions] | None = None,
    tensor: Dense | None = None,
) -> KeptUnits:
    """Commit the pruned model to the new folder `out`: what is kept.

    directions(): asked for where hidden is cut, but `keep` does not say by which channels; then it
    is by the rotation that they give. tensor(name): the teacher's tensor that is cut, where it is
    not the one on disk. Memory: the largest matrix of a block twice, or some rows of a table.
    """
    before = shape_of(teacher.config)
    if directions and shape.hidden < before.hidden and (-1, "hidden") not in keep.kept:
        # The first d coordinates of the rotated teacher stay, as if they were ranked channels.
        rotation = directions()(shape.hidden)
        energy = list(rotation.energy.values())
        share = round(float(np.mean(energy)), 4)
        keep = replace(
            keep,
            kept={**keep.kept, (-1, "hidden"): tuple(range(shape.hidden))},
            report={**keep.report, "hidden_energy": share},
            basis=rotation.basis.astype(np.float32),
        )
        tensor = rotated_teacher(teacher, rotation)
    if tensor is None:
        tensor = partial(model_writer.dense, teacher)
    model_writer.write_model(
        arch.student_config(teacher.config, shape, keep.layers, dtype),
        partial(taken, teacher, keep, tensor),
        source=teacher.path,
        out=out,
        dtype=dtype,
        extra=model_writer.keep_files(keep),
    )
    return keep


def taken(
    teacher: Checkpoint,
    keep: KeptUnits,
    tensor: Dense,
    name: str,
) -> Tensor:
    """The student's tensor of this name, cut out of the teacher's."""
    if name in family(teacher.config).side_tensors():
        return _side(teacher, name, keep.layers)
    before = shape_of(teacher.config)
    number = arch.block_of(name)
    if number is None:
        return _cut(name, -1, before, keep, weight=tensor(name))
    # The student's block stands for a block, and its expert for an expert, of another number.
    layer = keep.layers[number]
    source = name.replace(f".layers.{number}.", f".layers.{layer}.")
    expert = experts.expert_of(name)
    chosen = keep.kept.get((layer, "experts"))
    if expert is not None and chosen:
        source = source.replace(f".experts.{expert}.", f".experts.{chosen[expert]}.")
    block = replace(before, ffn=family(teacher.config).ffn_size(layer))
    return _cut(source, layer, block, keep, weight=tensor(source))


def copying_bytes(t: ModelSize, *, rotation: bool) -> int:
    """The largest tensor on its way into the student.

    rotation: the hidden size is cut along directions, so it is turned in float32 before that.
    """
    nbytes = tensor_bytes(t)
    largest = block_matrix(t)
    if not t.packed:
        # What was read is gone before the cut part is converted (measured).
        nbytes = max(nbytes - 2 * largest, DENSE_ITEM * table_part(t))
    if rotation:
        nbytes += 2 * 4 * max(largest, table_part(t))
    return nbytes
