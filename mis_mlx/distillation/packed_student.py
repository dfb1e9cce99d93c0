"""Train the scales, biases and norms of a packed student, block by block; integers never change.

A step goes forward through all blocks and back, as in distillation/block_gradients: the integers of
one block are in memory at a time, and of as many others as there is room for. What learns is small,
a twentieth of the weights, and stays in memory with its gradients and moments. So every block
learns in every step, under one guard, and the bits of the result do not depend on the room.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.block_gradients import BlockGradients, MicroBatch
from mis_mlx.distillation.train_loop import Applied, StepGradients, Update
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import altup, distributed, load, stream
from mis_mlx.models.stream import evaluate_now
from mis_mlx.quantization.learned_scales import PackedStream
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.types import Checkpoint, Step

NORM = "model.norm.weight"  # what the final norm's weight is called in the whole model


class PackedStudent:
    """A packed student whose scales, biases and norms learn.

    kept: how many blocks' integers stay in memory; the others are read twice a step. direct: as in
    `stream.Stream`. As `train_loop.WholeModel` for checkpoints, whose files are the same.
    """

    def __init__(
        self, student: Checkpoint, kept: int, *, weight_decay: float = 0.0, direct: bool = False
    ):
        self._source = PackedStream(student, kept, direct=direct)
        norm = load.final_norm(student, mx.float32)
        self._norm = stream.load_checked(norm, f"{student.path}: {load.NORM}")
        if isinstance(norm, altup.Exit):  # the matrices beside the norm do not learn
            norm.freeze()
            norm.norm.unfreeze()
        (self._norm_name,) = dict[str, Any](tree_flatten(norm.trainable_parameters()))
        self._passes = BlockGradients(
            self._source, norm, range(self._source.layers), norm_learns=True, slabs=True
        )
        self._optimizer = GuardedAdamW(weight_decay=weight_decay, relative=True)
        self.optimizers = [self._optimizer]

    def learned(self) -> dict[str, mx.array]:
        """What learns, by its name in the whole model."""
        named = {}
        for i, values in enumerate(self._source.learned):
            for name, array in values.items():
                named[f"model.layers.{i}.{name}"] = array
        (named[NORM],) = dict[str, mx.array](
            tree_flatten(self._norm.trainable_parameters())
        ).values()
        return named

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The arrays that a resumed run needs, by checkpoint file."""
        return {"model": self.learned(), "optimizer": self._optimizer.arrays()}

    def memory(self) -> dict[str, Any]:
        """The part of a checkpoint that is not an array, for its state.json."""
        return self._optimizer.memory()

    def restore(self, arrays: Mapping[str, Mapping[str, mx.array]], memory: dict[str, Any]) -> None:
        """Put a checkpoint's arrays back, evaluated: a file may go once this returns."""
        self._put(arrays["model"])
        self._optimizer.restore(dict(arrays["optimizer"]), memory)
        evaluate_now(self.learned(), self._optimizer.adamw.state)

    def steps(
        self,
        micro_batches: Callable[[int], Sequence[MicroBatch]],
        loss: TokenLoss,
        recipe: TrainingConfig,
        start: int = 0,
        factor: Callable[[int], float] = lambda step: 1.0,
    ) -> Iterator[Step]:
        """Run steps `start` to `recipe.iters` as `train_loop.train` does."""

        def look(step: int) -> StepGradients:
            return self._gradients(micro_batches(step), loss)

        return train_loop.run_steps(
            look,
            self._apply,
            recipe,
            lambda: self._optimizer.lr_scale,
            start=start,
            factor=factor,
        )

    def _gradients(self, batches: Sequence[MicroBatch], loss: TokenLoss) -> StepGradients:
        """Of all that learns, by name; of all machines."""
        forward = self._passes.forward(batches, loss)
        of_block = dict(self._passes.backward_blocks(forward))
        named = {}
        # In the order of the whole model: sums over tensors depend on it.
        for i in range(self._source.layers):
            for name, gradient in of_block.pop(i).items():
                named[f"model.layers.{i}.{name}"] = gradient
        (named[NORM],) = forward.norm.values()
        distributed.all_reduce_gradients(named)
        return StepGradients(
            forward.loss, forward.tokens, grads=tree_unflatten(list(named.items()))
        )

    def _apply(self, found: StepGradients, update: Update) -> Applied:
        """One step of all that learns."""
        learned = tree_unflatten(list(self.learned().items()))
        done = train_loop.guarded_update(learned, found, self._optimizer, update)
        self._put(dict(tree_flatten(learned)))
        del learned
        evaluate_now(self.learned(), self._optimizer.adamw.state)
        return done

    def _put(self, named: Mapping[str, mx.array]) -> None:
        """Replace what was learned, by its name in the whole model."""
        for i, values in enumerate(self._source.learned):
            for name in values:
                values[name] = named[f"model.layers.{i}.{name}"]
        self._norm.update(tree_unflatten([(self._norm_name, named[NORM])]))
