"""A packed model, whole in memory, whose scales, biases and norms can learn; integers, embedding and head stay."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mis_mlx.maths import rounding
from mis_mlx.models import arch, load, model_writer, stream
from mis_mlx.quantization import packed_format
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint

PARTS = ("weight", "scales", "biases")


class TrainableQuantizedLinear(nn.Module):
    """A linear layer of values integer * scale + bias: integers (out, groups, group), the others (out, groups).

    added: the layer's own bias (out,), which is no group's and learns too; None where it has none."""

    def __init__(self, packed: rounding.Packed, kind: packed_format.Format, added: mx.array | None = None):
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
    """mlx-lm's Model of an affinely quantized folder, float32, evaluated: every matrix of the blocks can learn."""
    model = load.resident(checkpoint, mx.float32)
    for path, kind in packed_format.formats(checkpoint).items():
        if (layer := arch.block_of(path)) is None:
            continue
        *owners, name = path.split(".")[3:]
        owner = model.model.layers[layer]
        for step in owners:
            owner = owner[step]
        stored = safetensors.lazy(checkpoint.tensors, names := [f"{path}.{part}" for part in PARTS])
        owner[name] = grid = TrainableQuantizedLinear(tuple(stored[n] for n in names), kind, owner[name].get("bias"))
        stream.evaluate_now(grid._integers, grid.scales, grid.biases)  # whatever stays lazy keeps its file open
    for fixed in (model.model.embed_tokens, *([model.lm_head] if hasattr(model, "lm_head") else [])):
        fixed.freeze()
    return stream.load_checked(model, f"{checkpoint.path}: ")


def write(checkpoint: Checkpoint, model: nn.Module, out: Path, files: Files) -> None:
    """Commit the folder `out`: `checkpoint` with what the model has learned, in the types that it stores."""
    specs = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    learned = dict(tree_flatten(model.trainable_parameters()))

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for name in specs:
            stored = safetensors.lazy(checkpoint.tensors, [name])[name]
            yield name, learned[name].astype(stored.dtype) if name in learned else stored

    costs = checkpoint.path / packed_format.SENSITIVITY
    extra = {costs.name: costs.read_bytes()} if costs.is_file() else {}
    model_writer.write_folder(checkpoint.config, specs, tensors(), checkpoint.path, out, files, extra)
