"""What tests ask of several families of models alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import quantize
from mis_mlx.models.architectures import block_inputs
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass, stream
from mis_mlx.types import Checkpoint

TOKENS = mx.array([[5, 9, 300, 17, 44, 44, 8, 120, 3, 77, 201, 9]])


def streamed(model: Checkpoint, tokens: mx.array) -> mx.array:
    """Logits (B, T, V) in float32, block by block."""
    source = stream.Stream(model, mx.float32)
    return load.logits(source.head(), source.forward([tokens])[0])


def apart(a: mx.array, b: mx.array) -> float:
    """The largest difference."""
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def quantized(model: Path, out: Path, method: Any = "round", **more: Any) -> Checkpoint:
    """The model in groups of 32, as `quantize` leaves it in the folder `out`."""
    asked = quantize.Settings(
        model=str(model), mlx_path=str(out), q_group_size=32, q_method=method, **more
    )
    quantize.run(asked)
    return load.open_checkpoint(out)


def block_gradients(model: Checkpoint) -> Callable[[int, nn.Module], backward_pass.BlockBackward]:
    """`visit` of `backward_pass.input_gradients`: autodiff of one block and batch at a time."""
    args = family(model.config).model_args()

    def visit(i: int, block: nn.Module) -> backward_pass.BlockBackward:
        def each(inputs: BlockInputs, above: BlockOutputs) -> BlockInputs:
            def run(*arrays: mx.array) -> list[mx.array]:
                given = inputs.like(arrays)
                mask = load.mask(args, block, given.hidden)
                return block_inputs.run(block, given, mask).arrays(above)

            _, below = mx.vjp(run, inputs.arrays, above.arrays(above))
            mx.eval(below)
            return inputs.like(below)

        return lambda inputs, above: [each(*pair) for pair in zip(inputs, above, strict=True)]

    return visit
