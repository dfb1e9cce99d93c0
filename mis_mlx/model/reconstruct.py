"""Mend a pruned student before training: refit each block's down_proj to the teacher's stream, in closed form.

Teacher and student march side by side, one block of each in memory. Student block j (teacher layer k, next
kept layer k') learns to deliver what the teacher has at the entrance of k': so the neurons cut from k and
the blocks dropped between k and k' are made up for, as far as one matrix can. Sequential: each block sees
the mended stream of the ones before it. Related: FLAP and ReplaceMe (arXiv 2505.02819), which fuse a
linear map into down_proj; here the fit is per block, ridge-regularised and weighted per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.reconstruction import NormalEquations
from mis_mlx.model import load, policy, stream
from mis_mlx.types import Checkpoint, Keep

RIDGE = 0.1
Repair = Literal["ffn", "both", "scale"]


def reconstruct(
    teacher: Checkpoint,
    student: Checkpoint,
    keep: Keep,
    batches: Sequence[mx.array],
    ridge: float = RIDGE,
    repair: Repair = "ffn",
    sequential: bool = True,
) -> tuple[dict[str, mx.array], list[float]]:
    """({weight name: new matrix (out, in) float32}, error left per block as a share) for token ids [(B, T)].

    repair: as of `refit`; "both" refits o_proj to the teacher's stream in the middle of its block first.
    sequential: each block sees the mended stream of the ones before it; else the teacher's, as if it were alone.
    """
    columns = kept_columns(keep)
    big, small = (stream.Stream(model, policy.compute_dtype(model)) for model in (teacher, student))
    target, own = big.embed(batches), small.embed(batches)
    middle: list[mx.array] | None = [] if repair == "both" else None
    marching = groups(big, keep, target, middle)
    mended: dict[str, mx.array] = {}
    left: list[float] = []
    for j, block in small.blocks():
        into = own if sequential else [narrow(h, columns) for h in target]
        next(marching)
        stream.settle(into)
        if middle:
            wide, _ = refit(block, small.args, into, middle, columns, ridge, "attention")
            mended[f"model.layers.{j}.self_attn.o_proj.weight"] = wide
        wide, error = refit(block, small.args, into, target, columns, ridge, "scale" if repair == "scale" else "ffn")
        mended[f"model.layers.{j}.mlp.down_proj.weight"] = wide
        if sequential:
            small.through(block, own)
        left.append(error)
    return mended, left


def groups(
    teacher: stream.Stream, keep: Keep, hidden: stream.Hidden, middle: list[mx.array] | None = None
) -> Iterator[int]:
    """Take `hidden`, the teacher's embedding, through the blocks that each student block stands for, in place.

    Yields j when it is at the entrance of the next kept layer (at last: behind the last block), where student
    block j has to arrive. The first group begins with the first block, kept or not. middle: gets the stream
    (B, T, D) between attention and FFN of the group's kept block, batch by batch.
    """
    blocks, done = teacher.blocks(), 0
    for j, end in enumerate([*keep.layers[1:], teacher.layers]):
        for i, block in itertools.islice(blocks, end - done):
            if middle is None or i != keep.layers[j]:
                teacher.through(block, hidden)
                continue
            norm = block.post_attention_layernorm
            block.post_attention_layernorm = tap = stream.Tap(norm)
            middle.clear()
            for b in range(len(hidden)):
                hidden[b : b + 1] = teacher.through(block, [hidden[b]])
                middle.append(tap.take())
            stream.settle(middle)
            block.post_attention_layernorm = norm
        done = end
        yield j


def kept_columns(keep: Keep) -> mx.array | None:
    """Which channels (d,) of the teacher's stream the student has; a basis (D, d) of floats; or None: all."""
    if keep.basis is not None:
        return mx.array(np.asarray(keep.basis, np.float32))
    channels = keep.kept.get((-1, "hidden"))
    return None if channels is None else mx.array(list(channels))


def narrow(hidden: mx.array, columns: mx.array | None) -> mx.array:
    """The teacher's hidden states (B, T, D) in the student's channels: picked, or turned into them in float32."""
    if columns is None:
        return hidden
    if columns.ndim == 1:
        return mx.take(hidden, columns, axis=-1)
    return (hidden.astype(mx.float32) @ columns).astype(hidden.dtype)


def refit(
    block: nn.Module,
    args: Any,
    hidden: Sequence[mx.array],
    target: Sequence[mx.array],
    columns: mx.array | None,
    ridge: float,
    what: Literal["ffn", "attention", "scale"] = "ffn",
) -> tuple[mx.array, float]:
    """Give the block the down_proj that best takes `hidden` to `target`, the teacher's stream behind its group.

    (the new matrix (D, F) float32, error left as a share). attention: the o_proj that best takes it to the
    teacher's stream between attention and FFN. scale: down_proj times the best number, and nothing else.
    Tokens are weighted by 1 / rms of the teacher's stream, because the next norm divides by it; without that
    the first token of a window, a hundred times longer than the rest, would be all that counts.
    """
    part, name = ("self_attn", "o_proj") if what == "attention" else ("mlp", "down_proj")
    linear, norm = block[part][name], block.post_attention_layernorm
    block[part][name] = tap = stream.Tap(linear)
    block.post_attention_layernorm = middle = stream.Tap(norm)
    outputs, inputs = linear.weight.shape
    fit = NormalEquations(inputs, outputs)
    for into, want in zip(hidden, target, strict=True):
        out, between = block(into, load.mask(args, block, into)), middle.take()
        out = between if what == "attention" else out
        goal = narrow(want, columns).astype(mx.float32).reshape(-1, outputs)
        missing = goal - out.astype(mx.float32).reshape(-1, outputs)
        weight = 1.0 / mx.maximum(mx.sqrt(mx.square(goal).mean(axis=-1)), 1e-6)
        fit.add(tap.take().reshape(-1, inputs), missing, weight)
    block[part][name], block.post_attention_layernorm = linear, norm
    before = np.array(linear.weight.astype(mx.float32), np.float64)
    update, error = fit.along(before) if what == "scale" else fit.solve(ridge)
    weight = mx.array((before + update).astype(np.float32))
    linear.weight = weight.astype(linear.weight.dtype)
    stream.settle(weight, linear.weight)
    return weight, error
