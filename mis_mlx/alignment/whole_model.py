"""A model that is in memory whole and learns as one graph: all weights, or those of adapters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mis_mlx.compute import streams
from mis_mlx.compute.logits import logit_bytes
from mis_mlx.distillation.train_loop import Applied, MicroBatch, Update, scaled_norm
from mis_mlx.hardware.memory import in_flight_bytes
from mis_mlx.maths import optimizer
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import distributed
from mis_mlx.models.passing.residency import activation_bytes, backward_bytes
from mis_mlx.types import MOST

# (model, *micro-batch) -> (sum in nats, token count); and, if a loss wants, further sums {name:
# scalar}, whose means come with the step. "tokens" among these is no mean: how many tokens went
# through, where the count is of other things.
Loss = Callable[..., tuple[Any, ...]]
# (model, *micro-batch) -> (a loss's sums, gradients of the first of them)
ValueAndGrad = Callable[..., tuple[tuple[Any, ...], Any]]
# Names of the first two sums of a loss, beside those that a loss names itself.
_LOSS = "loss, summed"
_COUNT = "tokens that count"


@dataclass
class StepGradients:
    """Loss and gradients of one step on all machines, evaluated.

    loss: per token, in nats. tokens: how many count. grads: of the *sum* over tokens, nested as the
    model is. further: means of the loss's further sums.
    """

    loss: float
    tokens: float
    grads: Any
    further: dict[str, float]


class WholeModel:
    """A `train_loop.Student`: a module whose trainable parameters learn under one guard."""

    longest_unsaved = MOST

    def __init__(self, model: nn.Module, optimizer: GuardedAdamW):
        self.model = model.train()
        self.optimizers = [optimizer]

    def look(self, batches: Sequence[MicroBatch], loss: Loss) -> StepGradients:
        """As `train_loop.Student.look`."""
        return _gradients(self.model, nn.value_and_grad(self.model, loss), batches)

    def apply(self, found: StepGradients, update: Update) -> Applied:
        """As `train_loop.Student.apply`; all weights at once."""
        optimizer = self.optimizers[0]
        grads = found.grads
        found.grads = None  # the update alone holds them from here on
        scale, norm = scaled_norm(grads, found.tokens, update)
        note = optimizer.update(
            self.model,
            grads,
            found.loss,
            norm,
            learning_rate=update.rate,
            batch=update.batch,
            scale=scale,
            stream_of=streams.stream,
        )
        # Nothing but the lazy update holds the gradients then, so they go as it is evaluated.
        del grads
        mx.eval(self.model.parameters(), optimizer.adamw.state)
        return Applied(found.loss, found.tokens, norm=norm, note=note, further=found.further)

    def end_step(self, number: int, *, last: bool) -> None:
        """Nothing: weights are in memory, and checkpoints hold them."""

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The arrays that a resumed run needs, by checkpoint file."""
        trained = dict(tree_flatten(self.model.trainable_parameters()))
        return {"model": trained, "optimizer": self.optimizers[0].arrays()}

    def memory(self) -> dict[str, Any]:
        """The part of a checkpoint that is not an array, for its state.json."""
        return {"guards": [self.optimizers[0].memory()]}

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Put a checkpoint's arrays back, evaluated: a file may go once this returns."""
        (guard,) = memory["guards"]
        optimizer = self.optimizers[0]
        self.model.update(tree_unflatten(list(arrays["model"].items())))
        optimizer.restore(arrays["optimizer"], guard)
        mx.eval(self.model.parameters(), optimizer.adamw.state)


def as_in_training(model: nn.Module, work: Callable[[nn.Module], mx.array]) -> mx.array:
    """`work(model)` as it is where a gradient is taken of it, evaluated; no gradient is computed.

    MLX then leaves out its fused attention, which has no gradient, so the last bits differ from a
    plain forward pass.
    """
    results = []

    def summed(model: nn.Module) -> mx.array:
        results.append(work(model))
        return results[0].sum()

    _, grads = nn.value_and_grad(model, summed)(model)
    del grads  # never evaluated; they would keep all activations
    mx.eval(results)
    return results[0]


def _gradients(
    model: nn.Module, gradient_of: ValueAndGrad, batches: Sequence[MicroBatch]
) -> StepGradients:
    """Of one step."""
    summed_grads = None
    sums = {_LOSS: mx.array(0.0), _COUNT: mx.array(0.0)}
    for arguments in batches:
        (loss_sum, count, *further), grads = gradient_of(model, *arguments)
        summed_grads = grads if summed_grads is None else tree_map(mx.add, summed_grads, grads)
        parts = {_LOSS: loss_sum, _COUNT: count}
        if further:
            parts |= further[0]
        for name, part in parts.items():
            sums[name] = sums.get(name, mx.array(0.0)) + part
        # After each micro-batch: lazily, the activations of all of them would be held together.
        mx.eval(summed_grads, sums)
        del grads
    if summed_grads is None:  # a machine without a part in this step
        summed_grads = tree_map(mx.zeros_like, model.trainable_parameters())
    distributed.sum_gradients(sums)
    totals = {name: float(part) for name, part in sums.items()}
    tokens = max(totals.pop(_COUNT), 1.0)
    loss = totals.pop(_LOSS) / tokens
    means = {name: value / tokens for name, value in totals.items()}
    if "tokens" in totals:
        means["tokens"] = totals["tokens"]
    # By name: the sums over machines replace the gradients one group after the other.
    named = dict(tree_flatten(summed_grads))
    del summed_grads
    distributed.sum_gradients(named)
    grads = tree_unflatten(list(named.items()))
    return StepGradients(loss, tokens, grads=grads, further=means)


def step_bytes(
    m: ModelSize,
    batch: int,
    length: int,
    *,
    accumulates: bool = False,
) -> int:
    """What a step of `WholeModel` holds where all weights learn, on micro-batches (batch, length).

    Model and loss are one graph, of which the least that can be promised is the sum. accumulates:
    several micro-batches, so that the gradients of earlier ones wait meanwhile.
    """
    s = m.shape
    activations = activation_bytes(m, batch, length)
    block = backward_bytes(m, batch, length) - activations // s.layers
    gradients = optimizer.GRADIENT_BYTES * m.params
    summed = gradients if accumulates else 0
    largest = max(map(math.prod, arch.tensors_of(m.config, True).values()))
    held = optimizer.STATE_BYTES * m.params
    held += min(activations, in_flight_bytes()) if m.gpu else 0
    forward = activations + 2 * 4 * s.vocab * s.hidden  # two heads
    forward += logit_bytes(s.vocab, batch * length, gpu=m.gpu)
    backward = block + summed
    update = optimizer.update_bytes(largest)
    return held + gradients + max(forward + summed, backward, update)
