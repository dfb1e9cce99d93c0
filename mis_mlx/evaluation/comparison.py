"""Students against their teacher on held-out windows: loss, KL, agreement, per window. Streamed.

Also llama.cpp's report (tools/perplexity, --kl-divergence) in its names and units: over the second
half of every window; ± is one standard error over tokens, as if they were independent. Unlike
there, the reference's probabilities are whole (llama.cpp keeps 16 bits and leaves out those under
e^-16), and a window has no start token before it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data.token_windows import Windows
from mis_mlx.maths import stats
from mis_mlx.models import config, distributed, host_losses, load
from mis_mlx.models.host_losses import CHUNK, GROUP
from mis_mlx.models.stream import HEAD_PART, Hidden, Stream, evaluate_now
from mis_mlx.types import Checkpoint, MisError, Row

Models = Mapping[str, Checkpoint]  # by name
Opened = Callable[[Checkpoint], Stream]  # for one pass
Means = Mapping[tuple[str, str], np.ndarray]  # (model, metric): of each window
Passed = tuple[Checkpoint, Hidden]  # a model, and its final states [(1, T, D)] of every window
ACROSS = (
    "The teacher reads its own tokens, the others fewer kinds of them. KL and same top token: "
    "against a teacher that "
    "reads theirs, over the rows that it shares with them."
)
FEW = 100  # tokens: of no more llama.cpp makes no statistics
# {metric: (value, its standard error where there is one)}
Figures = dict[str, tuple[float, float | None]]


def chosen(held_out: Windows, count: int) -> Windows:
    """`count` windows spread evenly over the held-out text, or all when there are fewer."""
    n = len(held_out.tokens)
    return held_out.pick(np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int)))


def final_hidden(model: Checkpoint, held_out: Windows, opened: Opened = Stream) -> Hidden:
    """The model's final hidden states [(1, T, D)] of every window. Streamed."""
    return opened(model).forward([mx.array(w[None]) for w in held_out.tokens])


def own(held_out: Windows) -> Windows:
    """This machine's windows of those that several share; perhaps none."""
    return Windows(distributed.shard(held_out.tokens), distributed.shard(held_out.learn))


def together(models: Models, held_out: Windows, opened: Opened) -> Means:
    """What `compare` gives, every machine having compared its own windows."""
    mine = compare(models, own(held_out), opened=opened)
    whole = dict[tuple[str, str], np.ndarray]()
    for key, values in mine.items():
        # windows go round the machines
        turns = zip_longest(*distributed.all_gather(values.tolist()))
        whole[key] = np.array([value for turn in turns for value in turn if value is not None])
    return whole


def compare(
    models: Models, held_out: Windows, hidden: Hidden | None = None, opened: Opened = Stream
) -> Means:
    """{(model, metric): per-window means (N,)} of all models; the first is the teacher. Streamed.
    One block of one model in memory at a time, then parts of the teacher's head and of one
    student's. hidden: what `final_hidden` gave for the teacher, where many students come one after
    the other.
    """
    (teacher, base), *students = models.items()
    mine = final_hidden(base, held_out, opened) if hidden is None else hidden
    means_of: dict[tuple[str, str], np.ndarray] = {}
    for name, model in students or [(teacher, base)]:
        theirs = mine if model is base else final_hidden(model, held_out, opened)
        means = [
            v.mean(axis=0) if len(v) else np.zeros(4)
            for v in by_window((base, mine), (model, theirs), held_out)
        ]
        own, *others = np.array(means).reshape(-1, 4).T
        means_of.setdefault((teacher, "nll"), own)
        if students:
            means_of |= {
                (name, metric): values
                for metric, values in zip(("nll", "kl", "top1"), others, strict=True)
            }
    return means_of


