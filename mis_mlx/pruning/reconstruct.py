"""Mend a pruned student before training: refit each block's down_proj to the teacher's stream, in closed form.

Teacher and student march side by side, one block of each in memory. Student block j (teacher layer k, next kept layer
k') learns to deliver what the teacher has at the entrance of k'. Each block sees the mended stream of those before it.
Related: FLAP and ReplaceMe (arXiv 2505.02819); here the fit is per block, ridge-regularised and weighted per token.

Of a mixture the routers learn to choose among the experts that are left: a block's experts are asked once, each for all
tokens; then its router alone is trained on what they said, towards the same goal (CerebrasResearch/reap, issue 3)."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths.reconstruction import NormalEquations
from mis_mlx.models import experts, families, load, stream
from mis_mlx.models.stream import Batches, Hidden
from mis_mlx.planner.compression_size import ROUTER_BYTES
from mis_mlx.types import Checkpoint, KeptUnits

HELD_OUT = 4
STEPS, LOOK = 60, 5  # of Adam on all tokens at once, and between looks at those held out
RATE = 5e-4  # of Adam, times the root mean square of the router's weights: ten times as much unlearns what is rare


def reconstruct(
    teacher: Checkpoint, student: Checkpoint, keep: KeptUnits, batches: Batches, direct: bool = False,
    spool: Callable[[], Hidden] | None = None, put: Callable[[str, mx.array], None] | None = None,
) -> tuple[dict[str, mx.array], list[float]]:  # fmt: skip
    """({weight name: new matrix (out, in) float32, if it changes}, share of error left per block), of ids [(B, T)].

    direct: read past the page cache. spool(): a place other than memory for hidden states; then a block's output is
    computed anew, and its inputs are not kept. put(name, matrix): takes what changes, which then is not returned."""
    columns, place = kept_columns(keep), spool or list[mx.array]
    big, small = (stream.Stream(model, direct=direct) for model in (teacher, student))
    target, own = big.embed(batches, place()), small.embed(batches, place())
    marching, mixed = groups(big, keep, target), bool(families.family(student.config).experts)
    mended, left = dict[str, mx.array](), list[float]()
    for _, (j, block) in zip(marching, small.blocks(), strict=True):  # the teacher's first
        if mixed:
            weight, error = heal(small, block, own, target)
        else:
            weight, error = refit(block, small.args, own, target, columns, onwards=not spool)
        if spool or mixed:
            small.through(block, own)
        block.clear()
        small.finite(own[0])
        if error < 1.0:
            (put or mended.__setitem__)(f"model.layers.{j}.{mended_name(student)}", weight)
        left.append(error)
    return mended, left


def mended_name(student: Checkpoint) -> str:
    """Of what changes in a block: the last matrix of its MLP, or the router of its experts."""
    of = families.family(student.config)
    return f"{of.mlp}.{of.router if of.experts else 'down_proj'}.weight"


def groups(teacher: stream.Stream, keep: KeptUnits, hidden: Hidden) -> Iterator[int]:
    """Take `hidden`, the teacher's embedding, through the blocks that each student block stands for, in place.

    Yields j where student block j has to arrive: at the entrance of the next kept layer, at last behind the last block.
    The first group begins with the first block, kept or not."""
    blocks, done = teacher.blocks(), 0
    for j, end in enumerate([*keep.layers[1:], teacher.layers]):
        for _, block in itertools.islice(blocks, end - done):
            teacher.through(block, hidden)
            block.clear()  # its weights are not to lie beside a fit
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
    del sums, out, into  # the last products are as large as the fit
    update, error = fit.judged(judge)
    weight = mx.array((np.array(linear.weight.astype(mx.float32), np.float64) + update).astype(np.float32))
    linear.weight = weight.astype(linear.weight.dtype)
    stream.evaluate_now(weight, linear.weight)
    change = mx.array(share * update.T.astype(np.float32)).astype(linear.weight.dtype)
    moved = lanes.each(lambda out, into: out + into @ change, hidden, entered) if onwards and error < 1.0 else ()
    for b, out in enumerate(moved):
        hidden[b] = out
    return weight, error


def heal(source: stream.Stream, block: nn.Module, hidden: Hidden, goals: Hidden) -> tuple[mx.array, float]:
    """Give the block the router that best takes `hidden` to `goals`, both [(B, T, D)]: (its rows (E, D) float32, the
    share of the error that they leave on batches held out). It stays as it is, and 1 is left, where none does better
    there. Tokens are weighted by 1 / rms of the goal, as in `refit`. Unused batches are not fetched."""
    of = families.family(source.checkpoint.config)
    part = block[of.mlp]
    router = part[of.router]
    old, kind = router.weight, hidden[0].dtype
    most = max(2, ROUTER_BYTES // (hidden[0].nbytes * len(old)))
    held_out = judges(len(hidden))
    sets = [[b for b in range(len(hidden)) if (b in held_out) == held][:most] for held in (False, True)]
    parts = [_Asked(source, block, [hidden[b] for b in of_set], [goals[b] for b in of_set]) for of_set in sets]

    def error(weight: mx.array, at: _Asked) -> mx.array:
        router.weight = weight.astype(kind)
        part.experts.said = at.said
        out = at.beside + part(at.inputs).reshape(at.beside.shape).astype(mx.float32)
        return mx.square((at.goal - out) * at.weight).sum()

    best = weight = old.astype(mx.float32)
    least = first = float(error(weight, parts[1]))
    adam = optim.Adam(RATE * float(mx.sqrt(mx.square(weight).mean())))
    for step in range(1, STEPS + 1):
        weight = adam.apply_gradients({"gate": mx.grad(error)(weight, parts[0])}, {"gate": weight})["gate"]
        stream.evaluate_now(weight, adam.state)
        if step % LOOK == 0 and (now := float(error(weight, parts[1]))) < least:
            best, least = weight, now
    part.experts.said, router.weight = None, best.astype(old.dtype) if least < first else old
    return best, least / first if first else 1.0


class _Asked:
    """What all experts of a block say to some batches' tokens, and what would be right. Rows (n, ...)."""

    def __init__(self, source: stream.Stream, block: nn.Module, hidden: Hidden, goals: Hidden):
        of = families.family(source.checkpoint.config)
        part, pairs = block[of.mlp], list[tuple[mx.array, mx.array]]()
        for x in hidden:
            pairs.append(experts.before(block, x, load.mask(source.args, block, x)))
            stream.evaluate_now(*pairs[-1])
        beside, inputs = zip(*pairs, strict=True)
        self.inputs = mx.concatenate([n.reshape(1, -1, n.shape[-1]) for n in inputs], axis=1)
        self.beside = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in beside]).astype(mx.float32)
        self.goal = mx.concatenate([g.reshape(-1, g.shape[-1]) for g in goals]).astype(mx.float32)
        self.weight = 1.0 / mx.maximum(mx.sqrt(mx.square(self.goal).mean(axis=-1, keepdims=True)), 1e-6)
        count = len(part[of.router].weight)
        every = mx.array(np.broadcast_to(np.arange(count), (1, len(self.goal), count)))
        self.said = part.experts.outputs([self.inputs], [every])[0]
        stream.evaluate_now(self.inputs, self.beside, self.goal, self.weight, self.said)
