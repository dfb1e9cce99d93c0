"""The two sides of distillation: the teacher's targets for a step, and the student's loss against them.

The teacher stays in memory or is streamed, by the plan; either way what crosses over is its final hidden states, and
the vocabulary is met chunk by chunk (maths/losses)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.data.token_windows import Windows, order
from mis_mlx.distillation.train_loop import Loss, train
from mis_mlx.hardware import lanes
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, host_losses, load, policy, stream
from mis_mlx.models.pipeline_parallel import Relay
from mis_mlx.planner.recipe import TrainingConfig
from mis_mlx.types import Batch, Checkpoint, Step

MicroBatch = tuple[mx.array, ...]  # tokens (B, T), learn (B * T,), then the targets of these B * T positions


class TargetSource(Protocol):
    """Where a step's targets come from: the teacher itself, or what it left on disk (distillation/cached_targets)."""

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray]) -> list[MicroBatch]:
        """What a step's micro-batches are. windows: which ones of the data each of them holds, (B,)."""

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """Sum of KL(target || student) in nats, of final hidden states (n, D) and a head (V, D)."""


class StreamedTeacher:
    """Final hidden states of the teacher for any batch, and its vocabulary head. room_bytes, direct: as of
    `stream.Stream`. temperature: T of eq. (2). cross_entropy: as of `losses.kl_sum`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        room_bytes: int | None = 0,
        direct: bool = False,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        shares: Sequence[int] = (),
    ):
        where = checkpoint, policy.compute_dtype(checkpoint), room_bytes, direct
        self._source = Relay(*where, shares) if shares else stream.Stream(*where)
        self._head, self.temperature, self._cross_entropy = self._source.head(), temperature, cross_entropy

    def hidden(self, batches: stream.Batches) -> stream.Hidden:
        """Token ids [(B, T)] -> [(B, T, D)]; a streamed teacher is read once for all of them."""
        return self._source.forward(batches)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (n, D) -> (n, V)."""
        return load.logits(self._head, hidden)

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()) -> list[MicroBatch]:
        """Tokens (B, T), learn (B * T,), the teacher's hidden states (B * T, D); for cross-entropy labels (B * T,)."""
        micro = []
        pieces = [lanes.cut(b.tokens) for b in batches]
        coming = iter(self.hidden(list(chain.from_iterable(pieces))))
        for batch, parts in zip(batches, pieces, strict=True):
            hidden = mx.concatenate([next(coming) for _ in parts])
            label = [labels(batch.tokens)] if self._cross_entropy else []
            micro.append((batch.tokens, batch.learn.reshape(-1), hidden.reshape(-1, hidden.shape[-1]), *label))
        return micro

    def gradient_of(self, student: nn.Module) -> Callable[..., Any] | None:
        """As `train_loop.train` takes it."""
        return partial(_on_host, self, student) if policy.name() == "cpu" and not self._cross_entropy else None

    def frozen_slopes(self) -> Callable[..., tuple[float, mx.array]] | None:
        """As `sharded.steps` takes them."""

        def of(head: mx.array, batches: Sequence[MicroBatch], b: int, hidden: mx.array) -> tuple[float, mx.array]:
            _, learn, target = batches[b]
            loss, slope, _ = host_losses.kl_gradients(hidden, head, target, self.logits, learn, self.temperature, True)
            return loss, slope

        return of if policy.name() == "cpu" and not self._cross_entropy else None

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """`losses.kl_sum` against this teacher's logits."""
        return losses.kl_sum(
            hidden, head, target[0], self.logits, learn, self.temperature, frozen_head=frozen_head,
            labels=target[1] if self._cross_entropy else None, cross_entropy=self._cross_entropy,
        )  # fmt: skip


