"""Token sequences of different lengths as rectangles, one to a line; and the loss of answers.

Padding is never learned and never seen by a real token, so it changes nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.data import examples, token_windows
from mis_mlx.maths.losses import next_tokens, token_logps
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed
from mis_mlx.settings.recipe import TrainingConfig

MULTIPLE = 8  # of padded lengths: fewer different shapes, for which memory is kept


def padded(rows: Sequence[tuple[Any, Any]]) -> tuple[mx.array, mx.array]:
    """(tokens, learn), (B, T) each: a row a line, then padding.

    learn is 1 where the prediction made there, of the next token, counts.
    """
    longest = max(len(ids) for ids, _ in rows)
    shape = (len(rows), -(-longest // MULTIPLE) * MULTIPLE)
    tokens = np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, np.float32)
    for line, (ids, marks) in enumerate(rows):
        tokens[line, : len(ids)] = ids
        # A mark belongs to a token; the prediction of that token is made one place before.
        loss_mask[line, : len(ids) - 1] = marks[1:]
    return mx.array(tokens), mx.array(loss_mask)


def drawn_indices(lengths: Sequence[int], s: TrainingConfig, step: int) -> list[np.ndarray]:
    """This machine's part of the indices of a step's micro-batches.

    A pure function of its arguments. Sequences of like length come together, which saves padding
    and changes nothing: a step is one sum.
    """
    in_a_step = s.batch_size * s.grad_accumulation_steps
    indices = token_windows.order(len(lengths), in_a_step, step, s.seed)
    rising = np.argsort([lengths[i] for i in indices], kind="stable")
    own = distributed.shard(indices[rising])
    return [own[start : start + s.batch_size] for start in range(0, len(own), s.batch_size)]


def visited_rows(count: int, s: TrainingConfig) -> np.ndarray:
    """The rows, of `count`, that the steps of a training see, rising."""
    in_a_step = s.batch_size * s.grad_accumulation_steps
    batches = (token_windows.order(count, in_a_step, step, s.seed) for step in range(s.iters))
    return token_windows.drawn(count, batches)


def by_length(label: str, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """All indices in batches of like length, which saves padding.

    The display shows how many batches are done, under `label`.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    yield from cli.show_progress(label, batches)


class Rows:
    """Rows of (ids, learn) to draw micro-batches from."""

    def __init__(self, rows: Sequence[examples.Sequenced]):
        self.rows = rows
        self.lengths = [len(ids) for ids, _ in rows]

    def micro_batches(self, s: TrainingConfig, step: int) -> list[tuple[mx.array, ...]]:
        """Those of a step: tokens (B, T), learn (B, T), and how many tokens are no padding."""
        batches = list[tuple[mx.array, ...]]()
        for indices in drawn_indices(self.lengths, s, step):
            tokens, loss_mask = padded([self.rows[i] for i in indices])
            count = sum(self.lengths[i] for i in indices)
            batches.append((tokens, loss_mask, mx.array(float(count))))
        return batches

    def loss(
        self,
        frozen_head: bool,
        student: nn.Module,
        tokens: mx.array,
        loss_mask: mx.array,
        count: mx.array,
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(cross-entropy in nats, tokens that count, {"tokens": all}) of a micro-batch."""
        hidden = student.model(tokens)
        logps = token_logps(
            hidden.reshape(-1, hidden.shape[-1]),
            load.head_weight(student),
            next_tokens(tokens),
            frozen_head=frozen_head,
            softcap=load.logit_softcap(student),
        )
        total = -(logps * loss_mask.reshape(-1)).sum()
        return total, loss_mask.sum(), {"tokens": count}

    def measure(self, student: nn.Module, batch_size: int) -> dict[str, float]:
        """{"loss": cross-entropy of the tokens to be learned, in nats per token} on all rows."""
        total = 0.0
        count = 0.0
        for batch in by_length("held out: batch", self.lengths, batch_size):
            tokens, loss_mask = padded([self.rows[i] for i in batch])
            hidden = student.model(tokens)
            logps = token_logps(
                hidden.reshape(-1, hidden.shape[-1]),
                load.head_weight(student),
                next_tokens(tokens),
                softcap=load.logit_softcap(student),
            )
            total -= float((logps * loss_mask.reshape(-1)).sum())
            count += float(loss_mask.sum())
        return {"loss": total / max(count, 1.0)}
