"""Train a student that does not fit, one shard (some consecutive blocks) at a time, by the loss of the whole model.

The student is a folder of `models/model_writer.py`. A step goes through all blocks, streamed, and back as far as the
shard; only the shard's blocks have gradients and moments, and stay in memory. After some steps its files are replaced
and the next shard comes in, in a circle. The embedding, the last norm and the head are frozen."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.distillation import train_loop
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import host_losses, load, model_writer, stream
from mis_mlx.planner.recipe import Schedule
from mis_mlx.storage.checkpoint import sweep
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint, MisError, Step

VISIT = "visit.json"  # in the student's folder: the last visit that wrote, or began to write, its blocks
MicroBatch = tuple[Any, ...]  # tokens (B, T), learn (B * T,), and what else the loss wants
Loss = Callable[..., mx.array]  # (hidden (n, D), head (V, D), learn (n,), *what else) -> sum in nats
# (head, a step's micro-batches, which of them, its hidden (n, D)) -> (sum in nats, its gradient in hidden), evaluated
Slopes = Callable[[mx.array, Sequence[MicroBatch], int, mx.array], tuple[float, mx.array]]


class Sharded:
    """A student on disk, one shard of it in memory and trainable. `begin` or `restore` comes first.

    A visit is the `steps_per_shard` steps that one shard is trained, with an optimizer of its own; visit v is that of
    shard v modulo their number. room_bytes and direct are those of `stream.Stream`.

    What makes a resume exact: a checkpoint holds the shard of its visit, and every other block is on disk as it was
    then, as long as no later visit has written its blocks. A visit writes its number, then its blocks, and only then
    the next one begins. So each visit needs a checkpoint of its own: save at least every `steps_per_shard` steps; every
    half of that, and one damaged checkpoint can be done without at any time."""

    def __init__(
        self,
        student: Checkpoint,
        shard_layers: int,
        steps_per_shard: int,
        weight_decay: float,
        files: Files,
        room_bytes: int = 0,
        direct: bool = False,
    ):
        self._student, self._files = student, files
        self._shard_layers, self._steps_per_shard, self._weight_decay = shard_layers, steps_per_shard, weight_decay
        self._stream = partial(stream.Stream, student, mx.float32, room_bytes, direct)
        norm = load.final_norm(student, mx.float32)
        self._norm = stream.load_checked(norm, f"{student.path}: model.norm.")

    def begin(self) -> None:
        """Enter the first visit of a new run. MisError when the folder has been trained already."""
        self._check(-1)
        self._enter(0)

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The shard's weights and moments for a checkpoint, by checkpoint file."""
        return train_loop.arrays_of(self.shard, self.optimizer)

    def memory(self) -> dict[str, Any]:
        """What else a checkpoint needs, for its state.json."""
        sizes = {"shard_layers": self._shard_layers, "steps_per_shard": self._steps_per_shard}
        return {"visit": self.visit, **sizes, **self.optimizer.memory()}

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved, with its sizes of shard and visit. MisError when that is lost."""
        self._check(memory["visit"])
        self._shard_layers, self._steps_per_shard = memory["shard_layers"], memory["steps_per_shard"]
        self._enter(memory["visit"])
        train_loop.restore(self.shard, self.optimizer, arrays, memory)

    def _check(self, visit: int) -> None:
        """That no visit after `visit` wrote blocks. What a crash left half-written is swept."""
        sweep(self._student.path, self._files)
        path = self._student.path / VISIT
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else -1
        if written > visit:
            begun = f"the newest whole checkpoint is of visit {visit}" if visit >= 0 else "no checkpoint is whole"
            raise MisError(f"{self._student.path} holds blocks of visit {written}, but {begun}: start a new run")

    def _enter(self, visit: int) -> None:
        self._source = self._stream()  # a stream refuses files that changed since it was made
        layers, size = self._source.layers, self._shard_layers
        first = visit % -(-layers // size) * size
        self.visit, self.blocks = visit, range(first, min(first + size, layers))
        self.optimizer = GuardedAdamW(weight_decay=self._weight_decay)
        self.shard = nn.Module()  # the last shard's memory goes before the next one's is taken
        self.shard.layers = [load.block(self._student, i, self._source.args, mx.float32) for i in self.blocks]
        stream.load_checked(self.shard, f"{self._student.path}, from block {first} on: ")

    def end_step(self, number: int, last: bool) -> None:
        """After step `number` (from 1) and before its checkpoint: a visit, or the run, that is over goes to disk."""
        over = number % self._steps_per_shard == 0
        if over or last:
            self._files.replace_text(self._student.path / VISIT, json.dumps(self.visit))
            for i, block in zip(self.blocks, self.shard.layers, strict=True):
                model_writer.replace_block(self._student, i, dict(tree_flatten(block.parameters())), self._files)
        if over and not last:
            before = self.optimizer  # bad batches are so in whatever shard
            self._enter(self.visit + 1)
            self.optimizer.bad, self.optimizer.passed, self.optimizer.calm = before.bad, before.passed, before.calm

    def gradients(
        self, batches: Sequence[MicroBatch], loss: Loss, kept: stream.Hidden, slopes: Slopes | None = None
    ) -> tuple[float, float, dict[str, Any]]:
        """(loss per token in nats, tokens, gradients of the *sum* over tokens by `shard`) of one step, evaluated. kept:
        an empty list or spool. It gets the inputs (B, T, D) of the shard's first block and of all above it, batch by
        batch; on the way back their cotangents take their places. slopes: `loss` where numpy computes it."""
        n, top, gradients = len(batches), self._source.layers - 1, {}
        self._source.embed([tokens for tokens, *_ in batches], kept)
        for i, block in self._in_turn(range(top + 1)):
            if i == top:  # on and back in one go: the last block is not read twice, nor computed twice
                head = self._source.head().weight
                ends = [self._last if slopes else partial(self._end, loss, head, batch) for batch in batches]
                of_batch = partial(slopes, head, batches) if slopes else None
                total, gradients[i] = self._back(i, block, kept, ends, of_batch)
                del head, ends, of_batch
            elif i < self.blocks.start:
                self._source.through(block, kept)
            else:
                for _ in batches:
                    kept.extend(self._source.through(block, [kept[-n]]))
        for i, block in self._in_turn(range(top - 1, self.blocks.start - 1, -1)):
            _, gradients[i] = self._back(i, block, kept, [None] * n)
        tokens = max(float(sum(learn.sum() for _, learn, *_ in batches)), 1.0)
        return total / tokens, tokens, {"layers": [gradients[i] for i in self.blocks]}

    def _in_turn(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i) in `order`: the shard's from memory, the others streamed, with `Stream.blocks`' contract."""
        streamed = self._source.blocks([i for i in order if i not in self.blocks])
        for i in order:
            yield (i, self.shard.layers[i - self.blocks.start]) if i in self.blocks else next(streamed)
        next(streamed, None)  # takes the last one back

    def _end(self, loss: Loss, head: mx.array, batch: MicroBatch, out: mx.array) -> mx.array:
        """Loss of a micro-batch, in nats, from the last block's output (B, T, D)."""
        return loss(self._last(out), head, *batch[1:])

    def _last(self, out: mx.array) -> mx.array:
        """Final hidden states (B * T, D)."""
        return self._norm(out).reshape(-1, out.shape[-1])

    def _back(
        self,
        i: int,
        block: nn.Module,
        kept: stream.Hidden,
        ends: Sequence[Callable[[mx.array], mx.array] | None],
        slopes: Callable[[int, mx.array], tuple[float, mx.array]] | None = None,
    ) -> tuple[float, Any]:
        """All micro-batches back through block i, computed again: (sum of losses, gradients if in the shard). ends: for
        the last block, what makes a loss of its output; else its cotangent is in `kept`. slopes: of the b-th batch's
        final hidden states the loss and its gradient, where the ends make no more than these: the way back is laid out
        from a cotangent of zeros, whose memory is then filled."""
        weights = dict(tree_flatten(block.parameters())) if i in self.blocks else {}
        total, gradients = mx.array(0.0), None

        def run(end: Callable[[mx.array], mx.array] | None, x: mx.array, *values: mx.array) -> mx.array:
            block.update(tree_unflatten(list(zip(weights, values, strict=True))))
            out = block(x, load.mask(self._source.args, block, x))
            return end(out) if end else out

        for b, end in enumerate(ends):
            at = (i - self.blocks.start) * len(ends) + b
            above = mx.array(1.0) if end else kept[at + len(ends)]
            if slopes:
                above = mx.zeros((kept[at].shape[0] * kept[at].shape[1], kept[at].shape[2]))
            (out,), (below, *made) = mx.vjp(partial(run, end), [kept[at], *weights.values()], [above])
            if slopes:
                mx.eval(out, above)
                value, slope = slopes(b, out)
                host_losses.view(above)[:] = host_losses.view(slope)
                out = mx.array(value)
            gradients = made if gradients is None else [g + m for g, m in zip(gradients, made, strict=True)]
            total = total + out if end else total
            mx.eval(total, gradients)
            if i > self.blocks.start:  # below the shard nobody asks
                mx.eval(below)
                kept[at] = below
            del out, below, made, above
        block.update(tree_unflatten(list(weights.items())))  # `run` left tracers there
        return float(total), tree_unflatten(list(zip(weights, gradients or [], strict=True)))


def steps(
    student: Sharded,
    micro_batches: Callable[[int], Sequence[MicroBatch]],
    loss: Loss,
    schedule: Schedule,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
    slopes: Slopes | None = None,
) -> Iterator[Step]:
    """Run steps `start` to `schedule.iters` as `train_loop.train` does; after the last one the folder is trained."""

    def gradients(step: int) -> tuple[float, float, Any]:
        return student.gradients(micro_batches(step), loss, [], slopes)

    for step in range(start, schedule.iters):
        done = train_loop.one_step(student.shard, gradients, student.optimizer, schedule, step, factor)
        student.end_step(done.number, done.number == schedule.iters)
        yield done
