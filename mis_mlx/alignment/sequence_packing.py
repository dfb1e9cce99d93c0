"""Token sequences of different lengths as rectangles: several to a window, or one to a row; and the
loss of answers.

Padding is never learned and never seen by a real token, so it changes nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.data import examples, token_windows
from mis_mlx.distillation.live_teacher import MicroBatch, TargetSource, labels
from mis_mlx.maths.losses import token_logps
from mis_mlx.models import attention_masks, distributed, load
from mis_mlx.planner.recipe import TrainingConfig

MULTIPLE = 8  # that a padded length is of: fewer different shapes, for which memory is kept
PADDING = -1  # the row that padding is of


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of sequences that share a window of `room` tokens: best fit, longest first; every
    index once.
    """
    # free: (tokens left, window), rising
    windows = list[list[int]]()
    free = list[tuple[int, int]]()
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[index], -1))
        left, window = free.pop(at) if at < len(free) else (room, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window].append(index)
        insort(free, (left - lengths[index], window))
    return windows


def rectangle(
    windows: Sequence[Sequence[examples.Sequenced]],
) -> tuple[mx.array, mx.array, mx.array]:
    """(tokens, learn, rows), (B, T) each: one window a line, its sequences one after the other,
    then padding. learn is 1 where the prediction made there, of the next token, counts. rows
    numbers the sequences of a window from 1.
    """
    longest = max(sum(len(ids) for ids, _ in window) for window in windows)
    shape = len(windows), -(-longest // MULTIPLE) * MULTIPLE
    tokens = np.zeros(shape, np.int32)
    learn = np.zeros(shape, np.float32)
    rows = np.full(shape, PADDING, np.int32)
    for line, window in enumerate(windows):
        begin = 0
        for number, (ids, marks) in enumerate(window, 1):
            end = begin + len(ids)
            tokens[line, begin:end], rows[line, begin:end] = ids, number
            learn[line, begin : end - 1] = marks[1:]
            begin = end
    return mx.array(tokens), mx.array(learn), mx.array(rows)


def drawn(lengths: Sequence[int], s: TrainingConfig, step: int) -> list[np.ndarray]:
    """This machine's part of the indices of a step's micro-batches: a pure function of its
    arguments. Those of like length come together, which saves padding and changes nothing: a step
    is one sum.
    """
    at = token_windows.order(len(lengths), s.batch_size * s.grad_accumulation_steps, step, s.seed)
    at = distributed.shard(at[np.argsort([lengths[i] for i in at], kind="stable")])
    return [at[i : i + s.batch_size] for i in range(0, len(at), s.batch_size)]


def visited(count: int, s: TrainingConfig) -> np.ndarray:
    """Which of `count` rows the steps of a training see, rising."""
    in_a_step = s.batch_size * s.grad_accumulation_steps
    batches = [token_windows.order(count, in_a_step, step, s.seed) for step in range(s.iters)]
    return np.unique(np.concatenate(batches))


def by_length(label: str, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """All indices in batches of like length, which saves padding; how many are done is on
    display.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    yield from cli.counted(label, batches, len(batches))


class PackedDataset:
    """Rows of (ids, learn) as windows to draw micro-batches from. room: tokens of a shared window;
    0: one row each.
    """

    def __init__(self, rows: Sequence[examples.Sequenced], room: int = 0):
        lengths = [len(ids) for ids, _ in rows]
        shared = packed(lengths, room) if room else [[i] for i in range(len(rows))]
        self.shared = bool(room)
        self.windows = [[rows[i] for i in window] for window in shared]
        self.lengths = [sum(lengths[i] for i in window) for window in shared]

    def micro_batches(self, source: TargetSource, s: TrainingConfig, step: int) -> list[MicroBatch]:
        """Those of a step: tokens and rows (B, T), then learn (B * T,) and the source's targets."""
        at = drawn(self.lengths, s, step)
        cut = [rectangle([self.windows[i] for i in part]) for part in at]
        signal = source.micro_batches([(tokens, learn) for tokens, learn, _ in cut], at)
        return [
            (tokens, rows, *rest) for (_, _, rows), (tokens, *rest) in zip(cut, signal, strict=True)
        ]

    def loss(
        self,
        source: TargetSource,
        frozen_head: bool,
        student: nn.Module,
        tokens: mx.array,
        rows: mx.array,
        learn: mx.array,
        *target: mx.array,
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum in nats, tokens that count, {"tokens": all}) of a micro-batch."""
        hidden = self.hidden(student, tokens, rows)
        total = source.kl_sum(
            hidden, load.head_weight(student), learn, *target, frozen_head=frozen_head
        )
        return total, learn.sum(), {"tokens": (rows != PADDING).sum()}

    def hidden(self, student: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
        """Final hidden states (B * T, D). A row alone in its window needs no mask: padding comes
        after it.
        """
        hidden = (
            attention_masks.forward(student, tokens, rows) if self.shared else student.model(tokens)
        )
        return hidden.reshape(-1, hidden.shape[-1])

    def measure(self, student: nn.Module, batch_size: int) -> dict[str, float]:
        """{"loss": cross-entropy of what is to be learned, in nats per token} over all windows."""
        total = 0.0
        count = 0.0
        for at in by_length("held out: batch", self.lengths, batch_size):
            tokens, learn, rows = rectangle([self.windows[i] for i in at])
            hidden = self.hidden(student, tokens, rows)
            targets = labels(tokens)
            head = load.head_weight(student)
            cap = load.logit_softcap(student)
            total -= float(
                (token_logps(hidden, head, targets, softcap=cap) * learn.reshape(-1)).sum()
            )
            count += float(learn.sum())
        return {"loss": total / max(count, 1.0)}
