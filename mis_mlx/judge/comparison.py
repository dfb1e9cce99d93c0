"""Students against their teacher on held-out windows: loss, KL, agreement, per window. Streamed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import logit_figures, precision
from mis_mlx.compute.logit_figures import ARRAYS, CHUNK, GROUP
from mis_mlx.data.token_windows import Windows
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.answer_figures import bits_per_byte
from mis_mlx.maths import stats
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import forward_flops, pass_workspace, side_bytes
from mis_mlx.models.passing.stream import Hidden, Stream, evaluate_now, head_rows
from mis_mlx.types import Checkpoint, MisError, Row

Models = Mapping[str, Checkpoint]  # by name
Means = Mapping[tuple[str, str], np.ndarray]  # (model, metric) -> (N,), one value per window
Passed = tuple[Stream, Hidden]  # a model and its final states [(1, T, D)] of every window
ACROSS = (
    "The other models have a smaller vocabulary than the teacher. For KL and same top token, the "
    "teacher reads their tokens, and only the shared rows count."
)
METRICS = ("nll", "kl", "top1", "ear")  # of a student, in the order of `by_window`


def spread_windows(held_out: Windows, count: int) -> Windows:
    """`count` windows spread evenly over the held-out text, or all when there are fewer."""
    return held_out.pick(stats.spread(len(held_out.tokens), count))


def final_hidden(
    model: Checkpoint,
    held_out: Windows,
) -> Hidden:
    """The model's final hidden states [(1, T, D)] of every window. Streamed."""
    batches = [mx.array(window[None]) for window in held_out.tokens]
    return Stream(model).forward(batches)


def compare(
    models: Models,
    held_out: Windows,
    hidden: Hidden | None = None,
) -> Means:
    """Per-window means (N,) of every model, by (model, metric). Streamed.

    The first model is the teacher; it has "nll" only. Students have "nll", "kl" (teacher to
    student), both in nats, "top1", the share of equal top tokens, and "ear", how often both can
    draw the same token. A window without predictions that count has 0 everywhere: leave it out, as
    `rows_of` does.

    One block of one model is in memory at a time, then parts of the teacher's head and of one
    student's. hidden: the teacher's `final_hidden`, where it is compared with many students in
    several calls. A student that is the teacher's own Checkpoint is not measured again.
    """
    (teacher, base), *students = models.items()
    if hidden is None:
        hidden = final_hidden(base, held_out)
    measured = {}
    # A teacher without other students is compared with itself: that is how its own nll comes about.
    others = [(name, model) for name, model in students if model is not base]
    for name, model in others or [(teacher, base)]:
        states = hidden
        if model is not base:
            states = final_hidden(model, held_out)
        passed = (Stream(model), states)
        teacher_nll, *measured[name] = window_means((Stream(base), hidden), passed, held_out)
    means_of: dict[tuple[str, str], np.ndarray] = {(teacher, "nll"): teacher_nll}
    # What a student is given that is the teacher; a window without predictions has 0 everywhere.
    counted = np.asarray(held_out.loss_mask[:, :-1].any(axis=1)).astype(np.float64)
    same = [teacher_nll, np.zeros(len(counted)), counted, counted]
    for name, _ in students:
        for metric, values in zip(METRICS, measured.get(name, same), strict=True):
            means_of[name, metric] = values
    return means_of


def window_means(base: Passed, other: Passed, held_out: Windows) -> np.ndarray:
    """(5, N): the means of `by_window` over the predictions of each window, 0 where it has none."""
    means = []
    for values in by_window(base, other, held_out):
        if len(values):
            means.append(values.mean(axis=0))
        else:
            means.append(np.zeros(5))
    return np.array(means).reshape(-1, 5).T


@dataclass(frozen=True)
class _Chunk:
    """Up to CHUNK predictions of one window.

    positions (n,): where the predictions are made. targets (n,): the tokens that follow there.
    parts: of each part of the vocabulary so far, what `logit_figures.compared` says, (n, 11).
    """

    window: int
    positions: np.ndarray
    targets: np.ndarray
    parts: list[Any] = field(default_factory=list)


