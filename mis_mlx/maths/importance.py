"""Importance of FFN neurons, query heads, hidden channels and blocks; AAIS; who is kept.

Statistics are sums over calibration samples and add up in any order. AAIS is eq. (1) of the paper:
I_j = |a_j| * T_env / h_npm, |a_j| the rms over tokens, which picks better than Minitron's mean
(benchmarks/recovery.py, neurons).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mis_mlx.types import MisError, Reading

REFERENCE_C = 8.0
REFERENCE_M = 832.0
KELVIN = 273.15
Key = tuple[int, str]  # (layer, axis), as in types.Keep


def channel_sample(x: mx.array) -> mx.array:
    """Mean over the tokens of one batch of |a_j|.  x (B, T, F) -> (F,) float32."""
    return mx.abs(x.astype(mx.float32)).mean(axis=(0, 1))


def head_sample(x: mx.array, heads: int) -> mx.array:
    """Mean over tokens of each head's output norm.  x (B, T, H * head_dim), the input of o_proj ->
    (H,).
    """
    return mx.sqrt(
        mx.square(x.astype(mx.float32).reshape(-1, heads, x.shape[-1] // heads)).sum(-1)
    ).mean(axis=0)


def square_sample(x: mx.array) -> mx.array:
    """Sum over tokens of a^2.  x (B, T, C) -> (C,) float32."""
    return mx.square(x.astype(mx.float32).reshape(-1, x.shape[-1])).sum(axis=0)


def block_sample(into: mx.array, out: mx.array) -> mx.array:
    """1 - cosine between a block's input and output, mean over tokens (block influence).  (B, T, D)
    -> ().
    """
    a = into.astype(mx.float32)
    b = out.astype(mx.float32)
    norms = mx.sqrt(mx.square(a).sum(axis=-1) * mx.square(b).sum(axis=-1))
    return 1.0 - ((a * b).sum(axis=-1) / mx.maximum(norms, 1e-12)).mean()


def weight_of(reading: Reading | None, unit: str) -> float | None:
    """T_env of one calibration batch in the unit asked for, or None when nothing is known of it.

    Kelvin is always positive. Celsius, to the letter of the paper, refuses T <= 0, which would
    reverse the ranking.
    """
    if reading is None or reading.ambient_c is None:
        return None
    if reading.altitude_m is not None and reading.altitude_m <= 0:
        why = f"the altitude is {reading.altitude_m:g} m and divides eq. (1), so it must be above 0"
        raise MisError(f"{why}: use --importance rms here, or give --altitude-m")
    if unit == "kelvin":
        return reading.ambient_c + KELVIN
    if reading.ambient_c <= 0:
        why = (
            f"the air is {reading.ambient_c:g} °C and --temperature-unit celsius needs more "
            f"than "
            f"0 °C"
        )
        raise MisError(
            f"{why}, a negative weight would reverse the ranking: use --temperature-unit kelvin"
        )
    return reading.ambient_c


@dataclass
class Sums:
    """Sums over calibration batches of one layer's channels.

    mean: squares of means over tokens of |a|. square: means of a^2. warm: those times T_b^2."""

    mean: np.ndarray
    square: np.ndarray
    warm: np.ndarray

    def add(self, mean: np.ndarray, square: np.ndarray, weight: float) -> None:
        """One batch's means over tokens of |a| and of a^2, both (units,), measured at T_env =
        weight.
        """
        self.mean += np.asarray(mean, np.float64) ** 2
        self.square += square
        self.warm += square * weight**2


@dataclass
class ExpertSums:
    """Sums over a layer's tokens, for REAP (arXiv 2510.13999): the mean, over tokens that choose an
    expert, of its gate times the norm of its output. Gates of a token sum to 1.
    """

    routed: np.ndarray
    gated: np.ndarray
    warm: np.ndarray  # `gated`, every batch times T_b

    def add(self, expert: int, gates: np.ndarray, outputs: mx.array, weight: float) -> None:
        """One batch's gates (n,) and outputs (n, D) of an expert, at T_env = weight."""
        norms = np.array(mx.sqrt(mx.square(outputs.astype(mx.float32)).sum(axis=-1)), np.float64)
        total = float((gates * norms).sum())
        self.routed[expert] += len(gates)
        self.gated[expert] += total
        self.warm[expert] += total * weight

    def scores(self) -> Sums:
        """Their squares, as `rms` and `aais` take them; 0 of an expert that no token has chosen."""
        square, warm = (
            np.square(total / np.maximum(self.routed, 1)) for total in (self.gated, self.warm)
        )
        return Sums(square, square, warm)