def by_window(base: Passed, other: Passed, held_out: Windows) -> Iterator[np.ndarray]:
    """(n, 4) float64 of the n predictions that count in each window: the base's nll, the other's,
    KL(base || other), in nats, whether the top token is the same. The heads come in parts, for as
    many windows as GROUP has tokens.
    """
    shapes = [config.shape_of(model.config) for model, _ in (base, other)]
    vocab = min(s.vocab for s in shapes)
    rows = HEAD_PART // max(s.hidden for s in shapes)
    for first in range(0, len(held_out.tokens), size := max(1, GROUP // held_out.tokens.shape[1])):
        group = held_out.pick(slice(first, first + size))
        counted = [np.flatnonzero(learn[:-1]) for learn in group.learn]  # nothing follows the last
        chunks = [
            (w, ats[i : i + CHUNK])
            for w, ats in enumerate(counted)
            for i in range(0, len(ats), CHUNK)
        ]
        parts = [list[Any]() for _ in chunks]
        heads = (Stream(model).head_parts(vocab, rows) for model, _ in (base, other))
        for (start, mine), (_, theirs) in zip(*heads, strict=True):
            sides = (mine, base[1]), (theirs, other[1])
            for (w, at), found in zip(chunks, parts, strict=True):
                z_t, z = (
                    load.wide_logits(head, h[first + w][0][mx.array(at)]) for head, h in sides
                )
                found.append(host_losses.compared(z_t, z, group.tokens[w][at + 1], start))
            lazy = [found for found in parts if isinstance(found[-1], mx.array)]
            # a GPU waits once a part of the head, not once a chunk
            evaluate_now([found[-1] for found in lazy])
            for found in lazy:
                found[-1] = np.asarray(found[-1])
        values = [np.zeros((0, 4)), *(host_losses.over_parts(found) for found in parts)]
        yield from np.split(np.concatenate(values), np.cumsum([len(ats) for ats in counted])[:-1])


def nats_of(values: np.ndarray, windows: Windows) -> np.ndarray:
    """(N,) nats of each window's text, from means over its tokens."""
    return values * (windows.learn[:, :-1] > 0).sum(axis=1)


def per_byte(values: np.ndarray, windows: Windows) -> float:
    """Nats a byte of the text of all windows together, from means over each one's tokens."""
    return float(nats_of(values, windows).sum() / windows.text_bytes.sum())


def rows_of(figures: Means, held_out: Windows | None = None) -> list[Row]:
    """One row per model and metric, with its 95 % interval over windows; perplexity from the loss,
    and bits per byte where the bytes of `held_out` were counted: those of all windows over their
    bytes, a ratio's error linearised.
    """
    rows = []
    nbytes = held_out.text_bytes if held_out else None
    for (name, metric), values in figures.items():
        # A window in which no prediction counts has no mean.
        counted = values[held_out.learn[:, :-1].any(axis=1)] if held_out else values
        mean, low, high = stats.interval(counted)
        rows.append(Row(name, metric, mean, low, high, len(counted)))
        if metric == "nll":
            rows.append(
                Row(name, "ppl", math.exp(mean), math.exp(low), math.exp(high), len(counted))
            )
        if metric == "nll" and held_out and nbytes is not None and nbytes.any():
            bits = nats_of(values, held_out) / math.log(2)
            ratio = bits.sum() / nbytes.sum()
            rows.append(
                Row(
                    name,
                    "bpb",
                    *stats.interval(ratio + (bits - ratio * nbytes) / nbytes.mean()),
                    len(values),
                )
            )
            rows.append(Row(name, "tpb", per_byte(np.ones(len(values)), held_out), n=len(values)))
    return rows


def across(rows: Sequence[Row], teacher: Means, own: Windows) -> list[Row]:
    """Rows of models that read other tokens than the teacher, and of it on its `own` windows; none
    is per token.
    """
    ((name, _),) = teacher
    both = [*rows_of(teacher, own), *(r for r in rows if r.model != name)]
    return [r for r in both if r.metric not in ("nll", "ppl")]


def same_vocabulary(teacher: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A student judged token by token must share the tokenizer: `other`, if the files are equal
    byte for byte.
    """
    a, b = (m.path / "tokenizer.json" for m in (teacher, other))
    if a.is_file() and b.is_file() and a.read_bytes() != b.read_bytes():
        raise MisError(
            f"{other.path} has another tokenizer than {teacher.path}: use a student of this teacher"
        )
    return other


def second_half(held_out: Windows) -> Windows:
    """The same windows, predictions in their first half not counted. MisError when too few are
    left.
    """
    learn = held_out.learn.copy()
    learn[:, : learn.shape[1] // 2] = 0
    if (count := int((learn > 0).sum())) < FEW:
        why = (
            f"{count} tokens lie in the second halves of {len(learn)} windows, statistics need "
            f"{FEW}"
        )
        raise MisError(f"{why}: raise --eval-windows, or bring more test text")
    return Windows(held_out.tokens, learn)


def kld(models: Models, held_out: Windows, opened: Opened = Stream) -> dict[str, Figures]:
    """{name: figures} of all models but the first, the reference: of the predictions that count,
    each machine's own.
    """
    (_, base), *others = models.items()
    held_out = own(held_out)
    mine = final_hidden(base, held_out, opened)
    report = {}
    for name, other in cli.counted("model", others, len(others)):
        values = by_window((base, mine), (other, final_hidden(other, held_out, opened)), held_out)
        each = distributed.all_gather([row for window in values for row in window.tolist()])
        report[name] = figures(*np.array([row for part in each for row in part]).T)
    return report


def figures(base_nll: np.ndarray, nll: np.ndarray, kld: np.ndarray, same: np.ndarray) -> Figures:
    """llama.cpp's figures from (n,) values per token. Δp is the change of the true token's
    probability.
    """

    def mean(values: np.ndarray) -> tuple[float, float]:
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    def exp(log: tuple[float, float]) -> tuple[float, float]:
        return math.exp(log[0]), math.exp(log[0]) * log[1]

    dp = 100.0 * (np.exp(-nll) - np.exp(-base_nll))
    square, square_se = mean(np.square(dp))
    rms = math.sqrt(square)
    top = float(same.mean())
    shares = {"max_kld": 1.0, "p999_kld": 0.999, "p99_kld": 0.99, "median_kld": 0.5}
    return {
        "mean_kld": mean(kld),
        **{name: (float(np.quantile(kld, share)), None) for name, share in shares.items()},
        "mean_dp": mean(dp),
        "rms_dp": (rms, square_se / (2 * rms) if rms else 0.0),
        "same_top_p": (100.0 * top, 100.0 * math.sqrt(top * (1.0 - top) / (len(same) - 1))),
        "ppl": exp(mean(nll)),
        "ppl_base": exp(mean(base_nll)),
        # the error of a mean difference, covariance and all
        "ppl_ratio": exp(mean(nll - base_nll)),
    }
