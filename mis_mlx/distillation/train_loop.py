"""The training loop: micro-batches in, one `Step` out per optimizer step. Works for any masked
loss.

Cutting a step into micro-batches cannot change it, nor can sharing these out to machines
(models/distributed): losses are summed, and divided once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mis_mlx.hardware import clock, lanes
from mis_mlx.maths.optimizer import GuardedAdamW, global_norm
from mis_mlx.models import distributed
from mis_mlx.planner.recipe import TrainingConfig
from mis_mlx.types import Step

CLOCK = clock.Clock()
# (model, *micro-batch) -> (sum in nats, token count); and, if a loss wants, further sums {name:
# scalar}, whose means come with the step. "tokens" among these is no mean: how many tokens went
# through, where the count is of other things.
Loss = Callable[..., tuple[Any, ...]]
# of a step, counted from 0: what makes it up
MicroBatches = Callable[[int], Sequence[tuple[Any, ...]]]


def train(
    model: nn.Module,
    micro_batches: MicroBatches,
    loss: Loss,
    optimizer: GuardedAdamW,
    recipe: TrainingConfig,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
    gradient_of: Callable[..., Any] | None = None,
) -> Iterator[Step]:
    """Run steps `start` to `recipe.iters`, yielding each as it is done (`Step.number` counts from
    1).

    micro_batches: argument tuples for `loss`. factor(step): eq. (2)'s (1 + eps_halny); it scales
    the gradient, while the loss reported is the plain one. A step during which the machine slept
    (the lid was closed) is discarded before it touches the weights, and done again. gradient_of:
    what `nn.value_and_grad` gives for a micro-batch, where somebody has a quicker way there.
    """
    gradients = partial(
        _gradients,
        model,
        gradient_of or partial(nn.value_and_grad(model, loss), model),
        micro_batches,
    )
    for step in range(start, recipe.iters):
        began, note, (value, tokens, summed, means) = awake(partial(gradients, step))
        scale = factor(step) / tokens
        rate = recipe.rate(step)
        # From the first machine: whoever is led by the norm is led alike.
        norm = scale * distributed.broadcast_json(partial(float, global_norm(summed, lanes.lane)))
        note += optimizer.update(model, summed, value, norm, rate, step + 1, scale, lanes.lane)
        del summed
        mx.eval(model.parameters(), optimizer.adamw.state)
        seconds = CLOCK.monotonic() - began
        peak = mx.get_peak_memory()
        seen = int(means.pop("tokens", tokens))
        yield Step(
            step + 1,
            value,
            norm,
            rate * optimizer.calm,
            seen,
            seconds,
            peak,
            note.strip(),
            more=means,
        )


def awake(work: Callable[[], Any]) -> tuple[float, str, Any]:
    """(when `work` began, what is to be noted, what it gives): it is done again where the machine
    slept meanwhile.
    """
    note = ""
    while True:
        began = CLOCK.monotonic()
        mark = CLOCK.asleep()
        mx.reset_peak_memory()
        given = work()
        if not (slept := max(distributed.all_gather(CLOCK.slept(mark)))):
            return began, note, given
        note = f"the machine slept {slept / 60:.0f} min; step done again. "


def as_in_training(model: nn.Module, work: Callable[[nn.Module], mx.array]) -> mx.array:
    """`work(model)` as it is where a gradient is taken of it, evaluated; no gradient is computed.

    MLX then leaves out its fused attention, of which there is none, so the last bits differ from a
    plain forward pass."""
    found = list[mx.array]()

    def seen(model: nn.Module) -> mx.array:
        found.append(work(model))
        return found[0].sum()

    _, gradients = nn.value_and_grad(model, seen)(model)
    del gradients  # never evaluated; they would keep all activations
    mx.eval(found)
    return found[0]


def _gradients(
    model: nn.Module, gradient_of: Callable[..., Any], micro_batches: MicroBatches, step: int
) -> tuple[float, float, Any, dict[str, float]]:
    """(loss per token in nats, tokens, gradients of the *sum* over tokens, further means) of one
    step, evaluated.
    """
    gradients = None
    sums = {"loss, summed": mx.array(0.0), "tokens that count": mx.array(0.0)}
    for arguments in micro_batches(step):
        (part, n, *more), grads = gradient_of(*arguments)
        gradients = grads if gradients is None else tree_map(mx.add, gradients, grads)
        found = {"loss, summed": part, "tokens that count": n, **(more[0] if more else {})}
        sums |= {name: sums.get(name, mx.array(0.0)) + value for name, value in found.items()}
        mx.eval(gradients, sums)
        del grads
    if gradients is None:  # a machine without a part in this step
        gradients = tree_map(mx.zeros_like, model.trainable_parameters())
    whole = dict[str, float]()
    for machine in distributed.all_gather({name: float(value) for name, value in sums.items()}):
        for name, value in machine.items():
            whole[name] = whole.get(name, 0.0) + value
    tokens = max(whole.pop("tokens that count"), 1.0)
    loss = whole.pop("loss, summed") / tokens
    means = {name: value / (1.0 if name == "tokens" else tokens) for name, value in whole.items()}
    named = dict(tree_flatten(gradients))
    del gradients
    distributed.all_reduce_gradients(named)
    return loss, tokens, tree_unflatten(list(named.items())), means


class Whole:
    """A model that `train` trains, as `run_loop.CheckpointedTraining` saves it and puts it back."""

    def __init__(self, model: nn.Module, optimizer: GuardedAdamW):
        self.model = model
        self.optimizers = [optimizer]
        self.memory = optimizer.memory

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """Everything a resumed run needs that is an array, by checkpoint file."""
        trained = dict(tree_flatten(self.model.trainable_parameters()))
        return {"model": trained, "optimizer": self.optimizers[0].arrays()}

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Put a checkpoint's arrays back, evaluated: a file may go once this returns."""
        self.model.update(tree_unflatten(list(arrays["model"].items())))
        self.optimizers[0].restore(arrays["optimizer"], memory)
        mx.eval(self.model.parameters(), self.optimizers[0].adamw.state)
