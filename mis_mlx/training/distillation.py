"""The two sides of distillation: the teacher's targets for a step, and the student's loss against them.

Does not know steps, optimizers or files. The teacher stays in memory or is streamed, by the plan; either
way what crosses over is its final hidden states, and the vocabulary is met chunk by chunk (maths/losses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.disk.text import Windows, order
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.model import load, stream
from mis_mlx.training.loop import train
from mis_mlx.training.recipe import Recipe
from mis_mlx.types import Batch, Checkpoint, Step

MicroBatch = tuple[mx.array, mx.array, mx.array]  # tokens (B, T), learn (B * T,), teacher hidden (B * T, D)


class Teacher:
    """Final hidden states of the teacher for any batch, and its vocabulary head."""

    def __init__(self, checkpoint: Checkpoint, resident: bool):
        self._source = stream.Stream(checkpoint, load.compute_dtype(), None if resident else 0)
        self._head = self._source.head()

    def hidden(self, batches: Sequence[mx.array]) -> stream.Hidden:
        """Token ids [(B, T)] -> [(B, T, D)]; a streamed teacher is read once for all of them."""
        return self._source.forward(batches)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (n, D) -> (n, V)."""
        return load.logits(self._head, hidden)

    def micro_batches(self, batches: Sequence[Batch]) -> list[MicroBatch]:
        """What `loss` wants, for each micro-batch of one optimizer step."""
        hidden = self.hidden([b.tokens for b in batches])
        return [
            (b.tokens, b.learn.reshape(-1), h.reshape(-1, h.shape[-1])) for b, h in zip(batches, hidden, strict=True)
        ]


def loss_against(teacher: Teacher, temperature: float) -> Callable[..., tuple[mx.array, mx.array]]:
    """`loss(student, tokens, learn, teacher_hidden)` -> (sum of forward KL in nats, tokens that count)."""

    def loss(student: nn.Module, tokens: mx.array, learn: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
        hidden = student.model(tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        kl = losses.kl_sum(hidden, load.head_weight(student), target, teacher.logits, learn, temperature)
        return kl, learn.sum()

    return loss


def steps(
    student: nn.Module,
    teacher: Teacher,
    data: Windows,
    recipe: Recipe,
    optimizer: GoralW,
    start: int,
    temperature: float,
    sigma: Callable[[], float],
) -> Iterator[Step]:
    """Optimizer steps `start` to `recipe.iters` of distillation, as `loop.train` yields them.

    sigma(): spread of eps_halny, asked at every step.
    """
    each = recipe.batch_size * recipe.grad_accumulation_steps

    def micro_batches(step: int) -> list[MicroBatch]:
        at = order(len(data.tokens), each, step, recipe.seed)
        parts = [at[i : i + recipe.batch_size] for i in range(0, each, recipe.batch_size)]
        return teacher.micro_batches([Batch(mx.array(data.tokens[p]), mx.array(data.learn[p])) for p in parts])

    loss = loss_against(teacher, temperature)
    return train(
        student,
        micro_batches,
        loss,
        optimizer,
        recipe.schedule,
        start,
        lambda step: losses.halny_factor(sigma(), recipe.seed, step),
    )
