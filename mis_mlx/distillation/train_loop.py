"""The training loop: micro-batches in, one `Step` out per optimizer step, for any student.

A step is the same however it is cut into micro-batches, and however these are shared out to
machines (models/passing/distributed): losses are summed, and divided once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import mlx.core as mx

from mis_mlx.compute import streams
from mis_mlx.hardware import clock
from mis_mlx.maths.optimizer import global_norm
from mis_mlx.models.passing import distributed
from mis_mlx.runs.run_loop import Trained
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.types import Step

CLOCK = clock.Clock()
# The arguments of a loss. In distillation: tokens (B, T), loss_mask (B * T,), then the targets of
# these B * T positions.
MicroBatch = tuple[Any, ...]
MicroBatches = Callable[[int], Sequence[MicroBatch]]  # of a step, counted from 0
F = TypeVar("F")  # what a step finds before it changes a weight
L = TypeVar("L", contravariant=True)  # a loss that the student knows


class Update(NamedTuple):
    """How a step updates weights. noise: eq. (2)'s (1 + eps_halny). batch: from 1."""

    noise: float
    rate: float
    batch: int


def scaled_norm(gradients: Any, tokens: float, update: Update) -> tuple[float, float]:
    """(scale, norm) of a step's gradients: what they are multiplied by, and their norm then.

    gradients: their sums over all machines' `tokens`, a tree of arrays.
    """
    scale = update.noise / tokens
    return scale, scale * distributed.mean(float(global_norm(gradients, streams.stream)))


class Applied(NamedTuple):
    """A step that is done. norm: of its gradient, a token. note: what the guard did.

    further: means of a loss's further sums.
    """

    loss: float
    tokens: float
    norm: float
    note: str
    further: Mapping[str, float]


class Student(Trained, Protocol[L, F]):
    """What learns: blocks one after the other (block_student), or a model in one graph
    (alignment/whole_model).
    """

    def look(self, batches: Sequence[MicroBatch], loss: L) -> F:
        """Loss and gradients of a step, of all machines; no weight changes."""

    def apply(self, found: F, update: Update) -> Applied:
        """Change weights by what was found."""

    def end_step(self, number: int, *, last: bool) -> None:
        """Step `number`, from 1, is done and not saved yet. last: the run's last one."""


def steps(
    student: Student[L, F],
    micro_batches: MicroBatches,
    loss: L,
    recipe: TrainingConfig,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[Step]:
    """Run steps `start` to `recipe.iters`; yield each when it is done.

    `Step.number` counts from 1. factor(step): eq. (2)'s (1 + eps_halny); it scales the gradient,
    while the loss reported is the plain one. A step during which the machine slept (the lid was
    closed) is discarded before it touches the weights, and done again.
    """

    def look(step: int) -> F:
        return student.look(micro_batches(step), loss)

    for step in range(start, recipe.iters):
        rate = recipe.rate(step)
        update = Update(noise=factor(step), rate=rate, batch=step + 1)
        began, slept, found = _redone_after_sleep(partial(look, step))
        applied = student.apply(found, update)
        del found  # not beside the next step's
        seconds = CLOCK.monotonic() - began
        further = dict(applied.further)
        tokens = further.pop("tokens", applied.tokens)
        done = Step(
            number=step + 1,
            loss=applied.loss,
            grad_norm=applied.norm,
            learning_rate=rate * student.optimizers[0].lr_scale,
            tokens=int(tokens),
            seconds=seconds,
            peak_bytes=mx.get_peak_memory(),
            note=(slept + applied.note).strip(),
            further=further,
        )
        student.end_step(done.number, last=done.number == recipe.iters)
        yield done


def _redone_after_sleep(work: Callable[[], F]) -> tuple[float, str, F]:
    """(when `work` began, a note, its result); it is done again where the machine slept meanwhile.

    Several machines do it again together, for the work has sums over all of them in it.
    """
    note = ""
    while True:
        began = CLOCK.monotonic()
        mark = CLOCK.asleep()
        mx.reset_peak_memory()
        result = work()
        (slept,) = distributed.sums(CLOCK.slept(mark))
        if not slept:
            return began, note, result
        note = f"the machine slept {slept / 60:.0f} min; step done again. "
