"""Loss-aware importance of everything that can be cut, from one streamed pass forwards and one
back.

What would KL(teacher || teacher without x) be? Its first-order Taylor term is zero, because at the
teacher itself the KL is at its minimum. The second-order one is half the Fisher information of a
gate that closes x. It is estimated with next tokens that the teacher itself draws
(models/passing/backward_pass): half the mean over tokens of (d log p(drawn) / d gate)^2, every
token having a gate of its own. Does not decide what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.importance import Key
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.backward_pass import BlockBackward, input_gradients
from mis_mlx.types import Checkpoint

# Where the gates stand: axis -> (part of the block, its module); of hidden channels, behind both
# norms.
GATES = {
    "ffn": ("mlp", "down_proj"),
    "heads": ("self_attn", "o_proj"),
    "norm1": ("", "input_layernorm"),
    "norm2": ("", "post_attention_layernorm"),
}


class _Gated(nn.Module):
    """`inner` with what goes in (or, `behind`, comes out) multiplied by a gate (B, T, units) from
    outside.
    """

    def __init__(self, inner: nn.Module, behind: bool):
        super().__init__()
        self.inner = inner
        self._behind = behind
        self.open = list[mx.array]()

    def __call__(self, x: mx.array) -> mx.array:
        return self._through(self.inner(x)) if self._behind else self.inner(self._through(x))

    def _through(self, x: mx.array) -> mx.array:
        gate = self.open[0]
        return (x.reshape(*gate.shape, -1) * gate[..., None]).reshape(x.shape)


def fisher(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    seed: int = 0,
    kept: stream.Hidden | None = None,
) -> dict[Key, np.ndarray]:
    """{(layer, axis): (units,)} in nats per token, for the axes ffn, heads and layers (one number)
    of every layer, and (-1, "hidden"), summed over all norms. Token ids [(B, T)].

    kept: a place for the inputs of all blocks, L * len(batches) arrays (B, T, D); default: memory.
    """
    shape = shape_of(checkpoint.config)
    found = dict[Key, np.ndarray]()
    args = load.model_args(checkpoint.config)

    def visit(i: int, block: nn.Module) -> BlockBackward:
        gated = {
            axis: _Gated((block[part] if part else block)[name], not part)
            for axis, (part, name) in GATES.items()
        }
        for axis, (part, name) in GATES.items():
            (block[part] if part else block)[name] = gated[axis]

        def each(inputs: BlockInputs, above: BlockOutputs) -> BlockInputs:
            below, squares = _back(
                args, block, gated=gated, shape=shape, x=inputs.hidden, above=above.hidden
            )
            for axis, square in squares.items():
                key = (-1, "hidden") if axis.startswith("norm") else (i, axis)
                found[key] = found.get(key, 0.0) + np.array(square, np.float64) / (2 * len(batches))
            return BlockInputs(below)

        return lambda inputs, above: [each(*of) for of in zip(inputs, above, strict=True)]

    input_gradients(checkpoint, batches, visit=visit, seed=seed, kept=kept)
    return found


def _back(
    args: Any,
    block: nn.Module,
    gated: dict[str, _Gated],
    shape: Shape,
    x: mx.array,
    above: mx.array,
) -> tuple[mx.array, dict[str, mx.array]]:
    """(cotangent at the block's input x (B, T, D), {axis: mean over tokens of the gates' squared
    gradients}).
    """
    mask = load.mask(args, block, x)
    units = {
        "ffn": shape.ffn,
        "heads": shape.heads,
        "norm1": shape.hidden,
        "norm2": shape.hidden,
        "layers": 1,
    }

    def run(x: mx.array, *gates: mx.array) -> mx.array:
        for one, gate in zip(gated.values(), gates[:-1], strict=True):
            one.open = [gate]
        return x + gates[-1] * (block(x, mask) - x)

    ones = [mx.ones((*x.shape[:2], units[axis]), x.dtype) for axis in (*gated, "layers")]
    _, (below, *host_gradients) = mx.vjp(run, [x, *ones], [above])
    squares = {
        axis: mx.square(g.astype(mx.float32)).mean(axis=(0, 1))
        for axis, g in zip((*gated, "layers"), host_gradients, strict=True)
    }
    stream.evaluate_now(below, squares)
    return below, squares
