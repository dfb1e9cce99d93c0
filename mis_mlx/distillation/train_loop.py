"""The training loop: micro-batches in, one `Step` out per optimizer step, for any masked loss.

A step is the same however it is cut into micro-batches, and however these are shared out to
machines (models/distributed): losses are summed, and divided once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mis_mlx.compute import streams
from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.hardware import clock
from mis_mlx.maths.optimizer import GuardedAdamW, global_norm
from mis_mlx.models import distributed
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.types import Step

CLOCK = clock.Clock()
# (model, *micro-batch) -> (sum in nats, token count); and, if a loss wants, further sums {name:
# scalar}, whose means come with the step. "tokens" among these is no mean: how many tokens went
# through, where the count is of other things.
Loss = Callable[..., tuple[Any, ...]]
# (model, loss) -> (model, *micro-batch) -> (the loss's sums, gradients of the first of them)
ValueAndGrad = Callable[[nn.Module, Any], Callable[..., Any]]
# number of a step, from 0 -> its micro-batches
MicroBatches = Callable[[int], Sequence[tuple[Any, ...]]]
# Names of the first two sums of a loss, beside those that a loss names itself.
_LOSS = "loss, summed"
_COUNT = "tokens that count"
F = TypeVar("F")  # what a step finds before it changes a weight


def train(
    model: nn.Module,
    micro_batches: MicroBatches,
    loss: Loss | TokenLoss,
    optimizer: GuardedAdamW,
    recipe: TrainingConfig,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
    value_and_grad: ValueAndGrad = nn.value_and_grad,
) -> Iterator[Step]:
    """Run steps `start` to `recipe.iters`; yield each when it is done.

    `Step.number` counts from 1. micro_batches: argument tuples for `loss`. factor(step): eq. (2)'s
    (1 + eps_halny); it scales the gradient, while the loss reported is the plain one.
    value_and_grad(model, loss): the function that gives sums and gradients of a micro-batch.

    A step during which the machine slept (the lid was closed) is discarded before it touches the
    weights, and done again.
    """
    gradient_of = value_and_grad(model, loss)

    def apply(found: StepGradients, update: Update) -> Applied:
        done = guarded_update(model, found, optimizer, update)
        mx.eval(model.parameters(), optimizer.adamw.state)
        return done

    yield from run_steps(
        partial(_gradients, model, gradient_of, micro_batches),
        apply,
        recipe,
        lambda: optimizer.lr_scale,
        start=start,
        factor=factor,
    )


@dataclass
class StepGradients:
    """Loss and gradients of one step on all machines, evaluated.

    loss: per token, in nats. tokens: how many count. grads: of the *sum* over tokens, nested as the
    model is. further: means of the loss's further sums.
    """

    loss: float
    tokens: float
    grads: Any
    further: dict[str, float] = field(default_factory=dict)

    def take(self) -> Any:
        """The gradients, which whoever takes them alone holds from then on."""
        grads = self.grads
        self.grads = None
        return grads


class Update(NamedTuple):
    """How a step updates weights. noise: eq. (2)'s (1 + eps_halny). batch: from 1."""

    noise: float
    rate: float
    batch: int


class Applied(NamedTuple):
    """A step that is done. norm: of its gradient, a token. note: what the guard did."""

    loss: float
    tokens: float
    norm: float
    note: str
    further: dict[str, float]


