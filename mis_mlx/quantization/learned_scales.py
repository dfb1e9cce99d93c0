"""A packed model whose scales, biases and norms learn; integers, embedding and head stay."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.maths import rounding
from mis_mlx.maths.optimizer import Part
from mis_mlx.models import arch, load, model_writer, stream
from mis_mlx.quantization import packed_format
from mis_mlx.quantization.scale_state import ScaleState
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint


class TrainableQuantizedLinear(nn.Module):
    """A linear layer of values integer * scale + bias, whose scales and biases learn.

    Integers are (out, groups, group), scales and biases (out, groups) float32. added: the layer's
    own bias (out,), which belongs to no group and learns too; None where it has none.
    """

    def __init__(
        self,
        packed: rounding.Packed,
        kind: packed_format.Format,
        added: mx.array | None = None,
    ):
        super().__init__()
        rows = rounding.integers(packed[0], kind.group, kind.bits)
        groups = rows.reshape(len(rows), -1, kind.group)
        self._integers = groups  # underscore: not a parameter
        self.scales = packed[1].astype(mx.float32)
        self.biases = packed[2].astype(mx.float32)
        if added is not None:
            self.bias = added
        self._product = _grid_product(self._integers)

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out)."""
        output = self._product(x, self.scales, self.biases)
        if "bias" in self:
            output = output + self.bias
        return output


def _grid_product(integers: mx.array) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """The product of x (..., in) with a matrix of integers (out, groups, group) on its grid.

    As a function of x, scales and biases (out, groups). The way back makes the matrix again: kept
    from the way forward, all matrices of a block in float32 would be there at once. For the same
    reason a matrix waits for the array that it meets, and the gradient of the input for those of
    the grid: MLX may compute what is ready in any order, and much is ready early.
    """

    def matrix(scales: mx.array, biases: mx.array, met: mx.array) -> mx.array:
        ready_scales, ready_biases = mx.depends([scales, biases], [met])
        levels = integers.astype(mx.float32)
        weight = levels * ready_scales[..., None]
        weight = weight + ready_biases[..., None]
        return weight.reshape(len(weight), -1)

    @mx.custom_function
    def product(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return x @ matrix(scales, biases, x).T

    @product.vjp
    def product_vjp(
        primals: Sequence[mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        x, scales, biases = primals
        inputs = _rows(x)
        pulls = _rows(cotangent)
        of_matrix = pulls.T @ inputs
        of_matrix = of_matrix.reshape(integers.shape)
        of_biases = of_matrix.sum(axis=-1)
        of_values = of_matrix * integers.astype(mx.float32)
        of_scales = of_values.sum(axis=-1)
        waiting = mx.depends(cotangent, [of_scales, of_biases])
        of_input = waiting @ matrix(scales, biases, waiting)
        return of_input, of_scales, of_biases

    return product  # type: ignore[return-value]


def _rows(x: mx.array) -> mx.array:
    """(..., n) -> (rows, n)."""
    return x.reshape(-1, x.shape[-1])


class PackedStream(stream.Stream):
    """Streams a packed model whose scales, biases and norms learn, in float32.

    kept: how many blocks' integers stay in memory. state: holds what the blocks have learned, at
    first what is stored; a block that comes has these values. Whoever trains replaces them there.
    """

    def __init__(
        self, checkpoint: Checkpoint, kept: int, state: ScaleState, *, direct: bool = False
    ):
        super().__init__(checkpoint, mx.float32, direct=direct)
        self._formats = packed_format.formats(checkpoint)
        self._copies = True  # integers leave their slot: see `with_grids`
        self._state = state
        # of every block: what learns, {name in the block: shape}
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        for i, block in super().blocks():
            values = dict[str, mx.array](tree_flatten(block.trainable_parameters()))
            for name, array in values.items():
                values[name] = array * 1  # a copy: the block's memory is used again
            state.put(i, Part(values, {}))
            self.shapes.append({name: array.shape for name, array in values.items()})
        sizes = [sum(map(math.prod, named.values())) for named in self.shapes]
        self.most_learns = max(sizes)  # numbers that learn in a block, at the most
        self.resident_blocks = kept

    def opened(self, i: int, raw: stream.Arrays) -> nn.Module:
        """Block i, whose packed matrices are layers that learn."""
        block = super().opened(i, raw)
        return with_grids(block, f"model.layers.{i}.", raw, self._formats)

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """As `Stream.blocks`, with what the blocks have learned."""
        for i, block in super().blocks(order):
            block.update(tree_unflatten(list(self._state.values(i).items())))
            yield i, block
            # A block that stays does not keep values that are soon old.
            away = [(name, mx.array(0.0)) for name in self.shapes[i]]
            block.update(tree_unflatten(away))


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
        packed = tuple(raw[f"{path}.{part}"] for part in packed_format.PARTS)
        grid = TrainableQuantizedLinear(packed, kind, owner[matrix].get("bias"))
        owner[matrix] = grid
        # An array that stays lazy keeps its file open, or its slot.
        stream.evaluate_now(grid._integers, grid.scales, grid.biases)
    return block


def write_learned(
    checkpoint: Checkpoint, learned: Mapping[str, mx.array], out: Path, files: Files
) -> None:
    """Commit the folder `out`: `checkpoint` with what was learned, by name, in stored types."""
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
            if name in learned:
                tensor = learned[name].astype(tensor.dtype)
            yield name, tensor

    extra = {}
    costs = checkpoint.path / packed_format.SENSITIVITY
    if costs.is_file():
        extra[costs.name] = costs.read_bytes()
    model_writer.write_folder(
        checkpoint.config,
        specs,
        tensors(),
        source=checkpoint.path,
        out=out,
        files=files,
        extra=extra,
    )
