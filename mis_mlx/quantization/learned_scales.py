"""A packed model whose scales, biases and norms learn; integers, embedding and head stay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import precision
from mis_mlx.maths import rounding
from mis_mlx.maths.optimizer import Part
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.pass_cost import block_matrix
from mis_mlx.models.writing import model_writer
from mis_mlx.quantization import packed_format
from mis_mlx.quantization.scale_state import LearnedState
from mis_mlx.storage import safetensors
from mis_mlx.types import Checkpoint

# Weights of a matrix whose scales learn that are there in float32, in four arrays of 64 MiB. A sum
# over slabs has other last bits than one over the whole.
LEARNED_AT_ONCE = 2**24


def product_bytes(m: ModelSize) -> int:
    """What the product with a matrix takes whose scales learn.

    Four arrays in float32: weights, their gradient, integers, and the product of these two. A large
    matrix is there in slabs.
    """
    return 4 * 4 * min(block_matrix(m), LEARNED_AT_ONCE)


class TrainableQuantizedLinear(nn.Module):
    """A linear layer of values integer * scale + bias, whose scales and biases learn.

    Integers are (out, groups, group), scales and biases (out, groups) float32. Under Metal's policy
    integers stay packed words, which a product unpacks; a CPU does that slowly, so there they are
    bytes. added: the layer's own bias (out,), which belongs to no group and learns too; None where
    it has none.
    """

    def __init__(
        self,
        packed: rounding.Packed,
        kind: packed_format.Format,
        added: mx.array | None = None,
    ):
        super().__init__()
        self._stored = packed[0]  # underscore: not a parameter
        self._kind = kind
        if not precision.keeps_packed():
            self._stored = rounding.unpacked(packed[0], kind.bits)
        self.scales = packed[1].astype(mx.float32)
        self.biases = packed[2].astype(mx.float32)
        if added is not None:
            self.bias = added
        self._product = _grid_product(self._stored, kind)

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out)."""
        output = self._product(x, self.scales, self.biases)
        if "bias" in self:
            output = output + self.bias
        return output

    def levels(self) -> mx.array:
        """The integers (out, groups, group) in float32, lazy."""
        return _levels(self._stored, self._kind)


def _levels(stored: mx.array, kind: packed_format.Format) -> mx.array:
    """Some rows of integers (rows, groups, group) in float32, lazy.

    stored: these rows in packed words, or as bytes.
    """
    if stored.dtype == mx.uint32:
        groups = stored.shape[1] * 32 // kind.bits // kind.group
        # A scale of 1 and a bias of 0 leave the integers as they are.
        ones = mx.ones((len(stored), groups))
        zeros = mx.zeros((len(stored), groups))
        stored = mx.dequantize(stored, ones, zeros, group_size=kind.group, bits=kind.bits)
    return stored.reshape(len(stored), -1, kind.group).astype(mx.float32)


