"""Students against their teacher on held-out windows: loss, KL, agreement, per window. Streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from mis_mlx.data.token_windows import Windows
from mis_mlx.maths import losses
from mis_mlx.maths.stats import interval
from mis_mlx.models import distributed, host_losses, load, policy, stream
from mis_mlx.models.config import shape_of
from mis_mlx.types import Checkpoint, MisError, Row

Opened = Callable[[Checkpoint], stream.Stream]  # for one pass
METRICS = (
    ("nll", "held-out loss, nats/token", ".3f"),
    ("ppl", "perplexity", ".2f"),
    ("kl", "KL(teacher ‖ model), nats/token", ".3f"),
    ("top1", "same top token as teacher", ".1%"),
)


def chosen(held_out: Windows, count: int) -> Windows:
    """`count` windows spread evenly over the held-out text, or all when there are fewer."""
    n = len(held_out.tokens)
    at = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int))
    return Windows(held_out.tokens[at], held_out.learn[at])


def alone(model: Checkpoint) -> stream.Stream:
    """A model that one machine passes all windows through, no block of it kept."""
    return stream.Stream(model, policy.compute_dtype(model))


def final_hidden(model: Checkpoint, held_out: Windows, opened: Opened = alone) -> stream.Hidden:
    """The model's final hidden states [(1, T, D)] of every window. Streamed."""
    return opened(model).forward([mx.array(w[None]) for w in held_out.tokens])


def own(held_out: Windows) -> Windows:
    """This machine's windows of those that several share; perhaps none."""
    return Windows(distributed.share(held_out.tokens), distributed.share(held_out.learn))


def together(models: Mapping[str, Checkpoint], held_out: Windows, opened: Opened) -> dict[tuple[str, str], np.ndarray]:
    """What `compare` gives, every machine having compared its own windows."""
    mine = compare(models, own(held_out), opened=opened)
    keys = [(name, metric) for name, metric in distributed.told(lambda: list(mine))]
    return {key: np.array(distributed.joined(mine.get(key, np.zeros(0)).tolist())) for key in keys}


def compare(
    models: Mapping[str, Checkpoint],
    held_out: Windows,
    teacher_hidden: stream.Hidden | None = None,
    opened: Opened = alone,
) -> dict[tuple[str, str], np.ndarray]:
    """{(model, metric): per-window means (N,)} of all models; the first is the teacher. Streamed.

    One block of one model in memory at a time, then the teacher's head and one student's, window by window.
    teacher_hidden: what `final_hidden` gave for the teacher, where many students come one after the other.
    """
    (teacher, base), *students = models.items()
    mine = final_hidden(base, held_out, opened) if teacher_hidden is None else teacher_hidden
    means_of = dict[tuple[str, str], np.ndarray]()
    for name, model in students or [(teacher, base)]:
        theirs = mine if model is base else final_hidden(model, held_out, opened)
        means = [v.mean(axis=0) if len(v) else np.zeros(4) for v in by_window((base, mine), (model, theirs), held_out)]
        own, *others = np.array(means).reshape(-1, 4).T
        means_of.setdefault((teacher, "nll"), own)
        if students:
            means_of |= {(name, metric): values for metric, values in zip(("nll", "kl", "top1"), others, strict=True)}
    return means_of


def by_window(
    base: tuple[Checkpoint, stream.Hidden], other: tuple[Checkpoint, stream.Hidden], held_out: Windows
) -> Iterator[np.ndarray]:
    """(n, 4) float64 of the n predictions that count in each window: the base's nll, the other's, KL(base || other),
    all in nats, and whether the top token is the same.

    Of either model: the checkpoint, and its final hidden states [(1, T, D)]. Logits come in chunks of positions.
    """
    heads = [alone(model).head() for model, _ in (base, other)]
    vocab = min(shape_of(model.config).vocab for model, _ in (base, other))
    rows = losses.chunk_rows(vocab) // 2
    for w, tokens in enumerate(held_out.tokens):
        counted, values = np.flatnonzero(held_out.learn[w]), [np.zeros((0, 4))]
        for start in range(0, len(counted), rows):
            at = mx.array(counted[start : start + rows])
            hidden = (states[w][0][at] for _, states in (base, other))
            z_t, z = (load.logits(head, h)[:, :vocab].astype(mx.float32) for head, h in zip(heads, hidden, strict=True))
            values.append(_at_positions(z_t, z, mx.array(tokens)[at + 1]))
        yield np.concatenate(values, dtype=np.float64)


def _at_positions(teacher: mx.array, student: mx.array, targets: mx.array) -> np.ndarray:
    """What `by_window` gives, of logits (n, V) float32 and the next tokens (n,)."""
    if policy.name() == "cpu":
        return host_losses.compared(teacher, student, targets)
    reference = losses.Reference(teacher, targets)
    return np.array(mx.stack([reference.nll(), *reference.compare(student)], axis=1))


def rows_of(figures: Mapping[tuple[str, str], np.ndarray]) -> list[Row]:
    """One row per model and metric, with its 95 % interval over windows; perplexity from the loss."""
    rows = []
    for (name, metric), values in figures.items():
        mean, low, high = interval(values)
        rows.append(Row(name, metric, mean, low, high, len(values)))
        if metric == "nll":
            rows.append(Row(name, "ppl", math.exp(mean), math.exp(low), math.exp(high), len(values)))
    return rows


def same_vocabulary(teacher: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A student judged token by token must share the tokenizer: `other`, if the files are equal byte for byte."""
    a, b = (m.path / "tokenizer.json" for m in (teacher, other))
    if a.is_file() and b.is_file() and a.read_bytes() != b.read_bytes():
        raise MisError(
            f"{other.path} has another tokenizer than {teacher.path}: token losses of the two "
            "cannot be compared; use a student made from this teacher"
        )
    return other
