"""Mend a pruned student before training: refit each block's down_proj to the teacher's stream, in closed form.

Teacher and student march side by side, one block of each in memory. Student block j (teacher layer k, next
kept layer k') learns to deliver what the teacher has at the entrance of k': so the neurons cut from k and
the blocks dropped between k and k' are made up for, as far as one matrix can. Sequential: each block sees
the mended stream of the ones before it. Related: FLAP and ReplaceMe (arXiv 2505.02819), which fuse a
linear map into down_proj; here the fit is per block, ridge-regularised and weighted per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.reconstruction import NormalEquations
from mis_mlx.model import load, stream
from mis_mlx.types import Checkpoint, Keep

RIDGE = 0.1


def reconstruct(
    teacher: Checkpoint, student: Checkpoint, keep: Keep, batches: Sequence[mx.array], ridge: float = RIDGE
) -> tuple[dict[str, mx.array], list[float]]:
    """({weight name: new down_proj (D, F) float32}, error left per block as a share) for token ids [(B, T)].

    Tokens are weighted by 1 / rms of the teacher's stream, because the next norm divides by it; without
    that the first token of a window, a hundred times longer than the rest, would be all that counts.
    """
    dtype = load.compute_dtype()
    channels = keep.kept.get((-1, "hidden"))
    columns = None if channels is None else mx.array(list(channels))
    big, small = stream.Stream(teacher, dtype), stream.Stream(student, dtype)
    target, hidden = big.embed(batches), small.embed(batches)
    marching = big.blocks()
    last = big.layers
    passed = 0  # teacher blocks that `target` has been through
    mended: dict[str, mx.array] = {}
    left: list[float] = []
    for j, block in small.blocks():
        entrance = keep.layers[j + 1] if j + 1 < len(keep.layers) else last
        for _, teacher_block in marching:
            big.through(teacher_block, target)
            passed += 1
            if passed == entrance:
                break
        wanted = target if columns is None else [mx.take(t, columns, axis=-1) for t in target]
        fit, inputs, hidden = _fit(block, small.args, hidden, wanted)
        update, error = fit.solve(ridge)
        change = mx.array(update.astype(np.float32))
        name = f"model.layers.{j}.mlp.down_proj.weight"
        mended[name] = block.mlp.down_proj.inner.weight.astype(mx.float32) + change
        hidden = [h + (a @ change.T.astype(a.dtype)).astype(h.dtype) for h, a in zip(hidden, inputs, strict=True)]
        stream.settle(hidden, mended[name])
        left.append(error)
    return mended, left


def _fit(
    block: nn.Module, args: Any, hidden: Sequence[mx.array], wanted: Sequence[mx.array]
) -> tuple[NormalEquations, list[mx.array], list[mx.array]]:
    """Sums for one block; also what went into its down_proj and what came out of the block, per batch."""
    block.mlp.down_proj = stream.Tap(block.mlp.down_proj)
    outputs, fit = wanted[0].shape[-1], None
    seen, out = [], []
    for into, want in zip(hidden, wanted, strict=True):
        out.append(block(into, load.mask(args, block, into)))
        seen.append(block.mlp.down_proj.take())
        stream.settle(out[-1], seen[-1])
        fit = fit or NormalEquations(seen[-1].shape[-1], outputs)
        goal = want.astype(mx.float32).reshape(-1, outputs)
        missing = goal - out[-1].astype(mx.float32).reshape(-1, outputs)
        weight = 1.0 / mx.maximum(mx.sqrt(mx.square(goal).mean(axis=-1)), 1e-6)
        fit.add(seen[-1].reshape(-1, seen[-1].shape[-1]), missing, weight)
    assert fit is not None
    return fit, seen, out
