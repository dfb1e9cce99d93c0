"""The training loop: micro-batches in, one `Step` out per optimizer step. Works for any masked loss.

Does not know what the loss means, where batches come from, or what is done with a `Step`; it yields and
calls nobody. Cutting a step into micro-batches cannot change it: losses are summed, and divided once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mis_mlx.maths.optimizer import GoralW, cosine, global_norm
from mis_mlx.types import Step

Loss = Callable[..., tuple[mx.array, mx.array]]  # (model, *micro-batch) -> (sum in nats, token count)


@dataclass(frozen=True)
class Schedule:
    """How many steps, and the learning rate of each: linear warm-up, then cosine to `floor` of the peak."""

    iters: int
    peak: float
    warmup: int
    floor: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of 0-based `step`."""
        return cosine(step, self.iters, self.peak, self.warmup, self.floor)


def train(
    model: nn.Module,
    micro_batches: Callable[[int], Sequence[tuple[Any, ...]]],
    loss: Loss,
    optimizer: GoralW,
    schedule: Schedule,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[Step]:
    """Run steps `start` to `schedule.iters`, yielding each as it is done (`Step.number` counts from 1).

    micro_batches(step): what makes up a step, as argument tuples for `loss`. factor(step): eq. (2)'s
    (1 + eps_halny); it scales the gradient, while the loss reported is the plain one.
    """
    gradient_of = nn.value_and_grad(model, loss)
    for step in range(start, schedule.iters):
        began = time.monotonic()
        mx.reset_peak_memory()
        total, count, gradients = mx.array(0.0), mx.array(0.0), None
        for arguments in micro_batches(step):
            (part, n), grads = gradient_of(model, *arguments)
            gradients = grads if gradients is None else tree_map(mx.add, gradients, grads)
            total, count = total + part, count + n
            mx.eval(total, count, gradients)
            del grads
        tokens = max(float(count), 1.0)
        value, scale = float(total) / tokens, factor(step) / tokens
        gradients = tree_map(lambda g, k=scale: g * k, gradients)
        norm = float(global_norm(gradients))
        rate = schedule.rate(step)
        note = optimizer.update(model, gradients, value, norm, rate)
        del gradients
        mx.eval(model.parameters(), optimizer.adamw.state)
        seconds = time.monotonic() - began
        yield Step(step + 1, value, norm, rate, int(tokens), seconds, mx.get_peak_memory(), note)


def arrays_of(model: nn.Module, optimizer: GoralW) -> dict[str, dict[str, mx.array]]:
    """Everything a resumed run needs that is an array, by checkpoint file."""
    return {"model": dict(tree_flatten(model.parameters())), "optimizer": optimizer.arrays()}


def restore(
    model: nn.Module, optimizer: GoralW, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]
) -> None:
    """Put a checkpoint's arrays back, evaluated: a file may go once this returns."""
    model.update(tree_unflatten(list(arrays["model"].items())))
    optimizer.restore(arrays["optimizer"], memory)
    mx.eval(model.parameters(), optimizer.adamw.state)
