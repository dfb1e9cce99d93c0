"""A student that learns block by block: each block is updated as soon as its gradient is there.

A step goes forward through all blocks and back. Only the inputs of the blocks are kept, and on the
way back each block is computed again from its input. So activations and gradients of one block are
held at a time, whatever the model's depth.

Weights learn, in float32 with moments of 8 bits; or the scales, biases and norms of a packed model,
whose integers never change. Scales are small, a twentieth of the weights: all of them learn in
every step, with their state in memory or in files, and the integers of as many blocks as there is
room for. Weights are a shard: all blocks, or some consecutive ones of a student that
`model_writer.by_block` wrote, while the others are streamed. After some steps the files of the
shard are replaced and the next shard comes in, in a circle. The final norm learns beside them;
embedding and head stay.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import slab_losses, streams
from mis_mlx.distillation.train_loop import Applied, MicroBatch, Update, scaled_norm
from mis_mlx.hardware.memory import headroom_bytes, needed_bytes
from mis_mlx.hardware.stage_cost import INTEGERS, StageCost
from mis_mlx.maths import optimizer
from mis_mlx.maths.optimizer import GRADIENT_BYTES, STATE_BYTES, GuardedAdamW, Part
from mis_mlx.models.architectures import arch, block_inputs, modules
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.passing.pass_cost import (
    SMALL_BYTES,
    forward_flops,
    parallel_windows,
    side_bytes,
)
from mis_mlx.models.passing.residency import activation_bytes, backward_bytes
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import SCALES, DistillationSpec
from mis_mlx.quantization import learned_scales, rounded_size, scale_state
from mis_mlx.quantization.learned_scales import PackedStream
from mis_mlx.quantization.scale_state import InMemory, LearnedState
from mis_mlx.storage.checkpoint import Written, sweep
from mis_mlx.storage.files import DISK
from mis_mlx.storage.logit_store import SAMPLES, TOP
from mis_mlx.storage.safetensors import Tensor
from mis_mlx.types import MOST, Checkpoint, MisError

# A file in the student's folder: the last visit that wrote, or began to write, its blocks.
VISIT = "visit.json"
COUNTS = ("learning_rate", "step")  # of an optimizer, beside the moments of its weights
# Arrays (n, m) that the loss makes of the targets of n positions: ids, shares, and what is found of
# them.
TARGET_ARRAYS = 8
Named = Mapping[str, mx.array]
# (final hidden states (n, D), slabs of the head, loss_mask (n,), *targets of n positions) ->
# (nats, summed, and their gradient in the hidden states), evaluated
Loss = Callable[..., tuple[mx.array, mx.array]]


class DenseStream(stream.Stream):
    """Streams a model of floats, in float32, of which the blocks `learning` are in memory.

    Their weights are put into `state`; a block that comes has those that are there. replaced: by
    name in the whole model, in place of stored ones.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        learning: range,
        state: LearnedState,
        replaced: Named,
        *,
        direct: bool = False,
    ):
        super().__init__(checkpoint, mx.float32, direct=direct)
        self._state = state
        self._in_memory: dict[int, nn.Module] = {}
        for i in learning:
            unit = arch.block_prefix(i)
            block = load.block(checkpoint, i, self.args, mx.float32)
            own = _below(replaced, unit)
            block.load_weights(
                [(name, weight.astype(mx.float32)) for name, weight in own.items()], strict=False
            )
            stream.load_checked(block, f"{checkpoint.path}: {unit}")
            state.put(unit, Part(dict(tree_flatten(block.trainable_parameters())), {}))
            self._in_memory[i] = block

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """As `Stream.blocks`, of which those that learn come from memory."""
        if order is None:
            order = range(self.layers)
        streamed = super().blocks([i for i in order if i not in self._in_memory])
        for i in order:
            if i in self._in_memory:
                yield i, self._in_memory[i]
            else:
                yield next(streamed)
        next(streamed, None)  # the stream takes its last block back

    def write(self) -> None:
        """Replace the files of the blocks that learn."""
        for i, block in self._in_memory.items():
            weights = dict(tree_flatten(block.parameters()))
            model_writer.replace_block(self.checkpoint, i, weights)


