"""The two sides of distillation: the teacher's targets for a step, and the student's loss against them.

Does not know steps, optimizers or files. The teacher stays in memory or is streamed, by the plan; either
way what crosses over is its final hidden states, and the vocabulary is met chunk by chunk (maths/losses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.disk.text import Windows, order
from mis_mlx.maths import losses, sparse
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.model import load, policy, ranks, reconstruct, stream
from mis_mlx.model.relay import Relay
from mis_mlx.training.loop import Loss, train
from mis_mlx.training.recipe import Recipe
from mis_mlx.types import Batch, Checkpoint, Keep, Step

MicroBatch = tuple[mx.array, ...]  # tokens (B, T), learn (B * T,), then the targets of these B * T positions


class Source(Protocol):
    """Where a step's targets come from: the teacher itself, or what it left on disk (training/targets)."""

    middle: Middle | None  # where states inside are compared, too

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray]) -> list[MicroBatch]:
        """What a step's micro-batches are. windows: which ones of the data each of them holds, (B,)."""

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """Sum of KL(target || student) in nats, of final hidden states (n, D) and a head (V, D)."""


@dataclass(frozen=True)
class Middle:
    """Where the states of student and teacher are compared inside (arXiv 2407.14679, table 17: cosine, last block but
    two). Of the residual streams themselves; the paper's are normed. share: weight beside the loss on logits."""

    block: int  # of the student, whose output
    depth: int  # blocks of the teacher whose last one's output it should be
    keep: Keep
    share: float

    @classmethod
    def of(cls, keep: Keep, layers: int, share: float) -> Middle:
        """The last block but two, or the first, and the entrance of the next layer kept of a teacher of `layers`."""
        block = max(0, len(keep.layers) - 3)
        return cls(block, [*keep.layers[1:], layers][block], keep, share)

    def forward(self, student: nn.Module, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """(final hidden states, those behind the block) of a resident student, (B, T, D) each."""
        after = student.model.layers[self.block + 1 :]
        owner, name = (after[0], "input_layernorm") if after else (student.model, "norm")
        norm = owner[name]
        owner[name] = tap = stream.Tap(norm)
        hidden = student.model(tokens)
        owner[name] = norm
        return hidden, tap.take()


class Teacher:
    """Final hidden states of the teacher for any batch, and its vocabulary head.

    room_bytes, direct: as of `stream.Stream`. temperature: T of eq. (2). cross_entropy: as of `losses.kl_sum`.
    middle: a micro-batch ends with the teacher's states (B * T, D) there, in the student's channels.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        room_bytes: int | None = 0,
        direct: bool = False,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        divergence: Literal["forward", "reverse"] = "forward",
        middle: Middle | None = None,
        shares: Sequence[int] = (),
    ):
        where = checkpoint, policy.compute_dtype(checkpoint), room_bytes, direct
        self._source = Relay(*where, shares) if shares else stream.Stream(*where)
        self._head, self._temperature = self._source.head(), temperature
        self._cross_entropy, self._reverse, self.middle = cross_entropy, divergence == "reverse", middle

    def hidden(self, batches: Sequence[mx.array]) -> stream.Hidden:
        """Token ids [(B, T)] -> [(B, T, D)]; a streamed teacher is read once for all of them."""
        return self._source.forward(batches)

    def _states(self, batches: Sequence[mx.array], middle: Middle) -> tuple[stream.Hidden, list[mx.array]]:
        """`hidden`, and the states in the middle in the student's channels."""
        hidden, inside = self._source.embed(batches), []
        columns = reconstruct.kept_columns(middle.keep)
        for i, block in self._source.blocks():
            self._source.through(block, hidden)
            if i + 1 == middle.depth:
                inside = [reconstruct.narrow(h, columns) for h in hidden]
                mx.eval(inside)
        return self._source.norm(hidden), inside

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (n, D) -> (n, V)."""
        return load.logits(self._head, hidden)

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()) -> list[MicroBatch]:
        """Tokens (B, T), learn (B * T,), the teacher's hidden states (B * T, D); labels (B * T,) and states in the
        middle where they are asked for."""
        tokens = [b.tokens for b in batches]
        hidden, inside = self._states(tokens, self.middle) if self.middle else (self.hidden(tokens), [])
        targets = [[h.reshape(-1, h.shape[-1])] for h in hidden]
        for at, target in enumerate(targets):
            target += [labels(tokens[at])] if self._cross_entropy else []
            target += [h.reshape(-1, h.shape[-1]) for h in inside[at : at + 1]]
        return [(b.tokens, b.learn.reshape(-1), *target) for b, target in zip(batches, targets, strict=True)]

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """`losses.kl_sum` against this teacher's logits."""
        return losses.kl_sum(
            hidden, head, target[0], self.logits, learn, self._temperature, frozen_head=frozen_head,
            labels=target[1] if self._cross_entropy else None, cross_entropy=self._cross_entropy, reverse=self._reverse,
        )  # fmt: skip


class Text:
    """The text itself as the source: what is then summed is plain cross-entropy."""

    middle: Middle | None = None

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()) -> list[MicroBatch]:
        """Tokens (B, T), learn and labels (B * T,)."""
        return [(b.tokens, b.learn.reshape(-1), labels(b.tokens)) for b in batches]

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """KL to a target that has all its mass on one token, which is the cross-entropy, in nats."""
        ids = target[0][:, None]
        return sparse.sampled_kl_sum(hidden, head, ids, mx.ones(ids.shape), learn, frozen_head=frozen_head)