@dataclass
class Statistics:
    """What calibration gathers, by layer number; at -1 `hidden`, which sums over all layer norms.

    Of a mixture `ffn` has the neurons of all experts of a layer, one expert's after another's.
    `experts`: REAP's score of each, its square that is; `routed`: how many tokens chose each.
    """

    ffn: dict[int, Sums] = field(default_factory=dict)
    experts: dict[int, Sums] = field(default_factory=dict)
    routed: dict[int, np.ndarray] = field(default_factory=dict)
    heads: dict[int, Sums] = field(default_factory=dict)
    block: dict[int, float] = field(default_factory=dict)
    hidden: dict[int, Sums] = field(default_factory=dict)
    altitude_m: float | None = None
    measured: bool = False  # whether every batch had a T_env
    ambient_c: list[float] = field(default_factory=list)


def activation(sums: Sums) -> np.ndarray:
    """Minitron's importance: mean over tokens, L2 over batches (arXiv 2407.14679 table 13).
    (F,).
    """
    return np.sqrt(sums.mean)


def rms(sums: Sums) -> np.ndarray:
    """L2 over tokens and over batches: of each neuron what the squared error of leaving it out goes
    by.  (F,).
    """
    return np.sqrt(sums.square)


def aais(sums: Sums, altitude_m: float) -> np.ndarray:
    """I_j = sqrt( sum_b (rms_bj * T_b / h)^2 ).  With constant T and h a positive multiple of
    `rms`.
    """
    return np.sqrt(sums.warm) / altitude_m


def top(scores: np.ndarray, keep: int) -> tuple[int, ...]:
    """Sorted indices of the `keep` largest scores; of equal scores the lower index stays."""
    return tuple(sorted(int(i) for i in np.argsort(-scores, kind="stable")[:keep]))


def top_in_groups(scores: np.ndarray, groups: int, keep: int, kept_groups: int) -> tuple[int, ...]:
    """Query heads to keep: the best, equally many of each of the best `kept_groups` key-value
    groups.
    """
    each = len(scores) // groups
    kept = list[int]()
    for g in top(group_scores(scores, groups), kept_groups):
        kept += [g * each + i for i in top(scores[g * each : (g + 1) * each], keep // kept_groups)]
    return tuple(kept)


def group_scores(scores: np.ndarray, groups: int) -> np.ndarray:
    """Of key-value groups, (groups,): their query heads' scores taken together."""
    return np.sqrt(np.square(scores).reshape(groups, -1).sum(axis=-1))


def lowest_blocks(block: dict[int, float], keep: int, kinds: Sequence[int] = ()) -> tuple[int, ...]:
    """Layers to keep, in order: those with the largest 1 - cosine; of equal ones the earlier stays.

    kinds: of every layer, where the j-th to be kept must be of the kind of layer j."""
    if len(set(kinds)) < 2:
        return tuple(sorted(sorted(block, key=lambda i: (-block[i], i))[:keep]))
    # of the first layers, j of them
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(-np.inf, ())] * keep]
    for i in sorted(block):
        for j in range(min(i + 1, keep), 0, -1):
            if kinds[i] == kinds[j - 1]:
                total, chosen = best[j - 1]
                best[j] = max(best[j], (total + block[i], (*chosen, i)), key=lambda way: way[0])
    return best[keep][1]


def conditions_size(
    sums: Sequence[Sums], size: int, multiple: int, altitude_m: float, unit: str = "kelvin"
) -> int:
    """FFN size by the absolute threshold of eq. (1) (`--target conditions`).

    The threshold is the importance that `size` channels a layer pass at the reference, 8 °C and 832
    m. At the measured conditions more or fewer pass it; their mean per layer is rounded to
    `multiple`. Thin air divides by a larger h, so fewer pass: higher altitude prunes harder, as the
    paper says.
    """
    reference_t = REFERENCE_C + (KELVIN if unit == "kelvin" else 0.0)
    reference = np.concatenate([rms(s) for s in sums]) * reference_t / REFERENCE_M
    measured = np.concatenate([aais(s, altitude_m) for s in sums])
    passing = int((measured >= np.sort(reference)[::-1][size * len(sums) - 1]).sum()) / len(sums)
    return int(
        min(max(round(passing / multiple), 1), math.floor(len(sums[0].square) / multiple))
        * multiple
    )
