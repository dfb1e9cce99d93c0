"""Train the scales, biases and norms of a packed student, block by block; integers never change.

A step goes forward through all blocks and back, as in distillation/block_gradients: the integers of
one block are in memory at a time, and of as many others as there is room for. What learns is small,
a twentieth of the weights; it is in memory with its gradients and moments, or in a file a block
(quantization/scale_state). Every block learns in every step, under one guard: the norm over all
gradients is known before the first block is updated. So the bits of the result do not depend on
what is in memory.
"""

import math
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import streams
from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.distillation import block_gradients, live_teacher, train_loop
from mis_mlx.distillation.block_gradients import BlockGradients
from mis_mlx.distillation.train_loop import Applied, MicroBatch, Update
from mis_mlx.hardware.ledger import Ledger, needed_bytes
from mis_mlx.hardware.stage_cost import GRADIENTS, INTEGERS, StageCost
from mis_mlx.maths import optimizer
from mis_mlx.maths.optimizer import GuardedAdamW, Part
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.planner.distillation_spec import SCALES, DistillationSpec
from mis_mlx.quantization import learned_scales, rounded_size, scale_state
from mis_mlx.quantization.learned_scales import PackedStream
from mis_mlx.quantization.scale_state import ScaleState
from mis_mlx.storage.checkpoint import Written
from mis_mlx.types import MOST, Checkpoint

NORM = "model.norm.weight"  # what the final norm's weight is called in the whole model


@dataclass(frozen=True)
class FoundGradients:
    """Loss and gradients of a step, summed over tokens and machines, evaluated.

    loss: per token, in nats. tokens: how many count. blocks: a vector of each block, the last one
    first. norm: the final norm's. squares: their sums of squares, tensor by tensor in the order of
    the model.
    """

    loss: float
    tokens: float
    blocks: MutableSequence[mx.array]
    norm: mx.array
    squares: list[mx.array]


class Learned(Mapping[str, mx.array]):
    """What a student has learned, by name in the whole model; read where it is asked for."""

    def __init__(
        self,
        state: ScaleState,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        further: Mapping[str, mx.array],
    ):
        self._state = state
        self._further = further
        self._places = {}
        for i, named in enumerate(shapes):
            for name in named:
                self._places[f"{arch.block_prefix(i)}{name}"] = i, name

    def __getitem__(self, name: str) -> mx.array:
        if name in self._further:
            return self._further[name]
        i, inside = self._places[name]
        return self._state.value(i, inside)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._further

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from self._further

    def __len__(self) -> int:
        return len(self._places) + len(self._further)


