"""Supervised fine-tuning: the loss of answers, in windows that several rows share; perhaps with a teacher's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.alignment import sequence_packing
from mis_mlx.data.examples import Sequenced
from mis_mlx.distillation.live_teacher import MicroBatch, TargetSource, labels
from mis_mlx.distillation.train_loop import Loss
from mis_mlx.maths.likelihood import token_logps
from mis_mlx.models import attention_masks, distributed, load
from mis_mlx.types import Batch


class PackedDataset:
    """Rows of (ids, learn) as windows to draw micro-batches from. room: tokens of a window that rows share; 0: one
    row a window."""

    def __init__(self, rows: Sequence[Sequenced], room: int = 0):
        lengths = [len(ids) for ids, _ in rows]
        shared = sequence_packing.packed(lengths, room) if room else [[i] for i in range(len(rows))]
        self.shared = bool(room)
        self.windows = [[rows[i] for i in window] for window in shared]
        self.lengths = [sum(lengths[i] for i in window) for window in shared]

    def micro_batches(
        self, source: TargetSource, batch_size: int, parts: int, seed: int
    ) -> Callable[[int], list[MicroBatch]]:
        """Those of any step: tokens and rows (B, T), then learn (B * T,) and the source's targets."""

        def of_step(step: int) -> list[MicroBatch]:
            at = sequence_packing.drawn(self.lengths, batch_size, parts, step, seed, distributed.shard)
            cut = [sequence_packing.rectangle([self.windows[i] for i in part]) for part in at]
            signal = source.micro_batches([Batch(tokens, learn) for tokens, learn, _ in cut], at)
            return [(tokens, rows, *rest) for (_, _, rows), (tokens, *rest) in zip(cut, signal, strict=True)]

        return of_step

    def loss_of(self, source: TargetSource, frozen_head: bool) -> Loss:
        """`loss(student, tokens, rows, learn, *target)` -> (sum in nats, tokens that count, {"tokens": all})."""

        def loss(
            student: nn.Module, tokens: mx.array, rows: mx.array, learn: mx.array, *target: mx.array
        ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            hidden = self.hidden(student, tokens, rows)
            head = load.head_weight(student)
            total = source.kl_sum(hidden, head, learn, *target, frozen_head=frozen_head)
            return total, learn.sum(), {"tokens": (rows != sequence_packing.PADDING).sum()}

        return loss

    def hidden(self, student: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
        """Final hidden states (B * T, D). A row alone in its window needs no mask: padding comes after it."""
        hidden = attention_masks.forward_rows(student, tokens, rows) if self.shared else load.hidden_of(student, tokens)
        return hidden.reshape(-1, hidden.shape[-1])

    def measure(self, student: nn.Module, batch_size: int) -> dict[str, float]:
        """{"loss": cross-entropy of what is to be learned, in nats per token} over all windows."""
        total, count = 0.0, 0.0
        for at in sequence_packing.by_length("held out: batch", self.lengths, batch_size):
            tokens, learn, rows = sequence_packing.rectangle([self.windows[i] for i in at])
            hidden = self.hidden(student, tokens, rows)
            logps = token_logps(hidden, load.head_weight(student), labels(tokens))
            total -= float((logps * learn.reshape(-1)).sum())
            count += float(learn.sum())
        return {"loss": total / max(count, 1.0)}
