"""Token sequences of different lengths into rectangles: several to a window, or one to a row, padded at the end.

Padding is never learned and never seen by a real token, so it changes nothing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data.examples import Sequenced
from mis_mlx.data.token_windows import order

MULTIPLE = 8  # that a padded length is of: fewer different shapes, for which memory is kept
PADDING = -1  # the row that padding is of


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of sequences that share a window of `room` tokens: best fit, longest first; every index once."""
    windows, free = list[list[int]](), list[tuple[int, int]]()  # free: (tokens left, window), rising
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[index], -1))
        left, window = free.pop(at) if at < len(free) else (room, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window].append(index)
        insort(free, (left - lengths[index], window))
    return windows


def rectangle(windows: Sequence[Sequence[Sequenced]]) -> tuple[mx.array, mx.array, mx.array]:
    """(tokens, learn, rows), (B, T) each: one window a line, its sequences one after the other, then padding. learn is
    1 where the prediction made there, of the next token, counts. rows numbers the sequences of a window."""
    longest = max(sum(len(ids) for ids, _ in window) for window in windows)
    shape = len(windows), -(-longest // MULTIPLE) * MULTIPLE
    tokens, learn, rows = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.full(shape, PADDING, np.int32)
    for line, window in enumerate(windows):
        begin = 0
        for number, (ids, marks) in enumerate(window):
            end = begin + len(ids)
            tokens[line, begin:end], rows[line, begin:end] = ids, number
            learn[line, begin : end - 1] = marks[1:]
            begin = end
    return mx.array(tokens), mx.array(learn), mx.array(rows)


def drawn(
    lengths: Sequence[int],
    batch_size: int,
    parts: int,
    step: int,
    seed: int,
    share: Callable[[Any], Any] = lambda at: at,
) -> list[np.ndarray]:
    """The indices of a step's `parts` micro-batches: a pure function of its arguments. Those of like length come
    together, which saves padding and changes nothing: a step is one sum. share: of all indices those that are wanted
    here."""
    at = order(len(lengths), batch_size * parts, step, seed)
    at = share(at[np.argsort([lengths[i] for i in at], kind="stable")])
    return [at[i : i + batch_size] for i in range(0, len(at), batch_size)]


def by_length(label: str, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """All indices in batches of like length, which saves padding; how many are done is on display."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    starts = range(0, len(order), batch_size)
    for start in cli.counted(label, starts, len(starts)):
        yield order[start : start + batch_size]