def labels(tokens: mx.array) -> mx.array:
    """The token after each of tokens (B, T), (B * T,); the last column's are nothing, `learn` is 0 there."""
    return mx.roll(tokens, -1, 1).reshape(-1)


def loss_of(source: Source) -> Loss:
    """`loss(student, tokens, learn, *target)` -> (sum of KL in nats, tokens that count), of a resident student.

    With states in the middle their cosine has a part in the gradient, by a weight of each micro-batch's own.
    """
    middle = source.middle

    def loss(student: nn.Module, tokens: mx.array, learn: mx.array, *target: mx.array) -> tuple[mx.array, mx.array]:
        hidden, inside = middle.forward(student, tokens) if middle else (student.model(tokens), None)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        total = source.kl_sum(hidden, load.head_weight(student), learn, *target)
        if middle and inside is not None:
            apart = losses.cosine_sum(inside.reshape(-1, inside.shape[-1]), target[-1], learn)
            total = losses.balanced(total, apart, middle.share)
        return total, learn.sum()

    return loss


def cut(source: Source, data: Windows, recipe: Recipe) -> Callable[[int], list[MicroBatch]]:
    """The micro-batches of any step, this machine's of several: a pure function of its number."""
    each = recipe.batch_size * recipe.grad_accumulation_steps

    def micro_batches(step: int) -> list[MicroBatch]:
        at = ranks.share(order(len(data.tokens), each, step, recipe.seed))
        parts = [at[i : i + recipe.batch_size] for i in range(0, len(at), recipe.batch_size)]
        return source.micro_batches([Batch(mx.array(data.tokens[p]), mx.array(data.learn[p])) for p in parts], parts)

    return micro_batches


def steps(
    student: nn.Module,
    source: Source,
    data: Windows,
    recipe: Recipe,
    optimizer: GoralW,
    start: int = 0,
    sigma: Callable[[], float] = lambda: 0.0,
) -> Iterator[Step]:
    """Optimizer steps `start` to `recipe.iters` of distillation, as `loop.train` yields them.

    sigma(): spread of eps_halny, asked at every step.
    """
    return train(
        student,
        cut(source, data, recipe),
        loss_of(source),
        optimizer,
        recipe.schedule,
        start,
        lambda step: losses.halny_factor(sigma(), recipe.seed, step),
    )