class TextTargets:
    """The text itself as the source: what is then summed is plain cross-entropy."""

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()) -> list[MicroBatch]:
        """Tokens (B, T), learn and labels (B * T,)."""
        return [(b.tokens, b.learn.reshape(-1), labels(b.tokens)) for b in batches]

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """KL to a target that has all its mass on one token, which is the cross-entropy, in nats."""
        ids = target[0][:, None]
        return losses.sampled_kl_sum(hidden, head, ids, mx.ones(ids.shape), learn, frozen_head=frozen_head)


def labels(tokens: mx.array) -> mx.array:
    """The token after each of tokens (B, T), (B * T,); the last column's are nothing, `learn` is 0 there."""
    return mx.roll(tokens, -1, 1).reshape(-1)


def _on_host(
    source: StreamedTeacher, student: nn.Module, tokens: mx.array, learn: mx.array, target: mx.array
) -> tuple[tuple[mx.array, mx.array], Any]:
    """What `nn.value_and_grad` gives of `loss_of(source)`, evaluated; the vocabulary by numpy, windows side by side.
    The way back is laid out before the way forth is gone, so that only what it needs is kept: from a cotangent of
    zeros, whose memory numpy then fills."""
    trained = dict(tree_flatten(student.trainable_parameters()))
    cotangent = mx.zeros((tokens.size, student.args.hidden_size))
    hidden: list[mx.array] = []

    def forth(*arrays: mx.array) -> mx.array:
        student.update(tree_unflatten(list(zip(trained, arrays, strict=True))))
        hidden.append(lanes.rows(student.model, tokens).reshape(cotangent.shape))
        return hidden[0]

    with lanes.together():
        _, slopes = mx.vjp(forth, list(trained.values()), [cotangent])
        student.update(tree_unflatten(list(trained.items())))
        mx.eval(hidden, cotangent)
    name = "lm_head.weight" if hasattr(student, "lm_head") else "model.embed_tokens.weight"
    head = load.head_weight(student)
    how = source.logits, learn, source.temperature, name not in trained
    loss, below, of_head = host_losses.kl_gradients(hidden[0], head, target, *how)
    host_losses.view(cotangent)[:] = host_losses.view(below)
    found = dict(zip(trained, slopes, strict=True))
    del slopes
    if of_head is not None:
        found[name] = found[name] + of_head
    with lanes.together():
        mx.eval(found)
    return (mx.array(loss), learn.sum()), tree_unflatten(list(found.items()))


def loss_of(source: TargetSource) -> Loss:
    """`loss(student, tokens, learn, *target)` -> (sum of KL in nats, tokens that count), of a resident student."""

    def loss(student: nn.Module, tokens: mx.array, learn: mx.array, *target: mx.array) -> tuple[mx.array, mx.array]:
        hidden = student.model(tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return source.kl_sum(hidden, load.head_weight(student), learn, *target), learn.sum()

    return loss


def step_micro_batches(
    source: TargetSource, data: Windows, recipe: TrainingConfig
) -> Callable[[int], list[MicroBatch]]:
    """The micro-batches of any step, this machine's of several: a pure function of its number."""
    each = recipe.batch_size * recipe.grad_accumulation_steps

    def micro_batches(step: int) -> list[MicroBatch]:
        at = distributed.shard(order(len(data.tokens), each, step, recipe.seed))
        parts = [at[i : i + recipe.batch_size] for i in range(0, len(at), recipe.batch_size)]
        return source.micro_batches([Batch(mx.array(data.tokens[p]), mx.array(data.learn[p])) for p in parts], parts)

    return micro_batches


def steps(
    student: nn.Module,
    source: TargetSource,
    data: Windows,
    recipe: TrainingConfig,
    optimizer: GuardedAdamW,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[Step]:
    """Optimizer steps `start` to `recipe.iters`, as `train_loop.train`."""
    micro_batches, loss = step_micro_batches(source, data, recipe), loss_of(source)
    quicker = source.gradient_of(student) if isinstance(source, StreamedTeacher) else None
    return train(student, micro_batches, loss, optimizer, recipe.schedule, start, factor, gradient_of=quicker)
