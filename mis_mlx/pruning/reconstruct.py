"""Mend a pruned student before training: refit each block's down_proj to the teacher's stream, in closed form.

Teacher and student march side by side, one block of each in memory. Student block j (teacher layer k, next kept layer
k') learns to deliver what the teacher has at the entrance of k'. Each block sees the mended stream of those before it.
Related: FLAP and ReplaceMe (arXiv 2505.02819); here the fit is per block, ridge-regularised and weighted per token."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths.reconstruction import NormalEquations
from mis_mlx.models import load, policy, stream
from mis_mlx.models.families import family
from mis_mlx.models.stream import Batches, Hidden
from mis_mlx.pruning import router
from mis_mlx.types import Checkpoint, KeptUnits

HELD_OUT = 4


def reconstruct(
    teacher: Checkpoint, student: Checkpoint, keep: KeptUnits, batches: Batches, direct: bool = False
) -> tuple[dict[str, mx.array], list[float]]:
    """({weight name: new matrix (out, in) float32, if it changes}, share of error left per block), of ids [(B, T)]."""
    mended: dict[str, mx.array] = {}
    left: list[float] = []
    name = mended_name(student)
    for j, weight, error in by_block(teacher, student, keep, batches, direct=direct):
        if error < 1.0:
            mended[f"model.layers.{j}.{name}"] = weight
        left.append(error)
    return mended, left


def mended_name(student: Checkpoint) -> str:
    """Of what changes in a block: the last matrix of its MLP, or the router of its experts."""
    of = family(student.config)
    return f"{of.mlp}.{of.router if of.experts else 'down_proj'}.weight"


def by_block(
    teacher: Checkpoint, student: Checkpoint, keep: KeptUnits, batches: Batches,
    spool: Callable[[], Hidden] | None = None, direct: bool = False,
) -> Iterator[tuple[int, mx.array, float]]:  # fmt: skip
    """(number of a block, its `mended_name` (out, in) float32, share of error left) of every block, in turn. spool(): a
    place other than memory for hidden states; then a block's output is computed anew, and its inputs are not kept
    meanwhile. direct: read past the page cache."""
    columns, place = kept_columns(keep), spool or list[mx.array]
    big, small = (stream.Stream(model, policy.compute_dtype(model), direct=direct) for model in (teacher, student))
    target, own = big.embed(batches, place()), small.embed(batches, place())
    marching, mixed = groups(big, keep, target), bool(family(student.config).experts)
    for j, block in small.blocks():
        next(marching)
        if mixed:
            weight, error = router.heal(small, block, own, target, judges(len(target)))
        else:
            weight, error = refit(block, small.args, own, target, columns, onwards=not spool)
        if spool or mixed:
            small.through(block, own)
        small.finite(own[0])
        yield j, weight, error


def groups(teacher: stream.Stream, keep: KeptUnits, hidden: Hidden) -> Iterator[int]:
    """Take `hidden`, the teacher's embedding, through the blocks that each student block stands for, in place.

    Yields j where student block j has to arrive: at the entrance of the next kept layer, at last behind the last block.
    The first group begins with the first block, kept or not."""
    blocks, done = teacher.blocks(), 0
    for j, end in enumerate([*keep.layers[1:], teacher.layers]):
        for _, block in itertools.islice(blocks, end - done):
            teacher.through(block, hidden)
        done = end
        yield j


def judges(count: int) -> range:
    """Which of `count` windows are held out to judge a block by: every fourth, or the last of fewer."""
    every = min(HELD_OUT, count)
    return range(every - 1, count, every)


def kept_columns(keep: KeptUnits) -> mx.array | None:
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
    block: nn.Module, args: Any, hidden: Hidden, target: Hidden, columns: mx.array | None, onwards: bool = False
) -> tuple[mx.array, float]:
    """Give the block the down_proj that best takes `hidden` to `target`, the teacher's stream behind its group:
    (that matrix (D, F) float32, the share of the error that it leaves on windows held out). It stays as it is, and 1 is
    left, where none does better there: few tokens against a wide FFN are soon learned by heart.

    Tokens are weighted by 1 / rms of the teacher's stream, because the next norm divides by it: the first token of a
    window is a hundred times longer than the rest. onwards: `hidden` becomes the block's new output, for which the
    inputs of down_proj are kept and not computed again."""
    linear, share = block.mlp.down_proj, getattr(block, "residual_multiplier", 1.0)  # of its output that is added
    block.mlp.down_proj = tap = stream.InputRecorder(linear)
    outputs, inputs = linear.weight.shape
    fit, judge = NormalEquations(inputs, outputs), NormalEquations(inputs, outputs)
    entered = list[mx.array]()

    def products(into: mx.array, want: mx.array) -> tuple[mx.array, ...]:
        out = block(into, load.mask(args, block, into))
        goal = narrow(want, columns).astype(mx.float32).reshape(-1, outputs)
        missing = (goal - out.astype(mx.float32).reshape(-1, outputs)) / share
        weight = 1.0 / mx.maximum(mx.sqrt(mx.square(goal).mean(axis=-1)), 1e-6)
        into = tap.take()
        return *fit.products(into.reshape(-1, inputs), missing, weight), out, into

    held_out = judges(len(target))
    for b, (*sums, out, into) in enumerate(lanes.each(products, hidden, target)):
        (judge if b in held_out else fit).add(*sums)
        if onwards:
            hidden[b] = out
            entered.append(into)
    block.mlp.down_proj = linear
    before = np.array(linear.weight.astype(mx.float32), np.float64)
    update, error = fit.judged(judge)
    weight = mx.array((before + update).astype(np.float32))
    linear.weight = weight.astype(linear.weight.dtype)
    stream.evaluate_now(weight, linear.weight)
    change = mx.array(share * update.T.astype(np.float32)).astype(linear.weight.dtype)
    moved = lanes.each(lambda out, into: out + into @ change, hidden, entered) if onwards and error < 1.0 else ()
    for b, out in enumerate(moved):
        hidden[b] = out
    return weight, error
