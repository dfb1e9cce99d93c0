"""Students against their teacher on held-out windows: loss, KL, agreement, per window. Streamed.

Does not print and does not know which student is which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mis_mlx.disk.text import Windows
from mis_mlx.maths import losses
from mis_mlx.maths.stats import interval
from mis_mlx.model import load, stream
from mis_mlx.model.config import shape_of
from mis_mlx.types import Checkpoint, MisError, Row

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


def compare(models: Mapping[str, Checkpoint], held_out: Windows) -> dict[tuple[str, str], np.ndarray]:
    """{(model, metric): per-window means (N,)} of all models; the first is the teacher. Streamed.

    One block of one model in memory at a time, then all heads at once, window by window.
    """
    dtype = load.compute_dtype()
    batches = [mx.array(w[None]) for w in held_out.tokens]
    names = list(models)
    vocab = min(shape_of(m.config).vocab for m in models.values())
    sources = {name: stream.Stream(model, dtype) for name, model in models.items()}
    hidden = {name: source.forward(batches) for name, source in sources.items()}
    heads = {name: source.head() for name, source in sources.items()}
    found: dict[tuple[str, str], list[float]] = {}
    for w in range(len(batches)):
        learn = np.asarray(held_out.learn[w][:-1])
        per_position: dict[tuple[str, str], list[np.ndarray]] = {}
        for start in range(0, len(learn), losses.chunk_rows(vocab)):
            at = slice(start, min(start + losses.chunk_rows(vocab), len(learn)))
            targets = batches[w][0, 1:][at]

            def logits(name: str, at: slice = at, w: int = w) -> mx.array:
                return load.logits(heads[name], hidden[name][w][0, :-1][at])[:, :vocab]

            reference = losses.Reference(logits(names[0]), targets)
            for name in names:
                nll, kl, top1 = reference.compare(logits(name)) if name != names[0] else (reference.nll(), None, None)
                for metric, value in (("nll", nll), ("kl", kl), ("top1", top1)):
                    if value is not None:
                        per_position.setdefault((name, metric), []).append(np.array(value))
        for key, parts in per_position.items():
            values = np.concatenate(parts)
            found.setdefault(key, []).append(float((values * learn).sum() / max(learn.sum(), 1.0)))
    return {key: np.array(values) for key, values in found.items()}


def rows_of(found: Mapping[tuple[str, str], np.ndarray]) -> list[Row]:
    """One row per model and metric, with its 95 % interval over windows; perplexity from the loss."""
    rows = []
    for (name, metric), values in found.items():
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