def _grid_product(
    stored: mx.array, kind: packed_format.Format
) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """The product of x (..., in) with a matrix of integers (out, groups, group) on its grid.

    As a function of x, scales and biases (out, groups). stored: the integers, as of `_levels`. The
    way back makes the matrix again: kept from the way forward, all matrices of a block in float32
    would be there at once. For the same reason a matrix waits for the array that it meets, and the
    gradient of the input for those of the grid: MLX may compute what is ready in any order, and
    much is ready early. A large matrix is there some rows at a time, each slab after the one
    before.
    """

    def matrix(slab: slice, scales: mx.array, biases: mx.array, met: mx.array) -> mx.array:
        parts = [stored[slab], scales[slab], biases[slab]]
        rows, ready_scales, ready_biases = mx.depends(parts, [met])
        if rows.dtype == mx.uint32:
            # one kernel, which writes each weight once
            return mx.dequantize(
                rows, ready_scales, ready_biases, group_size=kind.group, bits=kind.bits
            )
        weight = _levels(rows, kind) * ready_scales[..., None]
        weight = weight + ready_biases[..., None]
        return weight.reshape(len(weight), -1)

    @mx.custom_function
    def product(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        outputs = list[mx.array]()
        for slab in _slabs(len(scales), x.shape[-1]):
            met = outputs[-1] if outputs else x
            outputs.append(x @ matrix(slab, scales, biases, met).T)
        return _joined(outputs, axis=-1)

    @product.vjp
    def product_vjp(
        primals: Sequence[mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        x, scales, biases = primals
        inputs = _rows(x)
        of_scales = []
        of_biases = []
        of_inputs = list[mx.array]()
        for slab in _slabs(len(scales), x.shape[-1]):
            pull = cotangent[..., slab]
            if of_inputs:
                pull = mx.depends(pull, [of_inputs[-1]])
            of_matrix = _rows(pull).T @ inputs
            of_matrix = of_matrix.reshape(len(of_matrix), -1, kind.group)
            of_biases.append(of_matrix.sum(axis=-1))
            rows = mx.depends(stored[slab], [of_biases[-1]])
            of_values = of_matrix * _levels(rows, kind)
            of_scales.append(of_values.sum(axis=-1))
            waiting = mx.depends(pull, [of_scales[-1], of_biases[-1]])
            part = waiting @ matrix(slab, scales, biases, waiting)
            if of_inputs:
                part = of_inputs[-1] + part
            of_inputs.append(part)
        # MLX's own products give a gradient in its input's type, and blocks that cast rely on it.
        of_input = of_inputs[-1].astype(x.dtype)
        return of_input, _joined(of_scales, axis=0), _joined(of_biases, axis=0)

    return product  # type: ignore[return-value]


def _slabs(rows: int, width: int) -> list[slice]:
    """The rows of a matrix (rows, width) that are there at a time."""
    step = max(1, LEARNED_AT_ONCE // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _joined(parts: Sequence[mx.array], axis: int) -> mx.array:
    """Parts one after the other along an axis; one alone as it is."""
    if len(parts) == 1:
        return parts[0]
    return mx.concatenate(list(parts), axis=axis)


def _rows(x: mx.array) -> mx.array:
    """(..., n) -> (rows, n)."""
    return x.reshape(-1, x.shape[-1])


class PackedStream(stream.Stream):
    """Streams a packed model whose scales, biases and norms learn, in float32.

    kept: how many blocks' integers stay in memory. state: holds what the blocks have learned, at
    first what is stored; a block that comes has these values. Whoever trains replaces them there.
    """

    def __init__(
        self, checkpoint: Checkpoint, kept: int, state: LearnedState, *, direct: bool = False
    ):
        super().__init__(checkpoint, mx.float32, direct=direct)
        self._formats = packed_format.formats(checkpoint)
        self._copies = True  # integers leave their slot: see `with_grids`
        self._state = state
        for i, block in super().blocks():
            values = dict[str, mx.array](tree_flatten(block.trainable_parameters()))
            for name, array in values.items():
                values[name] = array * 1  # a copy: the block's memory is used again
            state.put(arch.block_prefix(i), Part(values, {}))
        self.resident_blocks = kept

    def opened(self, i: int, raw: stream.Arrays) -> nn.Module:
        """Block i, whose packed matrices are layers that learn."""
        prefix = arch.block_prefix(i)
        inside = [path for path in self._formats if path.startswith(prefix)]
        block = load.block(self.checkpoint, i, self.args, self.dtype, raw=raw, without=inside)
        return with_grids(block, prefix, raw, self._formats)

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """As `Stream.blocks`, with what the blocks have learned."""
        for i, block in super().blocks(order):
            values = self._state.values(arch.block_prefix(i))
            block.update(tree_unflatten(list(values.items())))
            names = list(values)
            del values
            yield i, block
            # A block that stays does not keep values that are soon old.
            block.update(tree_unflatten([(name, mx.array(0.0)) for name in names]))


def with_grids(
    block: nn.Module,
    prefix: str,
    raw: Mapping[str, mx.array],
    formats: packed_format.Formats,
) -> nn.Module:
    """The block, whose packed matrices become layers that learn; their integers are evaluated.

    raw: the block's tensors as stored. prefix: of their names, and of the paths in `formats`.
    """
    modules = dict(block.named_modules())
    for path, kind in formats.items():
        if not path.startswith(prefix):
            continue
        inside, _, matrix = path.removeprefix(prefix).rpartition(".")
        owner = modules[inside]
        # Copies, for their memory is used again.
        packed = tuple(raw[f"{path}.{part}"] * 1 for part in packed_format.PARTS)
        grid = TrainableQuantizedLinear(packed, kind, owner[matrix].get("bias"))
        owner[matrix] = grid
        # An array that stays lazy keeps its file open, or its slot.
        stream.evaluate_now(grid._stored, grid.scales, grid.biases)
    return block


def write_learned(
    checkpoint: Checkpoint,
    learned: Callable[[str], mx.array | None],
    out: Path,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Commit the folder `out`: `checkpoint` with what was learned, in stored types.

    learned(name): a tensor of the whole model; None for one that did not learn. extra: as of
    `model_writer.write_folder`.
    """
    specs = {}
    for name, tensor in checkpoint.tensors.items():
        specs[name] = tensor.dtype, tensor.shape

    def tensors() -> Iterator[tuple[str, safetensors.Tensor]]:
        for name in specs:
            if name.startswith(arch.PER_LAYER):
                yield name, load.stored_parts(checkpoint, name)
                continue
            stored = safetensors.lazy(checkpoint.tensors, [name])
            tensor = stored[name]
            value = learned(name)
            if value is not None:
                tensor = value.astype(tensor.dtype)
            yield name, tensor

    extra = dict(extra)
    costs = checkpoint.path / packed_format.SENSITIVITY
    if costs.is_file():
        extra[costs.name] = costs.read_bytes()
    model_writer.write_folder(
        checkpoint.config,
        specs,
        tensors(),
        source=checkpoint.path,
        out=out,
        extra=extra,
    )
