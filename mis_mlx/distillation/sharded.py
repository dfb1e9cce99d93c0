"""Train the blocks of a student by the loss of the whole model, each updated right when its
gradient is there.

A step goes through all blocks and back; what enters a block is kept, and the block computed again
on the way back. So no gradient but one block's is ever held, and moments have 8 bits. The blocks in
memory, which are trained, are a shard: all of them, or some consecutive ones of a student that
`model_writer.by_block` wrote, the others of which stream past. After some steps its files are
replaced and the next shard comes in, in a circle. Embedding, norm and head stay.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.distillation import train_loop
from mis_mlx.hardware import lanes
from mis_mlx.maths.optimizer import GuardedAdamW, global_norm
from mis_mlx.models import (
    arch,
    block_inputs,
    distributed,
    host_losses,
    load,
    model_writer,
    policy,
    stream,
)
from mis_mlx.models.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.planner.recipe import TrainingConfig
from mis_mlx.storage.checkpoint import sweep
from mis_mlx.storage.files import Files
from mis_mlx.storage.safetensors import Tensor
from mis_mlx.types import Checkpoint, MisError, Step

# in the student's folder: the last visit that wrote, or began to write, its blocks
VISIT = "visit.json"
Named = Mapping[str, mx.array]
MicroBatch = tuple[Any, ...]  # tokens (B, T), learn (B * T,), and what else the loss wants
# (hidden (n, D), head (V, D), learn (n,), *what else) -> sum in nats
Loss = Callable[..., mx.array]
# (head, a step's micro-batches, which of them, its hidden (n, D)) -> (sum in nats, its gradient in
# hidden), evaluated
Slopes = Callable[[mx.array, Sequence[MicroBatch], int, mx.array], tuple[float, mx.array]]


class Sharded:
    """A student whose shard is in memory and trainable. `begin` or `restore` comes first, `take`
    last.

    A visit is the `steps_per_shard` steps that one shard is trained, with optimizers of its own;
    visit v is that of shard v modulo their number. A shard of all blocks has one visit, and its
    folder is only read. room_bytes and direct are those of `stream.Stream`. Every block has a dog
    of its own: its gradient is clipped by its own norms, for no other is known when it is updated.
    A loss that is not a number skips the step in all of them.

    What makes a resume exact: a checkpoint holds the shard of its visit, and every other block is
    on disk as it was then, as long as no later visit has written its blocks. A visit writes its
    number, then its blocks, and only then the next one begins. So each visit needs a checkpoint of
    its own: save at least every `steps_per_shard` steps; every half of that, and one damaged
    checkpoint can be done without at any time.
    """

    def __init__(
        self,
        student: Checkpoint,
        shard_layers: int,
        steps_per_shard: int,
        weight_decay: float,
        files: Files,
        room_bytes: int = 0,
        direct: bool = False,
        adapters: Callable[[nn.Module], None] | None = None,
    ):
        self._student = student
        self._files = files
        self._adapters = adapters
        self._shard_layers = shard_layers
        self._steps_per_shard = steps_per_shard
        self._weight_decay = weight_decay
        self._stream = partial(stream.Stream, student, mx.float32, room_bytes, direct)
        self._norm = stream.load_checked(
            load.final_norm(student, mx.float32), f"{student.path}: model.norm."
        )

    def begin(self, mended: Named | None = None) -> None:
        """Enter the first visit of a new run. mended: in place of stored weights. MisError in a
        folder once trained.
        """
        self._check(-1)
        self._enter(0, mended)

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The shard's weights and moments for a checkpoint, by checkpoint file."""
        named = {
            f"{j}.{name}": a
            for j, o in enumerate(self.optimizers)
            for name, a in o.arrays().items()
        }
        return {"model": dict(tree_flatten(self.shard.parameters())), "optimizer": named}

    def memory(self) -> dict[str, Any]:
        """What else a checkpoint needs, for its state.json."""
        sizes = {"shard_layers": self._shard_layers, "steps_per_shard": self._steps_per_shard}
        return {"visit": self.visit, **sizes, "blocks": [o.memory() for o in self.optimizers]}

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved, with its sizes of shard and visit. MisError when that
        is lost.
        """
        self._check(memory["visit"])
        self._shard_layers = memory["shard_layers"]
        self._steps_per_shard = memory["steps_per_shard"]
        self._enter(memory["visit"], stored=arrays["model"])
        for j, (optimizer, remembered) in enumerate(
            zip(self.optimizers, memory["blocks"], strict=True)
        ):
            mine = {
                n.removeprefix(f"{j}."): a
                for n, a in arrays["optimizer"].items()
                if n.startswith(f"{j}.")
            }
            optimizer.restore(mine, remembered)
            mx.eval(optimizer.adamw.state)

    def take(self, name: str) -> Tensor:
        """A weight of the whole model, once it is trained."""
        i = arch.block_of(name)
        if i is None or i not in self.blocks:
            return model_writer.dense(self._student, name)
        inside, _, last = name.split(".", 3)[3].rpartition(".")
        owner = dict(self.shard.layers[i - self.blocks.start].named_modules())[inside]
        # a LoRALinear's weights with its adapter
        return (owner.fuse() if hasattr(owner, "fuse") else owner)[last]

    def _check(self, visit: int) -> None:
        """That no visit after `visit` wrote blocks. What a crash left half-written is swept."""
        sweep(self._student.path, self._files)
        path = self._student.path / VISIT
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else -1
        if written > visit:
            begun = (
                f"the newest whole checkpoint is of visit {visit}"
                if visit >= 0
                else "no checkpoint is whole"
            )
            raise MisError(
                f"{self._student.path} holds blocks of visit {written}, but {begun}: start a new "
                f"run"
            )

    def _enter(self, visit: int, mended: Named | None = None, stored: Named | None = None) -> None:
        self._source = self._stream()  # a stream refuses files that changed since it was made
        layers = self._source.layers
        size = self._shard_layers
        first = visit % -(-layers // size) * size
        self.visit = visit
        self.blocks = range(first, min(first + size, layers))
        self.optimizers = [
            GuardedAdamW(weight_decay=self._weight_decay, eight_bit=True) for _ in self.blocks
        ]
        self.shard = nn.Module()  # the last shard's memory goes before the next one's is taken
        kind = policy.compute_dtype(self._student) if self._adapters else mx.float32
        self.shard.layers = [
            load.block(self._student, i, self._source.args, kind) for i in self.blocks
        ]
        new = [(name.removeprefix("model."), w.astype(kind)) for name, w in (mended or {}).items()]
        self.shard.load_weights(new, strict=False)
        if self._adapters:
            self._adapters(self.shard)
        self.shard.load_weights(list((stored or {}).items()), strict=False)
        stream.load_checked(self.shard, f"{self._student.path}, from block {first} on: ")

    def _end_step(self, number: int, last: bool) -> None:
        """After step `number` (from 1) and before its checkpoint: a visit, or the run, that is over
        goes to disk.
        """
        over = number % self._steps_per_shard == 0
        part = len(self.blocks) < self._source.layers
        if part and (over or last):
            self._files.replace_text(self._student.path / VISIT, json.dumps(self.visit))
            for i, block in zip(self.blocks, self.shard.layers, strict=True):
                model_writer.replace_block(
                    self._student, i, dict(tree_flatten(block.parameters())), self._files
                )
        if part and over and not last:
            before = self.optimizers[0]  # bad batches are so in whatever shard
            self._enter(self.visit + 1)
            for o in self.optimizers:
                o.bad = before.bad
                o.passed = before.passed
                o.calm = before.calm

    def steps(
        self,
        micro_batches: Callable[[int], Sequence[MicroBatch]],
        loss: Loss,
        recipe: TrainingConfig,
        start: int = 0,
        factor: Callable[[int], float] = lambda step: 1.0,
        slopes: Slopes | None = None,
    ) -> Iterator[Step]:
        """Run steps `start` to `recipe.iters` as `train_loop.train` does."""

        def forth(step: int) -> tuple[Any, Any]:
            return (made := self.gradients(micro_batches(step), loss, slopes)), next(made)

        for step in range(start, recipe.iters):
            began, note, (back, (value, tokens)) = train_loop.awake(partial(forth, step))
            wind = factor(step)
            rate = recipe.rate(step)
            norms = list[float]()
            notes = dict[str, None]()
            for i, gradients in back:
                block, optimizer = self.shard.layers[j := i - self.blocks.start], self.optimizers[j]
                distributed.all_reduce_gradients(gradients)
                # From the first machine: whoever is led by the norm is led alike.
                norm = (
                    distributed.broadcast_json(partial(float, global_norm(gradients, lanes.lane)))
                    * wind
                    / tokens
                )
                how = value, norm, rate, step + 1, wind / tokens, lanes.lane
                said = optimizer.update(block, tree_unflatten(list(gradients.items())), *how)
                gradients.clear()
                mx.eval(block.parameters(), optimizer.adamw.state)
                norms.append(norm)
                notes |= (
                    {f"block {i}: {said}" if said.startswith("clipped") else said: None}
                    if said
                    else {}
                )
            seconds = train_loop.CLOCK.monotonic() - began
            peak = mx.get_peak_memory()
            note = (note + "; ".join(notes)).strip()
            norm = math.hypot(*norms)
            done = Step(
                step + 1,
                value,
                norm,
                rate * self.optimizers[0].calm,
                int(tokens),
                seconds,
                peak,
                note,
            )
            self._end_step(done.number, done.number == recipe.iters)
            yield done

    def gradients(
        self, batches: Sequence[MicroBatch], loss: Loss, slopes: Slopes | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """First (loss per token in nats, tokens) of one step, of all machines; then from the
        shard's last block to its first (i, gradients by name of this machine's *sum* over tokens),
        evaluated. Block i may be updated when they are there. slopes: `loss` where numpy computes
        it.
        """
        # inputs (B, T, D) of the shard's first block and of all above it; then cotangents
        kept: stream.Hidden = []
        n = len(batches)
        top = self._source.layers - 1
        first = self.blocks.start
        self._source.embed([tokens for tokens, *_ in batches], kept)
        self._shared = block_inputs.Cotangents(self._source.sides.owners)
        for i, block in self._in_turn(range(top + 1)):
            # on and back in one go: the last block is not read twice, nor computed twice
            if i == top:
                head = self._source.head().weight
                ends = [
                    self._last if slopes else partial(self._end, loss, head, batch)
                    for batch in batches
                ]
                of_batch = partial(slopes, head, batches) if slopes else None
                total, gradients = self._back(i, block, kept, ends, of_batch)
                del head, ends, of_batch
                mine = total, float(sum(learn.sum() for _, learn, *_ in batches))
                total, tokens = map(math.fsum, zip(*distributed.all_gather(mine), strict=True))
                yield total / (tokens := max(tokens, 1.0)), tokens
                if i in self.blocks:
                    yield i, gradients
                continue
            for b in range(n):
                inputs = self._source.sides.inputs(i, b, kept[b if i < first else -n])
                outputs = self._through(block, inputs)
                with lanes.together(len(kept[0])):
                    mx.eval(out := self._source.sides.keep(i, b, outputs))
                if i < first:
                    kept[b] = out
                else:
                    kept.append(out)
        for i, block in self._in_turn(range(top - 1, first - 1, -1)):
            del kept[(i + 1 - first) * n + n :]
            _, gradients = self._back(i, block, kept, [None] * n)
            if i in self.blocks:
                yield i, gradients

    def _in_turn(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i) in `order`: the shard's from memory, the others streamed, with
        `Stream.blocks`' contract.
        """
        streamed = self._source.blocks([i for i in order if i not in self.blocks])
        for i in order:
            yield (
                (i, self.shard.layers[i - self.blocks.start])
                if i in self.blocks
                else next(streamed)
            )
        next(streamed, None)  # takes the last one back

    def _through(self, block: nn.Module, inputs: BlockInputs) -> BlockOutputs:
        """A micro-batch through a block, its windows side by side."""
        return block_inputs.by_windows(block, inputs, partial(load.mask, self._source.args, block))

    def _end(self, loss: Loss, head: mx.array, batch: MicroBatch, out: mx.array) -> mx.array:
        """Loss of a micro-batch, in nats, from the last block's output (B, T, D)."""
        return loss(self._last(out), head, *batch[1:])

    def _last(self, out: mx.array) -> mx.array:
        """Final hidden states (B * T, D)."""
        return self._norm(out).reshape(-1, self._student.config["hidden_size"])

    def _back(
        self,
        i: int,
        block: nn.Module,
        kept: stream.Hidden,
        ends: Sequence[Callable[[mx.array], mx.array] | None],
        slopes: Callable[[int, mx.array], tuple[float, mx.array]] | None = None,
    ) -> tuple[float, dict[str, mx.array]]:
        """All micro-batches back through block i, computed again: (sum of losses, gradients if in
        the shard). ends: for the last block, what makes a loss of its output; else its cotangent is
        in `kept`. slopes: of the b-th batch's final hidden states the loss and its gradient, where
        the ends make no more than these: the way back is laid out from a cotangent of zeros, whose
        memory is then filled.
        """
        weights = dict(tree_flatten(block.trainable_parameters())) if i in self.blocks else {}
        total = mx.array(0.0)
        gradients = [mx.zeros_like(w) for w in weights.values()]

        def run(
            end: Callable[[mx.array], mx.array] | None,
            inputs: BlockInputs,
            cotangents: BlockOutputs,
            *given: mx.array,
        ) -> list[mx.array]:
            count = len(inputs.arrays)
            block.update(tree_unflatten(list(zip(weights, given[count:], strict=True))))
            out, *more = self._through(block, inputs.like(given[:count])).arrays(cotangents)
            return [end(out) if end else out, *more]

        for b, end in enumerate(ends):
            at = (i - self.blocks.start) * len(ends) + b
            above = mx.array(1.0) if end else kept[at + len(ends)]
            if slopes:
                tokens = kept[at].shape[0] * kept[at].shape[1]
                above = mx.zeros((tokens, self._student.config["hidden_size"]))
            inputs = self._source.sides.inputs(i, b, kept[at])
            cotangents = BlockOutputs(above, self._shared.take(i, b))
            (out, *_), found = mx.vjp(
                partial(run, end, inputs, cotangents),
                [*inputs.arrays, *weights.values()],
                cotangents.arrays(cotangents),
            )
            count = len(inputs.arrays)
            below = inputs.like(found[:count])
            made = found[count:]
            del found
            if slopes:
                with lanes.together(len(kept[at])):
                    mx.eval(out, above)
                value, slope = slopes(b, out)
                host_losses.view(above)[:] = host_losses.view(slope)
                out = mx.array(value)
            gradients = [g + m for g, m in zip(gradients, made, strict=True)] if b else made
            total = total + out if end else total
            asked = [below.hidden] if i > self.blocks.start else []  # below the shard nobody asks
            of_owner = self._shared.add(i, b, below) if asked else []
            with lanes.together(len(kept[at])):
                mx.eval(total, gradients, asked, of_owner)
            kept[at : at + len(asked)] = asked
            del out, below, made, above, inputs, cotangents, of_owner
        block.update(tree_unflatten(list(weights.items())))  # `run` left tracers there
        return float(total), dict(zip(weights, gradients, strict=True))
