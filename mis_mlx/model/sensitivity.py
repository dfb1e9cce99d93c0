"""What each matrix costs in fewer bits: KL(model || model with that one rounded), from one pass forwards and one back.

At the model itself the KL is at its minimum, so its first-order term is zero; the second-order one is half the Fisher
information along the rounding error: half the mean over windows of <d log p(drawn tokens) / dW, error>^2, next
tokens drawn by the model (model/backward_pass). Costs of several matrices add up as far as the second order reaches.
Does not decide who gets which bits (maths/allocation). One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.maths import rounding
from mis_mlx.model import backward_pass, load, policy, stream
from mis_mlx.model.calibrate import READERS, TAPS
from mis_mlx.types import Checkpoint

PARTS = {name: TAPS[axis][0] for axis, names in READERS.items() for name in names}  # matrix -> part of the block


def costs(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    group: int,
    bits: Sequence[int],
    seed: int = 0,
    kept: stream.Hidden | None = None,
) -> dict[str, dict[int, float]]:
    """{module path: {bits: nats per token}} of every matrix of the blocks, in affine groups. Token ids [(B, T)].

    kept: as in `backward_pass.backwards`.
    """
    args, found = load.model_args(checkpoint.config), dict[str, dict[int, float]]()
    tokens = sum(b.size for b in batches)

    def visit(i: int, block: nn.Module) -> Callable[[mx.array, mx.array], mx.array]:
        dense = {name: load.dense_weight(block[part][name]) for name, part in PARTS.items()}
        packed = {name: [rounding.nearest(w, group, b) for b in bits] for name, w in dense.items()}
        stream.settle(dense, packed)

        def through(x: mx.array, above: mx.array) -> mx.array:
            def run(x: mx.array, *weights: mx.array) -> mx.array:
                for (name, part), w in zip(PARTS.items(), weights, strict=True):
                    block[part][name].weight = w
                return block(x, load.mask(args, block, x))

            stored = [block[part][name].weight for name, part in PARTS.items()]
            _, (below, *slopes) = mx.vjp(run, [x, *stored], [above])
            stream.settle(below, slopes)
            for (name, part), w, slope in zip(PARTS.items(), stored, slopes, strict=True):
                block[part][name].weight = w
                cost = found.setdefault(f"model.layers.{i}.{part}.{name}", dict.fromkeys(bits, 0.0))
                for b, parts in zip(bits, packed[name], strict=True):
                    error = rounding.values(parts, group, b) - dense[name]
                    along: Any = mx.square((slope.astype(mx.float32) * error).sum()).item()
                    cost[b] += along / (2 * tokens)
            return below

        return through

    backward_pass.backwards(checkpoint, batches, policy.compute_dtype(checkpoint), visit, seed, kept)
    return found
