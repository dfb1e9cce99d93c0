"""How far a model's predictions are from a reference's, in the names and units of llama.cpp's --kl-divergence.

As there (tools/perplexity): over the second half of every window, so that each token has at least half a window
before it; ± is one standard error over tokens, as if they were independent. Unlike there, the reference's
probabilities are whole (llama.cpp keeps 16 bits of them and leaves out those under e^-16), and a window begins with
its own token, not with the start token. Streamed; does not print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mis_mlx import cli
from mis_mlx.data.token_windows import Windows
from mis_mlx.evaluation import comparison
from mis_mlx.models import distributed
from mis_mlx.types import Checkpoint, MisError

FEW = 100  # tokens: of no more llama.cpp makes no statistics
METRICS = (
    ("mean_kld", "Mean KLD, nats", ".6f"),
    ("max_kld", "Maximum KLD", ".6f"),
    ("p999_kld", "99.9% KLD", ".6f"),
    ("p99_kld", "99.0% KLD", ".6f"),
    ("median_kld", "Median KLD", ".6f"),
    ("mean_dp", "Mean Δp, %", ".3f"),
    ("rms_dp", "RMS Δp, %", ".3f"),
    ("same_top_p", "Same top p, %", ".3f"),
    ("ppl", "Mean PPL(Q)", ".6f"),
    ("ppl_base", "Mean PPL(base)", ".6f"),
    ("ppl_ratio", "Mean PPL(Q)/PPL(base)", ".6f"),
)
Figures = dict[str, tuple[float, float | None]]  # {metric: (value, its standard error where there is one)}


def second_half(held_out: Windows) -> Windows:
    """The same windows, predictions in their first half not counted. MisError when too few are left."""
    learn = held_out.learn.copy()
    learn[:, : learn.shape[1] // 2] = 0
    if (count := int((learn > 0).sum())) < FEW:
        raise MisError(
            f"{count} tokens lie in the second halves of {len(learn)} windows, statistics need {FEW}: "
            "raise --eval-windows, or bring more test text"
        )
    return Windows(held_out.tokens, learn)


def against(
    base: Checkpoint, others: Mapping[str, Checkpoint], held_out: Windows, opened: comparison.Opened = comparison.alone
) -> dict[str, Figures]:
    """{name: figures} of all models, over the predictions that count; `base` is the reference.

    Of several machines each has its own windows.
    """
    held_out = comparison.own(held_out)
    mine, report = comparison.final_hidden(base, held_out, opened), {}
    for name, other in cli.counted("model", others.items(), len(others)):
        theirs = comparison.final_hidden(other, held_out, opened)
        values = comparison.by_window((base, mine), (other, theirs), held_out)
        each = distributed.gather([row for window in values for row in window.tolist()])
        report[name] = figures(*np.array([row for part in each for row in part]).T)
    return report


def figures(base_nll: np.ndarray, nll: np.ndarray, kld: np.ndarray, same: np.ndarray) -> Figures:
    """llama.cpp's figures from (n,) values per token. Δp is the change of the true token's probability."""

    def mean(values: np.ndarray) -> tuple[float, float]:
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    def exp(log: tuple[float, float]) -> tuple[float, float]:
        return math.exp(log[0]), math.exp(log[0]) * log[1]

    dp = 100.0 * (np.exp(-nll) - np.exp(-base_nll))
    square, square_se = mean(np.square(dp))
    rms = math.sqrt(square)
    top = float(same.mean())
    return {
        "mean_kld": mean(kld),
        "max_kld": (float(kld.max()), None),
        "p999_kld": (float(np.quantile(kld, 0.999)), None),
        "p99_kld": (float(np.quantile(kld, 0.99)), None),
        "median_kld": (float(np.median(kld)), None),
        "mean_dp": mean(dp),
        "rms_dp": (rms, square_se / (2 * rms) if rms else 0.0),
        "same_top_p": (100.0 * top, 100.0 * math.sqrt(top * (1.0 - top) / (len(same) - 1))),
        "ppl": exp(mean(nll)),
        "ppl_base": exp(mean(base_nll)),
        "ppl_ratio": exp(mean(nll - base_nll)),  # the error of a mean difference, covariance and all
    }