@dataclass(frozen=True)
class ForwardResult:
    """The forward pass of one step, as far as the way back needs it.

    loss: per token, in nats. tokens: how many count, of all machines. hidden: for every micro-batch
    the input (B, T, D) of each block from the first one on that learns, and the cotangents of the
    last one's outputs; the way back shortens this list. micro_batches: their number. norm: the
    final norm's gradients by name, of this machine.
    """

    loss: float
    tokens: float
    hidden: stream.Hidden
    micro_batches: int
    norm: dict[str, mx.array]


class BlockStudent:
    """A `train_loop.Student` whose blocks learn one after the other.

    Call `begin` or `restore` first, and `take` or `learned` last.

    learns: "weights" of a model of floats, or "scales" of a packed one. direct: as in
    `stream.Stream`. Of scales: state: where they live, default: in memory; kept: how many blocks'
    integers stay in memory, while the others are read twice a step. A checkpoint of one state can
    be put back into another, and the bits of the result depend on neither. Of weights: at_once: how
    many blocks learn at a time, default: all, whose folder is only read; steps_each: for how many
    steps. These steps are a visit, with optimizers of its own; visit v trains shard v modulo their
    number.

    Every block has a gradient guard of its own, because a block is updated before the norms of the
    next ones are known; and so has the final norm. A loss that is not a number skips the step in
    all of them.

    Why a resume is exact: a checkpoint holds the shard of its visit, and every other block is on
    disk as it was then, as long as no later visit has written its blocks. A visit writes its
    number, then its blocks, and only then the next visit begins. So each visit needs a checkpoint
    of its own, and two, so that one damaged checkpoint can be done without at any time:
    `longest_unsaved` is half of a visit.
    """

    def __init__(
        self,
        student: Checkpoint,
        learns: Literal["weights", "scales"],
        *,
        state: LearnedState | None = None,
        kept: int = 0,
        at_once: int | None = None,
        steps_each: int = MOST,
        direct: bool = False,
    ):
        self._student = student
        self._layers = int(student.config["num_hidden_layers"])
        self._learns = learns
        self._state = state or InMemory()
        self._kept = kept
        self._at_once = at_once or self._layers
        self._steps_each = steps_each
        self._direct = direct
        self._optimizers: dict[str, GuardedAdamW] = {}
        self._source: stream.Stream | None = None
        self.vocab = shape_of(student.config).vocab
        norm = load.final_norm(student, mx.float32)
        self._norm = stream.load_checked(norm, f"{student.path}: {load.NORM}")

    @property
    def longest_unsaved(self) -> int:
        """As in `run_loop.Trained`."""
        if self._at_once >= self._layers:
            return MOST
        return max(1, self._steps_each // 2)

    @property
    def optimizers(self) -> list[GuardedAdamW]:
        """Whose guards decide: the norm's, then those of the blocks."""
        return list(self._optimizers.values())

    def begin(self, repaired: Named | None = None) -> None:
        """Enter the first visit of a new run.

        repaired: weights that replace stored ones. MisError in a folder that was trained before.
        """
        self._check(-1)
        self._enter(0, repaired or {})

    def arrays(self) -> dict[str, dict[str, mx.array] | Written]:
        """The arrays that a resumed run needs, by checkpoint file: written already, or as they are.

        By name in the whole model; moments have the names of their weights, and .m or .v. The
        counts of a unit's optimizer have its prefix, too.
        """
        files = self._state.entries()
        weights: dict[str, mx.array] = {}
        moments: dict[str, mx.array] = {}
        for unit, adam in self._optimizers.items():
            for name, array in adam.arrays().items():
                moments[unit + name] = array
            if not files:
                part = self._state.part(unit)
                weights |= scale_state.joined(Part(part.weights, {}), before=unit)
                moments |= scale_state.joined(Part({}, part.moments), before=unit)
        return {"model": weights, "optimizer": moments, **files}

    def memory(self) -> dict[str, Any]:
        """The part of a checkpoint that is not an array, for its state.json."""
        return {
            "visit": self.visit,
            "at_once": self._at_once,
            "steps_each": self._steps_each,
            "guards": [optimizer.memory() for optimizer in self.optimizers],
        }

    def restore(self, arrays: Mapping[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Continue from a checkpoint, with its shard size and visit length.

        All is evaluated: a file may go once this returns. The mappings are emptied, so that arrays
        which are lazy are in memory a unit at a time. MisError when a later visit has overwritten
        the blocks that it needs.
        """
        self._at_once = memory["at_once"]
        self._steps_each = memory["steps_each"]
        self._check(memory["visit"])
        self._enter(memory["visit"], {})
        found: dict[str, mx.array] = {}
        for named in arrays.values():
            found |= named
            named.clear()
        for (unit, adam), guard in zip(self._optimizers.items(), memory["guards"], strict=True):
            own = _below(found, unit)
            for name in own:
                del found[unit + name]
            counts = {name: own.pop(name) for name in list(own) if name in COUNTS}
            adam.restore(counts, guard)
            evaluate_now(adam.adamw.state)
            self._put(unit, self._module(unit), scale_state.split(own))

    def take(self, name: str) -> Tensor:
        """A weight of the whole model, once it is trained."""
        learned = self.learned(name)
        return model_writer.dense(self._student, name) if learned is None else learned

    def learned(self, name: str) -> mx.array | None:
        """What a tensor of the whole model has become; None where it does not learn."""
        i = arch.block_of(name)
        unit = load.NORM if i is None else arch.block_prefix(i)
        if unit not in self._optimizers or not name.startswith(unit):
            return None
        return self._state.value(unit, name.removeprefix(unit))

    def _check(self, visit: int) -> None:
        """Sweep what a crash left half-written; refuse blocks of a visit after `visit`."""
        if self._at_once >= self._layers:
            return
        sweep(self._student.path)
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

    def _enter(self, visit: int, replaced: Named) -> None:
        """Open the blocks of a visit, with new optimizers and the norm as it is.

        replaced: weights in place of stored ones, by name in the whole model.
        """
        shards = -(-self._layers // self._at_once)
        first = visit % shards * self._at_once
        self.visit = visit
        self.learning = range(first, min(first + self._at_once, self._layers))
        norm = Part(dict(tree_flatten(self._norm.trainable_parameters())), {})
        of_norm = self._optimizers.get(load.NORM)
        if of_norm:
            norm = self._state.part(load.NORM)
        # The last shard's memory goes before the next one's is taken. A new stream: the old one
        # refuses files that changed since it was made.
        self._source = None
        if self._learns == "scales":
            self._source = PackedStream(self._student, self._kept, self._state, direct=self._direct)
        else:
            self._state = InMemory()
            self._source = DenseStream(
                self._student, self.learning, self._state, replaced, direct=self._direct
            )
        self._state.put(load.NORM, norm)
        self._optimizers = {load.NORM: of_norm or self._optimizer()}
        for i in self.learning:
            self._optimizers[arch.block_prefix(i)] = self._optimizer()

    def _optimizer(self) -> GuardedAdamW:
        """Of a unit. A step of scales is a share of them, with moments in float32."""
        if self._learns == "scales":  # which need not be small
            return GuardedAdamW(weight_decay=0.0, relative=True)
        return GuardedAdamW(eight_bit=True)

    def end_step(self, number: int, *, last: bool) -> None:
        """End a visit, or the run, after step `number` (from 1): write its blocks to disk.

        This comes before the checkpoint of that step.
        """
        visit_over = number % self._steps_each == 0
        if self._at_once >= self._layers or not (visit_over or last):
            return
        # The number first: after a crash it says whose blocks are half-written.
        DISK.replace_text(self._student.path / VISIT, json.dumps(self.visit))
        assert isinstance(self._source, DenseStream)
        self._source.write()
        if last:
            return
        # A bad batch is bad in every shard, so the next optimizers know of those before.
        before = self._optimizers[load.NORM]
        self._enter(self.visit + 1, {})
        for adam in self.optimizers[1:]:
            adam.bad = before.bad
            adam.skipped = before.skipped
            adam.lr_scale = before.lr_scale

    def look(self, batches: Sequence[MicroBatch], loss: Loss) -> ForwardResult:
        """The micro-batches of a step forward through all blocks, to the loss of all machines."""
        source = self._opened
        n = len(batches)
        hidden: stream.Hidden = []
        source.embed([tokens for tokens, *_ in batches], hidden)
        # Keys and values that later blocks use send cotangents back to the block that made them.
        self._sharers = block_inputs.Cotangents(source.sides.owners)
        for i, block in source.blocks():
            # Below the shard the outputs (B, T, D) replace the inputs, which nobody needs again.
            # From its first block on they are appended: inputs stay for the way back.
            below = i < self.learning.start
            for b in range(n):
                place = b if below else -n  # where the block before left its output
                outputs = self._run(block, source.sides.inputs(i, b, hidden[place]))
                states = source.sides.keep(i, b, outputs)
                with streams.single_threaded_blas(len(states)):
                    evaluate_now(states)
                if below:
                    hidden[b] = states
                else:
                    hidden.append(states)
        total, of_norm = self._to_loss(hidden, batches, loss)
        counted = float(sum(loss_mask.sum() for _, loss_mask, *_ in batches))
        total, counted = distributed.sums(total, counted)
        tokens = max(counted, 1.0)  # a step without a token that counts has loss 0
        return ForwardResult(
            loss=total / tokens, tokens=tokens, hidden=hidden, micro_batches=n, norm=of_norm
        )

    def apply(self, found: ForwardResult, update: Update) -> Applied:
        """Back through what learns, which is updated on the way."""
        norms = []
        notes = dict[str, None]()  # each sentence once, in order

        def learn(unit: str, module: nn.Module, gradients: dict[str, mx.array]) -> None:
            norm, said = self._update(unit, module, gradients, found, update)
            norms.append(norm)
            if said.startswith("clipped"):  # every unit has a bound of its own
                said = f"{unit.removeprefix('model.').strip('.')}: {said}"
            if said:
                notes[said] = None

        learn(load.NORM, self._norm, found.norm)
        n = found.micro_batches
        first = self.learning.start
        for i, block in self._opened.blocks(range(self._layers - 1, first - 1, -1)):
            # Keep the inputs of this block and the cotangents of its outputs; what is behind goes.
            del found.hidden[(i + 2 - first) * n :]
            gradients = self._backward(i, block, found.hidden, n)
            if i in self.learning:
                learn(arch.block_prefix(i), block, gradients)
            del gradients
        found.hidden.clear()
        return Applied(
            found.loss,
            found.tokens,
            norm=math.hypot(*norms),
            note="; ".join(notes),
            further={},
        )

    @property
    def _opened(self) -> stream.Stream:
        """The blocks of this visit, with embedding and head."""
        assert self._source is not None
        return self._source

    def _module(self, unit: str) -> nn.Module | None:
        """The module that has a unit's weights between steps; None: only the state has them."""
        if unit == load.NORM:
            return self._norm
        if isinstance(self._source, DenseStream):
            (i,) = (i for i in self.learning if arch.block_prefix(i) == unit)
            return self._source._in_memory[i]
        return None

    def _put(self, unit: str, module: nn.Module | None, part: Part) -> None:
        """Replace a unit's values and moments, which may be lazy.

        The module lets go of the old ones first, whose memory the new ones may take.
        """
        if module is not None:
            _set_weights(module, part.weights, part.weights.values())
        self._state.put(unit, part)

    def _update(
        self,
        unit: str,
        module: nn.Module,
        gradients: dict[str, mx.array],
        found: ForwardResult,
        update: Update,
    ) -> tuple[float, str]:
        """One step of a unit: (its gradient norm per token, what its guard did).

        gradients: this machine's sums over tokens; the dictionary is emptied.
        """
        adam = self._optimizers[unit]
        distributed.sum_gradients(gradients)
        scale, norm = scaled_norm(gradients, found.tokens, update)
        learns, note = adam.decide(found.loss, norm, update.rate, batch=update.batch, scale=scale)
        if learns:
            adam.begin_parts(streams.stream)
            part = adam.updated(self._state.part(unit), gradients)
            # Nothing but the lazy update holds the gradients now, so they go as it is evaluated.
            gradients.clear()
            self._put(unit, module, part)
            evaluate_now(adam.adamw.state)
        return norm, note

    def _run(self, block: nn.Module, inputs: BlockInputs) -> BlockOutputs:
        """A micro-batch through a block, its windows side by side; lazy."""
        mask = partial(load.mask, self._opened.args, block)
        return block_inputs.by_windows(block, inputs, mask)

    def _to_loss(
        self, hidden: stream.Hidden, batches: Sequence[MicroBatch], loss: Loss
    ) -> tuple[float, dict[str, mx.array]]:
        """(this machine's loss in nats, the final norm's gradients).

        Cotangents take the place of the last block's outputs, at the end of `hidden`. All
        micro-batches meet the head together, which is read in slabs.
        """
        weights = dict[str, mx.array](tree_flatten(self._norm.trainable_parameters()))
        of_norm = {name: mx.zeros_like(weight) for name, weight in weights.items()}
        n = len(batches)
        if not n:  # a machine without a part in this step
            return 0.0, of_norm
        outputs = hidden[-n:]
        flat = [self._norm(states).reshape(-1, states.shape[-1]) for states in outputs]
        starts = [0]
        for states in flat:
            starts.append(starts[-1] + len(states))
        _, *targets = zip(*batches, strict=True)
        # Positions have different numbers of targets; those of weight 0 fill a row up.
        most = [max(array.shape[-1] for array in of_kind) for of_kind in targets]
        together = []
        for of_kind, width in zip(targets, most, strict=True):
            rows = [
                mx.pad(array, [(0, 0), (0, width - array.shape[1])]) if array.ndim > 1 else array
                for array in of_kind
            ]
            together.append(mx.concatenate(rows))
        normed = mx.concatenate(flat)
        flat.clear()
        evaluate_now(normed, together)
        value, pull = loss(normed, self._head_slabs, *together)
        del normed, together

        def run(states: mx.array, *values: mx.array) -> mx.array:
            _set_weights(self._norm, weights, values)
            return self._norm(states).reshape(-1, states.shape[-1])

        for b, states in enumerate(outputs):
            above = pull[starts[b] : starts[b + 1]]
            _, (below, *grads) = mx.vjp(run, [states, *weights.values()], [above])
            for name, gradient in zip(weights, grads, strict=True):
                of_norm[name] = of_norm[name] + gradient
            evaluate_now(below, of_norm)
            hidden[b - n] = below
        _set_weights(self._norm, weights, weights.values())  # `run` left tracers there
        return float(value), of_norm

    def _head_slabs(self, rows: int) -> Iterator[tuple[int, mx.array]]:
        """(first token, weights (rows, D) float32) of the head, a slab at a time."""
        for start, part in self._opened.head_parts(self.vocab, rows):
            yield start, modules.dense_weight(part)

    def _backward(
        self, i: int, block: nn.Module, hidden: stream.Hidden, n: int
    ) -> dict[str, mx.array]:
        """n micro-batches back through block i, computed again: its gradients by name, evaluated.

        They are this machine's sums over tokens; {} where the block does not learn. hidden: at its
        end the inputs (B, T, D) of the block, which their cotangents replace, and behind them the
        cotangents of its outputs.
        """
        start = self.learning.start
        trained = {}
        if i in self.learning:
            trained = dict[str, mx.array](tree_flatten(block.trainable_parameters()))
        gradients = [mx.zeros_like(weight) for weight in trained.values()]
        for b in range(n):
            place = (i - start) * n + b
            new, below = self._vjp(i, block, trained, hidden[place], hidden[place + n], b)
            if b:
                new = [old + added for old, added in zip(gradients, new, strict=True)]
            gradients = new
            # Below the shard nobody asks for a cotangent, so it is not computed there.
            wanted = []
            of_owner = []
            if i > start:
                wanted.append(below.hidden)
                of_owner = self._sharers.add(i, b, below)
            with streams.single_threaded_blas(len(hidden[place])):
                evaluate_now(gradients, wanted, of_owner)
            hidden[place : place + len(wanted)] = wanted
            # Not to be held beside the next micro-batch's.
            del new, below, wanted, of_owner
        _set_weights(block, trained, trained.values())  # `_vjp` left tracers there
        return dict(zip(trained, gradients, strict=True))

    def _vjp(
        self,
        i: int,
        block: nn.Module,
        trained: Named,
        hidden: mx.array,
        above: mx.array,
        b: int,
    ) -> tuple[list[mx.array], BlockInputs]:
        """(gradients of `trained`, cotangents of the inputs) of micro-batch b; lazy.

        above: the cotangent of the output. The block keeps MLX's tracers in place of its weights:
        put these back.
        """
        inputs = self._opened.sides.inputs(i, b, hidden)
        # keys and values count where later blocks have sent cotangents of them
        counted = BlockOutputs(above, self._sharers.take(i, b))
        count = len(inputs.arrays)

        def run(*primals: mx.array) -> list[mx.array]:
            _set_weights(block, trained, primals[count:])
            return self._run(block, inputs.like(primals[:count])).arrays(counted)

        primals = [*inputs.arrays, *trained.values()]
        _, grads = mx.vjp(run, primals, counted.arrays(counted))
        return grads[count:], inputs.like(grads[:count])


def _set_weights(module: nn.Module, names: Iterable[str], weights: Iterable[mx.array]) -> None:
    """Put weights into a module, by their names in it."""
    module.update(tree_unflatten(list(zip(names, weights, strict=True))))


def _below(named: Named, unit: str) -> dict[str, mx.array]:
    """Those of a unit, by name in it. named: by name in the whole model."""
    return {
        name.removeprefix(unit): array for name, array in named.items() if name.startswith(unit)
    }


def block_state_bytes(config: Mapping[str, Any], block: int | None = None) -> int:
    """A block with its moments, in memory or in a checkpoint. block: default: the largest."""
    return optimizer.state_bytes(arch.layer_tensors(config, block=block).values())


def steps_per_shard(job: DistillationSpec, shard: int) -> int:
    """Steps that a shard is trained before the next one comes.

    All have had their turn when the run ends.
    """
    return math.ceil(job.iters / math.ceil(job.student.shape.layers / shard))


def learning_scales(job: DistillationSpec) -> int:
    """Scales and biases of the student's blocks."""
    return 2 * job.student.all_block_params // job.rounding.q_group_size


def weights_cost(job: DistillationSpec, micro: int, shard: int, limit: int = 0) -> StageCost:
    """The weights of a student, of which `shard` blocks are in memory and learn, in turn.

    shard: 0: all blocks, which nothing reads again. micro: windows of a micro-batch.
    """
    m = job.student
    layers = m.shape.layers
    trained = shard or layers
    block_bytes = 4 * m.largest_block_params
    shards = math.ceil(layers / trained)
    visits = math.ceil(job.iters / steps_per_shard(job, trained))
    # the mean number of blocks above a shard, which are read twice
    above = sum(layers - min(layers, (i + 1) * trained) for i in range(shards)) / shards
    block_flops = forward_flops(m, job.step_tokens, job.max_seq_length, head=False) / layers
    if shard:
        state = shard * block_state_bytes(m.config)
        visited = block_bytes * min(layers, visits * shard)
        read = visited + int(job.iters * block_bytes * (layers - shard + above))
        # A resume needs one checkpoint of every visit.
        written = visited + state * max(job.checkpoints, 2 * visits)
    else:
        state = sum(block_state_bytes(m.config, i) for i in range(layers))
        read = m.nbytes
        written = m.nbytes + job.checkpoints * state
    sizes = [math.prod(shape) for shape in arch.layer_tensors(m.config).values()]
    gradient = GRADIENT_BYTES * sum(sizes)
    made = parallel_windows(m) * optimizer.update_bytes(max(sizes), eight_bit=True)
    on_their_way = 2 * block_bytes if shard else 0
    return StageCost(
        name="distil",
        read_bytes=read + _read_in_steps(job),
        written_bytes=written,
        peak_bytes=state
        + on_their_way
        + _step_bytes(job, micro, gradient=gradient, update=gradient + made),
        flops=job.iters * (block_flops * (layers + 2 * above + 3 * trained) + _head_flops(job)),
        updated=job.iters * (m.largest_block_params * trained if shard else m.all_block_params),
    )


def scales_cost(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """The packed student, whose scales learn in `iters` steps.

    What learns and its moments, where they fit; else they are in files, a block at a time in
    memory. The integers of one block, and of as many others as there is room for.
    """
    in_memory = _scales(job, micro, limit, iters, on_disk=False)
    if needed_bytes(in_memory.peak_bytes) <= limit:
        return in_memory
    on_disk = _scales(job, micro, limit, iters, on_disk=True)
    return min(in_memory, on_disk, key=lambda cost: cost.peak_bytes)


def _scales(
    job: DistillationSpec, micro: int, limit: int, iters: int, *, on_disk: bool
) -> StageCost:
    """All steps. on_disk: what learns and its moments are in a file a block.

    Checkpoints are second names of these files.
    """
    job = replace(job, iters=iters)
    m = job.student
    layers = m.shape.layers
    in_block = 2 * m.largest_block_params // job.rounding.q_group_size
    state = STATE_BYTES * learning_scales(job)
    share = m.all_block_params / m.params / layers
    packed = int(share * rounded_size.rounded_bytes(m, job.rounding))  # a block on disk
    # Integers of a block in memory: as on disk on Metal; a CPU has a byte for each.
    integers = packed if m.gpu else m.largest_block_params
    step = _step_bytes(
        job,
        micro,
        gradient=GRADIENT_BYTES * in_block,
        # old and new values and moments, and gradients
        update=(2 * STATE_BYTES + GRADIENT_BYTES) * in_block,
        of_stream=learned_scales.product_bytes(m),
    )
    # a block comes while another one computes, and leaves its slot
    peak_bytes = step + 2 * packed + integers
    read = 0
    files = 0
    if on_disk:
        peak_bytes += GRADIENT_BYTES * in_block  # values of the block at work
        # values on the way there and back, all for the update, which writes all of it
        read = iters * (2 * GRADIENT_BYTES * learning_scales(job) + state)
        written = GRADIENT_BYTES * learning_scales(job) + iters * state
        # a block's new file is there before the old one goes
        files = state + STATE_BYTES * in_block
    else:
        peak_bytes += state
        written = job.checkpoints * state
    kept = min(layers, headroom_bytes(limit, peak_bytes) // integers)
    flops = 4 * forward_flops(m, job.step_tokens, job.max_seq_length, head=False)
    return StageCost(
        name=SCALES,
        read_bytes=(layers + 2 * iters * (layers - kept)) * packed + read + _read_in_steps(job),
        written_bytes=rounded_size.rounded_bytes(m, job.rounding) + written,
        peak_bytes=peak_bytes + kept * integers,
        flops=iters * (flops + _head_flops(job)),
        updated=iters * learning_scales(job),
        stays={INTEGERS: kept},
        scratch_bytes=files,
    )


def _read_in_steps(job: DistillationSpec) -> int:
    """Bytes that all steps read besides blocks: their targets, and the head twice."""
    return job.iters * (job.step_tokens * job.target_bytes + 2 * job.student.head_bytes)


def _head_flops(job: DistillationSpec) -> float:
    """Operations of a step's loss: logits twice, and their gradient."""
    return 6.0 * job.step_tokens * job.student.head_params


def _step_bytes(
    job: DistillationSpec, micro: int, *, gradient: int, update: int, of_stream: int = 0
) -> int:
    """What a step of micro-batches of `micro` windows holds besides what learns.

    gradient: bytes of a block's; windows side by side have one each. update: bytes of a block's.
    of_stream: what more the pass through a block takes in every stream.
    """
    m = job.student
    s = m.shape
    tokens = micro * job.max_seq_length
    # of earlier micro-batches, to which those of the next are added
    summed = gradient if job.step_tokens > tokens else 0
    activations = activation_bytes(m, micro, job.max_seq_length) // s.layers  # of a block
    side_by_side = min(parallel_windows(m), micro)
    states = 4 * job.step_tokens * s.hidden
    held = SMALL_BYTES + (s.layers + 1) * states  # inputs of every block, and outputs
    held += side_bytes(replace(m, item=4), job.step_tokens) + m.in_flight(activations)
    # behind the norm, and the gradient there, old and new
    loss = 3 * 4 * job.step_tokens * s.hidden
    loss += TARGET_ARRAYS * 4 * job.step_tokens * (TOP + SAMPLES)
    loss += slab_losses.slab_bytes(job.step_tokens, s.hidden, s.vocab)
    backward = backward_bytes(m, micro, job.max_seq_length) + summed
    backward += side_by_side * (gradient + of_stream)
    return held + max(loss, backward, update)