class PackedStudent:
    """A `train_loop.Student`: a packed one whose scales, biases and norms learn.

    kept: how many blocks' integers stay in memory; the others are read twice a step. state: where
    what learns lives; default: in memory. direct: as in `stream.Stream`. A checkpoint of one state
    can be put back into another.
    """

    own_head = False
    longest_unsaved = MOST

    def __init__(
        self,
        student: Checkpoint,
        kept: int,
        *,
        state: ScaleState | None = None,
        direct: bool = False,
    ):
        self._state = state or scale_state.InMemory()
        self._source = PackedStream(student, kept, self._state, direct=direct)
        norm = load.final_norm(student, mx.float32)
        self._norm = stream.load_checked(norm, f"{student.path}: {load.NORM}")
        (self._norm_name,) = dict[str, Any](tree_flatten(norm.trainable_parameters()))
        self._norm_moments: Mapping[str, Mapping[str, mx.array]] = {}
        self._passes = BlockGradients(
            self._source,
            norm,
            range(self._source.layers),
            norm_learns=True,
            slabs=True,
        )
        self._optimizer = GuardedAdamW(weight_decay=0.0, relative=True)
        self.optimizers = [self._optimizer]

    def learned(self) -> Mapping[str, mx.array]:
        """What learns, by its name in the whole model."""
        return Learned(self._state, self._source.shapes, self._of_norm().weights)

    def arrays(self) -> dict[str, dict[str, mx.array] | Written]:
        """The arrays that a resumed run needs, by checkpoint file: written already, or as they are.

        Moments have the names of their values, and .m or .v.
        """
        files = self._state.entries()
        parts = [self._of_norm()]
        if not files:
            whole = [self._whole(i) for i in range(self._source.layers)]
            parts = [*whole, *parts]
        values: dict[str, mx.array] = {}
        moments = self._optimizer.arrays()
        for part in parts:
            values |= part.weights
            moments |= scale_state.joined(Part({}, part.moments))
        return {"model": values, "optimizer": moments, **files}

    def memory(self) -> dict[str, Any]:
        """The part of a checkpoint that is not an array, for its state.json."""
        return train_loop.remembered(self.optimizers)

    def restore(self, arrays: Mapping[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Put a checkpoint's arrays back, evaluated: a file may go once this returns.

        The mappings are emptied, so that arrays which are lazy are in memory a block at a time.
        """
        found: dict[str, mx.array] = {}
        for named in arrays.values():
            found |= named
            named.clear()
        counts = {name: found.pop(name) for name in list(found) if "." not in name}
        (guard,) = memory["guards"]
        self._optimizer.restore(counts, guard)
        for i, shapes in enumerate(self._source.shapes):
            named = {}
            for name in shapes:
                whole = f"{arch.block_prefix(i)}{name}"
                for ending in ("", *scale_state.MOMENTS):
                    if whole + ending in found:
                        named[name + ending] = found.pop(whole + ending)
            self._state.put(i, scale_state.split(named))
        self._put_norm(scale_state.split(found))

    def look(self, batches: Sequence[MicroBatch], loss: TokenLoss) -> FoundGradients:
        """As `train_loop.Student.look`, of all that learns."""
        forward = self._passes.forward(batches, loss)
        vectors = self._state.new_gradients()
        squares = []
        for i, gradients in self._passes.backward_blocks(forward):
            distributed.sum_gradients(gradients)
            found = optimizer.sums_of_squares(gradients, streams.stream)
            in_turn = [gradients[name] for name in self._source.shapes[i]]
            vector = _as_vector(in_turn, self._source.most_learns)
            evaluate_now(found, vector)
            vectors.append(vector)
            squares.append(found)
            gradients.clear()
            del vector, in_turn
        of_norm = forward.norm
        distributed.sum_gradients(of_norm)
        squares.insert(0, optimizer.sums_of_squares(of_norm))
        (norm,) = of_norm.values()
        evaluate_now(squares, norm)
        # In the order of the whole model: the sum over tensors depends on it.
        in_order = list(chain.from_iterable(reversed(squares)))
        return FoundGradients(
            loss=forward.loss,
            tokens=forward.tokens,
            blocks=vectors,
            norm=norm,
            squares=in_order,
        )

    def apply(self, found: FoundGradients, update: Update) -> Applied:
        """One step of all that learns, a block at a time."""
        scale = update.noise / found.tokens
        norm = scale * distributed.mean(float(optimizer.norm_of_squares(found.squares)))
        learns, note = self._optimizer.decide(
            found.loss,
            norm,
            update.rate,
            batch=update.batch,
            scale=scale,
        )
        if learns:
            self._optimizer.begin_parts(streams.stream)
            for i in range(self._source.layers):
                self._update_block(i, found.blocks[-1 - i])
            part = self._optimizer.updated(self._of_norm(), {NORM: found.norm})
            self._put_norm(part)
            evaluate_now(self._optimizer.adamw.state)
        return Applied(found.loss, found.tokens, norm=norm, note=note, further={})

    def end_step(self, number: int, *, last: bool) -> None:
        """Nothing: whoever saves asks for what was learned."""

    def _update_block(self, i: int, vector: mx.array) -> None:
        """Block i's step. vector: its gradients."""
        gradients = self._by_name(i, vector)
        self._state.put(i, self._optimizer.updated(self._state.part(i), gradients))

    def _by_name(self, i: int, vector: mx.array) -> dict[str, mx.array]:
        """Block i's gradients by name in the block, of their vector; lazy."""
        named = {}
        start = 0
        for name, shape in self._source.shapes[i].items():
            numbers = math.prod(shape)
            named[name] = vector[start : start + numbers].reshape(shape)
            start += numbers
        return named

    def _whole(self, i: int) -> Part:
        """Block i's values and moments, by name in the whole model."""
        part = self._state.part(i)
        prefix = arch.block_prefix(i)
        weights = {f"{prefix}{name}": array for name, array in part.weights.items()}
        moments = {f"{prefix}{name}": of_value for name, of_value in part.moments.items()}
        return Part(weights, moments)

    def _of_norm(self) -> Part:
        """The final norm's value and moments, by name in the whole model."""
        named = dict[str, mx.array](tree_flatten(self._norm.trainable_parameters()))
        (norm,) = named.values()
        return Part({NORM: norm}, self._norm_moments)

    def _put_norm(self, part: Part) -> None:
        """Replace the final norm's value and moments, which may be lazy."""
        evaluate_now(part)
        self._norm.update(tree_unflatten([(self._norm_name, part.weights[NORM])]))
        self._norm_moments = part.moments


def _as_vector(arrays: Sequence[mx.array], size: int) -> mx.array:
    """All numbers of some arrays one after the other, and zeros up to `size`; lazy."""
    flat = mx.concatenate([array.reshape(-1) for array in arrays])
    if len(flat) < size:
        flat = mx.pad(flat, (0, size - len(flat)))
    return flat


def tuning_cost(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """The packed student, whose scales learn in `iters` steps.

    What learns, its gradients and moments, where they fit; else they are in files, a block at a
    time in memory. The integers of one block, and of as many others as there is room for.
    """
    in_memory = _tuning(job, micro, limit, iters, on_disk=False)
    fits = needed_bytes(limit, in_memory.peak_bytes, job.student.gpu) <= limit
    if fits:
        return in_memory
    on_disk = _tuning(job, micro, limit, iters, on_disk=True)
    return min(in_memory, on_disk, key=lambda cost: cost.peak_bytes)


def learning_scales(job: DistillationSpec) -> int:
    """Scales and biases of the student's blocks."""
    return 2 * job.student.all_block_params // job.rounding.q_group_size


def _tuning(
    job: DistillationSpec, micro: int, limit: int, iters: int, *, on_disk: bool
) -> StageCost:
    """All steps. on_disk: what learns and its moments are in a file a block.

    Checkpoints are second names of these files. Room is for gradients first, which would be written
    and read at every step, then for integers, which are only read.
    """
    job = replace(job, iters=iters)
    m = job.student
    layers = m.shape.layers
    in_block = 2 * m.largest_block_params // job.rounding.q_group_size
    state = optimizer.STATE_BYTES * learning_scales(job)
    gradients = optimizer.GRADIENT_BYTES * learning_scales(job)
    of_block = optimizer.GRADIENT_BYTES * in_block
    ledger = _ledger(job, micro, limit, in_block)
    read = 0
    files = 0
    if on_disk:
        ledger.hold("values of the block at work", of_block)
        ledger.hold("its gradients, as they came and as a vector", of_block, count=2)
        held = ledger.fill(GRADIENTS, of_block, layers)
        put_away = (layers - held) * of_block
        # values on the way there and back, all for the update, which writes all of it
        read = job.iters * (2 * gradients + state + put_away)
        written = gradients + job.iters * (state + put_away)
        # a block's new file is there before the old one goes
        files = state + optimizer.STATE_BYTES * in_block + put_away
    else:
        ledger.hold("what learns, gradients and moments", state + gradients)
        written = job.checkpoints * state
    kept = ledger.fill(INTEGERS, _integers_bytes(job), layers)
    reads = layers + 2 * job.iters * (layers - kept)
    one_step = StageCost(
        name=SCALES,
        read_bytes=reads * _packed_block(job) + read,
        written_bytes=rounded_size.rounded_bytes(m, job.rounding) + written,
        flops=block_gradients.step_flops(job),
        updated=learning_scales(job),
        scratch_bytes=files,
    )
    return live_teacher.taught(one_step, ledger, job, micro)


def _ledger(job: DistillationSpec, micro: int, limit: int, learning: int) -> Ledger:
    """What a step holds besides all that learns: integers of one block, and the teacher.

    learning: scales and biases of a block.
    """
    m = job.student
    step = block_gradients.holdings(
        job,
        micro,
        gradient=optimizer.GRADIENT_BYTES * learning,
        # old and new values and moments; gradients as a vector and by name
        update=2 * (optimizer.STATE_BYTES + optimizer.GRADIENT_BYTES) * learning,
        of_stream=learned_scales.product_bytes(m),
        slabs=job.targets == "cached",
    )
    ledger = Ledger(limit, m.gpu)
    # a block comes while another one computes, and leaves its slot
    ledger.hold("slots", _packed_block(job), count=2)
    ledger.hold("integers of the block at work", _integers_bytes(job))
    ledger.moment("step", step=step.peak_bytes)
    live_teacher.hold(ledger, job, micro)
    return ledger


def _packed_block(job: DistillationSpec) -> int:
    """Bytes of a rounded block on disk."""
    m = job.student
    share = m.all_block_params / m.params / m.shape.layers
    return int(share * rounded_size.rounded_bytes(m, job.rounding))


def _integers_bytes(job: DistillationSpec) -> int:
    """Integers of a block in memory: as on disk on Metal; a CPU has a byte for each."""
    m = job.student
    return _packed_block(job) if m.gpu else m.largest_block_params