def by_window(
    base: Passed,
    other: Passed,
    held_out: Windows,
) -> Iterator[np.ndarray]:
    """(n, 5) float64 for each window, one row for each of its n predictions that count.

    Columns: those of `logit_figures.over_parts`, the base being the teacher there. The heads come
    in parts of the vocabulary; each part is read once for as many windows as have GROUP tokens
    together.
    """
    total, length = held_out.tokens.shape
    size = max(1, GROUP // length)
    for first in range(0, total, size):
        last = min(first + size, total)
        chunks_of = [_chunks(held_out, window) for window in range(first, last)]
        chunks = list(chain.from_iterable(chunks_of))
        _compare_chunks(base, other, chunks)
        for of_window in chunks_of:
            values = [logit_figures.over_parts(chunk.parts) for chunk in of_window]
            # A window without predictions that count still has its entry, with no rows.
            none = np.zeros((0, 5))
            yield np.concatenate([none, *values])


def _chunks(held_out: Windows, window: int) -> list[_Chunk]:
    """The predictions of one window that count, in chunks, so that few rows of logits (CHUNK, v)
    are in memory at a time.
    """
    tokens = held_out.tokens[window]
    # No token follows the last one, so nothing is predicted there.
    counted = np.flatnonzero(held_out.loss_mask[window][:-1])
    chunks = []
    for start in range(0, len(counted), CHUNK):
        positions = counted[start : start + CHUNK]
        targets = tokens[positions + 1]
        chunks.append(_Chunk(window, positions, targets))
    return chunks


def _compare_chunks(base: Passed, other: Passed, chunks: Sequence[_Chunk]) -> None:
    """Give every chunk what each part of the vocabulary says of it.

    A softmax over the vocabulary needs all logits of a row. Whole heads may not fit in memory, so
    each part leaves its share of the normalizers, the KL, the target's logit and the top token;
    `logit_figures.over_parts` puts them together.
    """
    base_stream, base_hidden = base
    other_stream, other_hidden = other
    base_shape = shape_of(base_stream.checkpoint.config)
    other_shape = shape_of(other_stream.checkpoint.config)
    # A student with a trimmed vocabulary is compared over the rows that both have.
    vocab = min(base_shape.vocab, other_shape.vocab)
    rows = head_rows(max(base_shape.hidden, other_shape.hidden), vocab)
    base_parts = base_stream.head_parts(vocab, rows)
    other_parts = other_stream.head_parts(vocab, rows)
    # Both heads advance in step: one part of each is in memory.
    for (start, base_head), (_, other_head) in zip(base_parts, other_parts, strict=True):
        for chunk in chunks:
            base_logits = _logits(base_head, base_hidden, chunk)
            if other_hidden is base_hidden:  # a model beside itself
                other_logits = base_logits * 1
            else:
                other_logits = _logits(other_head, other_hidden, chunk)
            part = logit_figures.compared(base_logits, other_logits, chunk.targets, start)
            chunk.parts.append(part)
            if not precision.stacks():
                evaluate_now(part)
        # A GPU waits once a part of the head, not once a chunk.
        parts = [chunk.parts[-1] for chunk in chunks]
        evaluate_now(parts)
        for chunk, part in zip(chunks, parts, strict=True):
            chunk.parts[-1] = np.asarray(part)


def _logits(head: nn.Module, hidden: Hidden, chunk: _Chunk) -> mx.array:
    """(n, v) float32 logits of a chunk's n predictions, over the v tokens of a part of the head."""
    states = hidden[chunk.window][0]
    positions = mx.array(chunk.positions)
    return load.wide_logits(head, states[positions])


def nats_of(values: np.ndarray, windows: Windows) -> np.ndarray:
    """(N,) nats of each window's text, from means (N,) over its tokens."""
    counted = windows.loss_mask[:, :-1] > 0
    return values * counted.sum(axis=1)


def per_byte(values: np.ndarray, windows: Windows) -> float:
    """Nats per byte of the text of all windows together, from means (N,) over each one's tokens."""
    nats = nats_of(values, windows)
    return float(nats.sum() / windows.text_bytes.sum())


def rows_of(figures: Means, held_out: Windows | None = None) -> list[Row]:
    """One row per model and metric, with its 95 % interval over windows.

    The loss also gives perplexity, and bits per byte ("bpb") and tokens per byte ("tpb") where the
    bytes of `held_out` were counted.
    """
    rows = []
    for (name, metric), values in figures.items():
        counted = values
        if held_out:
            # A window in which no prediction counts has no mean.
            counted = values[held_out.loss_mask[:, :-1].any(axis=1)]
        count = len(counted)
        mean, low, high = stats.interval(counted)
        rows.append(Row(name, metric, mean, low=low, high=high, n=count))
        if metric != "nll":
            continue
        perplexity = Row(
            name,
            metric="ppl",
            value=math.exp(mean),
            low=math.exp(low),
            high=math.exp(high),
            n=count,
        )
        rows.append(perplexity)
        if held_out and held_out.text_bytes is not None and held_out.text_bytes.any():
            bits = bits_per_byte(nats_of(values, held_out), held_out.text_bytes)
            rows.append(Row(name, "bpb", *bits, n=len(values)))
            tokens = per_byte(np.ones(len(values)), held_out)
            rows.append(Row(name, "tpb", tokens, n=len(values)))
    return rows


def held_out_rows(
    models: Models, seen: Checkpoint, windows: Windows, own: Windows | None = None
) -> list[Row]:
    """Rows of a teacher and its students on held-out windows, one after the other.

    seen: stands for the teacher: it has the students' tokens. own: the same text in the teacher's
    own tokens, where these are others: its rows are then those of its whole vocabulary, and none is
    per token.
    """
    rows = rows_of(compare({**models, "teacher": seen}, windows), windows)
    if own is None:
        return rows
    of_teacher = rows_of(compare({"teacher": models["teacher"]}, own), own)
    students = [row for row in rows if row.model != "teacher"]
    return [row for row in (*of_teacher, *students) if row.metric not in ("nll", "ppl")]


def same_vocabulary(teacher: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other`, if it has the teacher's tokenizer: a student judged token by token needs it.

    MisError where the two tokenizer.json differ in a byte.
    """
    files = [model.path / "tokenizer.json" for model in (teacher, other)]
    if not all(file.is_file() for file in files):
        return other
    first, second = files
    if first.read_bytes() != second.read_bytes():
        raise MisError(
            f"{other.path} has a different tokenizer from {teacher.path}: use a student of "
            f"this teacher"
        )
    return other


def comparison_cost(models: Sequence[ModelSize], windows: int, length: int) -> StageCost:
    """A pass of each model over the same windows, then their heads in parts (as in comparison).

    Parts of the first one's head and of each other's: two of each, and the temporaries that make
    and read one, logits of CHUNK tokens, and statistics of GROUP tokens.
    """
    tokens = windows * length
    held = max(side_bytes(m, tokens) for m in models)
    most = 0
    flops = 0.0
    for m in models:
        body = m.body_bytes(pass_workspace(m, tokens, length, length))
        most = max(most, m.slots_bytes + body)
        held += tokens * m.hidden_bytes  # final states
        flops += forward_flops(m, tokens, length)
    vocab = min(m.shape.vocab for m in models)
    hidden = max(m.shape.hidden for m in models)
    rows = head_rows(hidden, vocab)
    parts = math.ceil(vocab / rows)
    heads = [3 * rows * m.head_work // m.shape.vocab for m in models]
    at_once = CHUNK if any(m.gpu for m in models) else min(length, CHUNK)
    at_heads = heads[0] + max(heads) + 3 * rows * hidden
    at_heads += ARRAYS * 4 * at_once * rows  # logits
    at_heads += 11 * 8 * min(tokens, GROUP + length) * parts  # statistics
    return StageCost(
        name="measure",
        read_bytes=sum(m.nbytes for m in models),
        peak_bytes=held + max(most, at_heads),
        flops=flops,
    )
