"""Train a student block by block, and update each block as soon as its gradient is there.

A step goes forward through all blocks and back. The input of every block is kept, and on the way
back the block is computed again. So the gradient of one block is held at a time, never that of the
whole model, and moments have 8 bits.

The blocks in memory, which are trained, are a shard. It holds all blocks, or some consecutive ones
of a student that `model_writer.by_block` wrote; the others are streamed from disk. After some steps
the files of the shard are replaced and the next shard comes in, in a circle. Embedding, final norm
and head are not trained.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import streams
from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.distillation import block_gradients, live_teacher, train_loop
from mis_mlx.distillation.block_gradients import BlockGradients, ForwardResult
from mis_mlx.distillation.train_loop import Applied, MicroBatch, Update
from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths.optimizer import (
    GRADIENT_BYTES,
    GuardedAdamW,
    global_norm,
    state_bytes,
    update_bytes,
)
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.passing.pass_cost import forward_flops, parallel_windows
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.storage.checkpoint import sweep
from mis_mlx.storage.files import Files
from mis_mlx.storage.safetensors import Tensor
from mis_mlx.types import MOST, Checkpoint, MisError

# A file in the student's folder: the last visit that wrote, or began to write, its blocks.
VISIT = "visit.json"
Named = Mapping[str, mx.array]


class Sharded:
    """A `train_loop.Student` whose shard is in memory and trainable.

    Call `begin` or `restore` first, and `take` last. A visit is the `steps_per_shard` steps for
    which one shard is trained, with optimizers of its own; visit v trains shard v modulo their
    number. A shard of all blocks has one visit, and its folder is only read.

    headroom_bytes, direct: as in `stream.Stream`. Every block has a gradient guard of its own,
    because a block is updated before the norms of the next ones are known. A loss that is not a
    number skips the step in all blocks.

    Why a resume is exact: a checkpoint holds the shard of its visit, and every other block is on
    disk as it was then, as long as no later visit has written its blocks. A visit writes its
    number, then its blocks, and only then the next visit begins. So each visit needs a checkpoint
    of its own, and two, so that one damaged checkpoint can be done without at any time:
    `longest_unsaved` is half of a visit.
    """

    own_head = True

    def __init__(
        self,
        student: Checkpoint,
        shard_layers: int,
        steps_per_shard: int,
        files: Files,
        weight_decay: float = 0.01,
        headroom_bytes: int = 0,
        direct: bool = False,
    ):
        self._student = student
        self._files = files
        self._shard_layers = shard_layers
        self._steps_per_shard = steps_per_shard
        self._weight_decay = weight_decay
        self._headroom_bytes = headroom_bytes
        self._direct = direct
        norm = load.final_norm(student, mx.float32)
        self._norm = stream.load_checked(norm, f"{student.path}: model.norm.")

    @property
    def longest_unsaved(self) -> int:
        """As in `run_loop.Trained`."""
        if self._shard_layers >= self._student.config["num_hidden_layers"]:
            return MOST
        return max(1, self._steps_per_shard // 2)

    def begin(self, repaired: Named | None = None) -> None:
        """Enter the first visit of a new run.

        repaired: weights that replace stored ones. MisError in a folder that was trained before.
        """
        self._check(-1)
        self._enter(0, repaired)

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The shard's weights and moments for a checkpoint, by checkpoint file.

        By name in the whole model; the counts of a block's optimizer have its prefix, too.
        """
        weights = {}
        moments = {}
        for i, block, optimizer in self._learning():
            before = arch.block_prefix(i)
            for name, array in dict[str, mx.array](tree_flatten(block.parameters())).items():
                weights[before + name] = array
            for name, array in optimizer.arrays().items():
                moments[before + name] = array
        return {"model": weights, "optimizer": moments}

    def memory(self) -> dict[str, Any]:
        """The part of a checkpoint that is not an array, for its state.json."""
        return {
            "visit": self.visit,
            "shard_layers": self._shard_layers,
            "steps_per_shard": self._steps_per_shard,
            **train_loop.remembered(self.optimizers),
        }

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Continue from a checkpoint, with its shard size and visit length.

        MisError when a later visit has overwritten the blocks that it needs.
        """
        self._check(memory["visit"])
        self._shard_layers = memory["shard_layers"]
        self._steps_per_shard = memory["steps_per_shard"]
        self._enter(memory["visit"], arrays["model"])
        for (i, _, optimizer), guard in zip(self._learning(), memory["guards"], strict=True):
            optimizer.restore(_of_block(arrays["optimizer"], i), guard)
            # Now, not later: the checkpoint's file may go once this method returns.
            mx.eval(optimizer.adamw.state)

    def take(self, name: str) -> Tensor:
        """A weight of the whole model, once it is trained."""
        i = arch.block_of(name)
        if i is None or i not in self.blocks:
            return model_writer.dense(self._student, name)
        path, _, weight = name.split(".", 3)[3].rpartition(".")
        modules = dict(self.shard.layers[i - self.blocks.start].named_modules())
        return modules[path][weight]

    def _check(self, visit: int) -> None:
        """Sweep what a crash left half-written; refuse blocks of a visit after `visit`."""
        sweep(self._student.path, self._files)
        path = self._student.path / VISIT
        written = -1
        if path.is_file():
            written = json.loads(path.read_text(encoding="utf-8"))
        if written <= visit:
            return
        begun = "no checkpoint is complete"
        if visit >= 0:
            begun = f"the newest complete checkpoint is from visit {visit}"
        raise MisError(
            f"{self._student.path} holds blocks from visit {written}, but {begun}: start a new run"
        )

    def _blocks_of(self, visit: int) -> range:
        """The shard of a visit."""
        layers = self._student.config["num_hidden_layers"]
        size = self._shard_layers
        shards = -(-layers // size)
        first = visit % shards * size
        return range(first, min(first + size, layers))

    def _learning(self) -> Iterator[tuple[int, nn.Module, GuardedAdamW]]:
        """(i, block i, its optimizer) of the shard."""
        yield from zip(self.blocks, self.shard.layers, self.optimizers, strict=True)

    def _enter(self, visit: int, replaced: Named | None = None) -> None:
        """Load the shard of a visit, with new optimizers.

        replaced: weights in place of stored ones, by name in the whole model.
        """
        # A new stream: the old one refuses files that changed since it was made.
        self._source = stream.Stream(self._student, mx.float32, self._headroom_bytes, self._direct)
        self.visit = visit
        self.blocks = self._blocks_of(visit)
        self.optimizers = [
            GuardedAdamW(weight_decay=self._weight_decay, eight_bit=True) for _ in self.blocks
        ]
        # Both are replaced first: the last shard's memory goes before the next one's is taken.
        self.shard = nn.Module()
        self.passes = BlockGradients(self._source, self._norm, self.blocks, shard=self.shard)
        self.shard.layers = [
            load.block(self._student, i, self._source.args, mx.float32) for i in self.blocks
        ]
        for i, block in zip(self.blocks, self.shard.layers, strict=True):
            own = _of_block(replaced or {}, i)
            block.load_weights(
                [(name, weight.astype(mx.float32)) for name, weight in own.items()], strict=False
            )
        where = f"{self._student.path}, from block {self.blocks.start} on: "
        stream.load_checked(self.shard, where)

    def end_step(self, number: int, *, last: bool) -> None:
        """End a visit, or the run, after step `number` (from 1): write its blocks to disk.

        This comes before the checkpoint of that step.
        """
        visit_over = number % self._steps_per_shard == 0
        all_in_memory = len(self.blocks) == self._source.layers
        if all_in_memory or not (visit_over or last):
            return
        # The number first: after a crash it says whose blocks are half-written.
        self._files.replace_text(self._student.path / VISIT, json.dumps(self.visit))
        for i, block in zip(self.blocks, self.shard.layers, strict=True):
            weights = dict(tree_flatten(block.parameters()))
            model_writer.replace_block(self._student, i, weights, self._files)
        if last:
            return
        # A bad batch is bad in every shard, so the next optimizers know of those before.
        before = self.optimizers[0]
        self._enter(self.visit + 1)
        for optimizer in self.optimizers:
            optimizer.bad = before.bad
            optimizer.skipped = before.skipped
            optimizer.lr_scale = before.lr_scale

    def look(self, batches: Sequence[MicroBatch], loss: TokenLoss) -> ForwardResult:
        """Forward through all blocks; `apply` goes back."""
        return self.passes.forward(batches, loss)

    def apply(self, found: ForwardResult, update: Update) -> Applied:
        """Back through the shard, whose blocks are updated on the way."""
        norms = []
        notes = dict[str, None]()  # each sentence once, in order
        for i, grads in self.passes.backward_blocks(found):
            norm, said = self._update(i, grads, found, update)
            norms.append(norm)
            if said.startswith("clipped"):  # every block has a bound of its own
                said = f"block {i}: {said}"
            if said:
                notes[said] = None
        return Applied(
            found.loss,
            found.tokens,
            norm=math.hypot(*norms),
            note="; ".join(notes),
            further={},
        )

    def _update(
        self,
        i: int,
        grads: dict[str, mx.array],
        found: ForwardResult,
        update: Update,
    ) -> tuple[float, str]:
        """Update block i: (its gradient norm per token, what the guard did).

        grads: this machine's sums over tokens; the dictionary is emptied.
        """
        block = self.shard.layers[i - self.blocks.start]
        optimizer = self.optimizers[i - self.blocks.start]
        distributed.sum_gradients(grads)
        norm = distributed.mean(float(global_norm(grads, streams.stream)))
        norm = norm * update.noise / found.tokens
        note = optimizer.update(
            block,
            tree_unflatten(list(grads.items())),
            found.loss,
            norm,
            learning_rate=update.rate,
            batch=update.batch,
            scale=update.noise / found.tokens,
            stream_of=streams.stream,
        )
        # Nothing but the lazy update holds the gradients now, so they go as it is evaluated.
        grads.clear()
        _evaluate(block, optimizer)
        return norm, note


def _evaluate(block: nn.Module, optimizer: GuardedAdamW) -> None:
    """Compute an update, of as many weights at a time as there are streams.

    MLX makes room for all that it is asked for together, before the first of it is there.
    """
    moments = optimizer.arrays()
    arrays = []
    for name, weight in dict[str, mx.array](tree_flatten(block.parameters())).items():
        arrays.append([weight, *_below(moments, f"{name}.")])
    count = streams.count()
    for start in range(0, len(arrays), count):
        mx.eval(arrays[start : start + count])
    mx.eval(optimizer.adamw.state)


def _below(named: Named, before: str) -> list[mx.array]:
    return [array for name, array in named.items() if name.startswith(before)]


def _of_block(named: Named, i: int) -> dict[str, mx.array]:
    """Those of block i, by name in it. named: by name in the whole model."""
    before = arch.block_prefix(i)
    found = {}
    for name, array in named.items():
        if name.startswith(before):
            found[name.removeprefix(before)] = array
    return found


def block_state_bytes(config: Mapping[str, Any], block: int | None = None) -> int:
    """A block with its moments, in memory or in a checkpoint. block: default: the largest."""
    return state_bytes(arch.layer_tensors(config, block=block).values())


def _holdings(job: DistillationSpec, micro: int, limit: int, state: int) -> Ledger:
    """What is held in training, without blocks that are streamed. state: bytes of the shard."""
    m = job.student
    sizes = [math.prod(shape) for shape in arch.layer_tensors(m.config).values()]
    gradient = GRADIENT_BYTES * sum(sizes)
    made = parallel_windows(m) * update_bytes(max(sizes), eight_bit=True)
    step = block_gradients.holdings(
        job, micro, gradient=gradient, update=gradient + made, own_head=True
    )
    ledger = Ledger(limit, m.gpu)
    ledger.hold("blocks and moments", state)
    ledger.hold("head", 4 * m.head_params)
    ledger.moment("step", step=step.peak_bytes)
    return ledger


def sharded_cost(job: DistillationSpec, micro: int, shard: int, limit: int = 0) -> StageCost:
    """The student in files, `shard` of its blocks in memory and trained, one after the other.

    shard: 0: all blocks, which nothing reads again. With as much of the teacher as there is room
    for, or with its stored logits.
    """
    m = job.student
    layers = m.shape.layers
    trained = shard or layers
    block_bytes = 4 * m.largest_block_params
    shards = math.ceil(layers / trained)
    visits = math.ceil(job.iters / steps_per_shard(job, trained))
    # the mean number of blocks above a shard, and of those that are read again: the last one
    # turns in memory
    blocks_above = [layers - min(layers, (i + 1) * trained) for i in range(shards)]
    above = sum(blocks_above) / shards
    again = sum(max(0, n - 1) for n in blocks_above) / shards
    block_flops = forward_flops(m, job.step_tokens, job.max_seq_length, head=False) / layers
    head_flops = 4.0 * job.step_tokens * m.head_params
    if shard:
        state = shard * block_state_bytes(m.config)
        visited = block_bytes * min(layers, visits * shard)
        read = visited + visits * 4 * m.head_params
        read += int(job.iters * block_bytes * (layers - shard + again))
        # A resume needs one checkpoint of every visit.
        written = visited + state * max(job.checkpoints, 2 * visits)
    else:
        state = sum(block_state_bytes(m.config, i) for i in range(layers))
        read = m.nbytes
        written = m.nbytes + job.checkpoints * state
    one_step = StageCost(
        name="distil",
        read_bytes=read,
        written_bytes=written,
        flops=block_flops * (layers - 1 + 2 * above + 3 * trained) + head_flops,
        updated=m.largest_block_params * trained if shard else m.all_block_params,
    )
    ledger = _holdings(job, micro, limit, state)
    if shard:
        ledger.hold("blocks on their way", block_bytes, count=2)
    live_teacher.hold(ledger, job, micro, same_head=job.same_head)
    return live_teacher.taught(one_step, ledger, job, micro)


def steps_per_shard(job: DistillationSpec, shard: int) -> int:
    """Steps that a shard is trained before the next one comes.

    All have had their turn when the run ends.
    """
    return math.ceil(job.iters / math.ceil(job.student.shape.layers / shard))