def run_steps(
    look: Callable[[int], F],
    apply: Callable[[F, Update], Applied],
    recipe: TrainingConfig,
    lr_scale: Callable[[], float],
    *,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[Step]:
    """Run steps `start` to `recipe.iters` of any student; yield each when it is done.

    look(step, from 0): what the step finds without changing a weight; it is done again where the
    machine slept meanwhile. apply: changes weights by it. lr_scale(): the guard's factor on every
    rate. factor: as of `train`.
    """
    for step in range(start, recipe.iters):
        rate = recipe.rate(step)
        update = Update(noise=factor(step), rate=rate, batch=step + 1)
        began, slept, found = redone_after_sleep(partial(look, step))
        done = apply(found, update)
        del found  # not beside the next step's
        seconds = CLOCK.monotonic() - began
        further = dict(done.further)
        tokens = further.pop("tokens", done.tokens)
        yield Step(
            number=step + 1,
            loss=done.loss,
            grad_norm=done.norm,
            learning_rate=rate * lr_scale(),
            tokens=int(tokens),
            seconds=seconds,
            peak_bytes=mx.get_peak_memory(),
            note=(slept + done.note).strip(),
            further=further,
        )


def guarded_update(
    model: Any, found: StepGradients, optimizer: GuardedAdamW, update: Update
) -> Applied:
    """Update all of a model's weights at once, lazily. model: a module, or nested weights."""
    grads = found.take()
    scale = update.noise / found.tokens
    # The first machine's norm on all machines: the guard must decide alike everywhere.
    norm = distributed.broadcast_json(partial(float, global_norm(grads, streams.stream)))
    norm = scale * norm
    note = optimizer.update(
        model,
        grads,
        found.loss,
        norm,
        learning_rate=update.rate,
        batch=update.batch,
        scale=scale,
        stream_of=streams.stream,
    )
    # Nothing but the lazy update holds the gradients then, so they go as it is evaluated.
    return Applied(found.loss, found.tokens, norm=norm, note=note, further=found.further)


def redone_after_sleep(work: Callable[[], Any]) -> tuple[float, str, Any]:
    """(when `work` began, a note, its result); it is done again where the machine slept meanwhile.

    Several machines do it again together, for the work has sums over all of them in it.
    """
    note = ""
    while True:
        began = CLOCK.monotonic()
        mark = CLOCK.asleep()
        mx.reset_peak_memory()
        result = work()
        slept = max(distributed.all_gather(CLOCK.slept(mark)))
        if not slept:
            return began, note, result
        note = f"the machine slept {slept / 60:.0f} min; step done again. "


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
    model: nn.Module, gradient_of: Callable[..., Any], micro_batches: MicroBatches, step: int
) -> StepGradients:
    """Of one step of a model that is one graph."""
    summed_grads = None
    sums = {_LOSS: mx.array(0.0), _COUNT: mx.array(0.0)}
    for arguments in micro_batches(step):
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
    totals = dict[str, float]()
    own_sums = {name: float(part) for name, part in sums.items()}
    for machine in distributed.all_gather(own_sums):
        for name, value in machine.items():
            totals[name] = totals.get(name, 0.0) + value
    tokens = max(totals.pop(_COUNT), 1.0)
    loss = totals.pop(_LOSS) / tokens
    means = {name: value / tokens for name, value in totals.items()}
    if "tokens" in totals:
        means["tokens"] = totals["tokens"]
    # By name: the sums over machines replace the gradients one group after the other.
    named = dict(tree_flatten(summed_grads))
    del summed_grads
    distributed.all_reduce_gradients(named)
    grads = tree_unflatten(list(named.items()))
    return StepGradients(loss, tokens, grads=grads, further=means)


class WholeModel:
    """A model that `train` trains, as `run_loop.CheckpointedTraining` saves it and puts it back."""

    def __init__(self, model: nn.Module, optimizer: GuardedAdamW):
        self.model = model
        self.optimizers = [optimizer]
        self.memory = optimizer.memory

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The arrays that a resumed run needs, by checkpoint file."""
        trained = dict(tree_flatten(self.model.trainable_parameters()))
        return {"model": trained, "optimizer": self.optimizers[0].arrays()}

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Put a checkpoint's arrays back, evaluated: a file may go once this returns."""
        optimizer = self.optimizers[0]
        self.model.update(tree_unflatten(list(arrays["model"].items())))
        optimizer.restore(arrays["optimizer"], memory)
        mx.eval(self.model.parameters(), optimizer.adamw.state)
