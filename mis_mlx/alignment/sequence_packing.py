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
from mis_mlx.distillation.live_teacher import MicroBatch, TargetSource, next_tokens
from mis_mlx.maths.losses import token_logps
from mis_mlx.models.opening import load
from mis_mlx.models.passing import attention_masks, distributed
from mis_mlx.settings.recipe import TrainingConfig

MULTIPLE = 8  # of padded lengths: fewer different shapes, for which memory is kept
PADDING = -1  # number of the row that padding belongs to


def pack(lengths: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Indices of sequences that share a window of `window_tokens` tokens: best fit, longest first.

    Every index occurs once. Sequences of equal length keep their order.
    """
    windows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, window), rising
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fit = bisect_left(free, (length, -1))  # the fullest window with enough room
        if fit < len(free):
            left, window = free.pop(fit)
            windows[window].append(index)
        else:
            left = window_tokens
            window = len(windows)
            windows.append([index])
        insort(free, (left - length, window))
    return windows


def padded_windows(
    windows: Sequence[Sequence[examples.Sequenced]],
) -> tuple[mx.array, mx.array, mx.array]:
    """(tokens, learn, rows), (B, T) each: one window a line, its sequences in order, then padding.

    learn is 1 where the prediction made there, of the next token, counts. rows numbers the
    sequences of a window from 1.
    """
    lengths = []
    for window in windows:
        lengths.append(sum(len(ids) for ids, _ in window))
    shape = (len(windows), -(-max(lengths) // MULTIPLE) * MULTIPLE)
    tokens = np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, np.float32)
    rows = np.full(shape, PADDING, np.int32)
    for line, window in enumerate(windows):
        begin = 0
        for number, (ids, marks) in enumerate(window, 1):
            end = begin + len(ids)
            tokens[line, begin:end] = ids
            rows[line, begin:end] = number
            # A mark belongs to a token; the prediction of that token is made one place before.
            loss_mask[line, begin : end - 1] = marks[1:]
            begin = end
    return mx.array(tokens), mx.array(loss_mask), mx.array(rows)


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
    yield from cli.show_progress(label, batches, len(batches))


class PackedDataset:
    """Rows of (ids, learn) as windows to draw micro-batches from.

    window_tokens: tokens of a shared window; 0: one row each.
    """

    def __init__(self, rows: Sequence[examples.Sequenced], window_tokens: int = 0):
        lengths = [len(ids) for ids, _ in rows]
        groups = [[index] for index in range(len(rows))]
        if window_tokens:
            groups = pack(lengths, window_tokens)
        self.shared = bool(window_tokens)
        self.windows: list[list[examples.Sequenced]] = []
        self.lengths: list[int] = []
        for group in groups:
            self.windows.append([rows[index] for index in group])
            self.lengths.append(sum(lengths[index] for index in group))

    def micro_batches(self, source: TargetSource, s: TrainingConfig, step: int) -> list[MicroBatch]:
        """Those of a step: tokens and rows (B, T), loss_mask (B * T,), the source's targets."""
        indices = drawn_indices(self.lengths, s, step)
        batches = []
        rows_of_batches = []
        for batch in indices:
            tokens, loss_mask, rows = padded_windows([self.windows[index] for index in batch])
            batches.append((tokens, loss_mask))
            rows_of_batches.append(rows)
        targets = source.micro_batches(batches, indices)
        micro_batches = []
        for rows, (tokens, *rest) in zip(rows_of_batches, targets, strict=True):
            micro_batches.append((tokens, rows, *rest))
        return micro_batches

    def loss(
        self,
        source: TargetSource,
        frozen_head: bool,
        student: nn.Module,
        tokens: mx.array,
        rows: mx.array,
        loss_mask: mx.array,
        *target: mx.array,
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum in nats, tokens that count, {"tokens": all}) of a micro-batch."""
        hidden = self.hidden(student, tokens, rows)
        head = load.head_weight(student)
        token_loss = source.token_loss().by_mlx
        total = token_loss(hidden, head, loss_mask, *target, frozen_head=frozen_head)
        return total, loss_mask.sum(), {"tokens": (rows != PADDING).sum()}

    def hidden(self, student: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
        """Final hidden states (B * T, D) of tokens and rows (B, T)."""
        if self.shared:
            hidden = attention_masks.forward(student, tokens, rows)
        else:
            # A row alone in its window needs no mask: padding comes after it.
            hidden = student.model(tokens)
        return hidden.reshape(-1, hidden.shape[-1])

    def measure(self, student: nn.Module, batch_size: int) -> dict[str, float]:
        """{"loss": cross-entropy of the tokens to be learned, in nats per token} on all windows."""
        total = 0.0
        count = 0.0
        for batch in by_length("held out: batch", self.lengths, batch_size):
            tokens, loss_mask, rows = padded_windows([self.windows[index] for index in batch])
            logps = token_logps(
                self.hidden(student, tokens, rows),
                load.head_weight(student),
                next_tokens(tokens),
                softcap=load.logit_softcap(student),
            )
            total -= float((logps * loss_mask.reshape(-1)).sum())
            count += float(loss_mask.sum())
        return {"loss": total / max(count, 1.0)}
