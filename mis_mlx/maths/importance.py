"""Importance of FFN neurons, query heads, hidden channels and blocks; AAIS; which units to keep.

Statistics are sums over calibration samples and add up in any order. AAIS is eq. (1) of the paper:
I_j = |a_j| * T_env / h_npm, with T_env in kelvin and |a_j| the rms over tokens, which picks better
than Minitron's mean (recovery.py at bd583ffb, neurons).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mis_mlx.types import Air, MisError

REFERENCE_C = 8.0
REFERENCE_M = 832.0
KELVIN = 273.15
Key = tuple[int, str]  # (layer, axis)


def square_sample(x: mx.array) -> mx.array:
    """Sum over tokens of a^2.  x (B, T, C) -> (C,) float32."""
    return mx.square(x.astype(mx.float32).reshape(-1, x.shape[-1])).sum(axis=0)


def block_sample(into: mx.array, out: mx.array) -> mx.array:
    """Block influence: 1 - cosine of a block's input and output (B, T, D), mean over tokens."""
    a = into.astype(mx.float32)
    b = out.astype(mx.float32)
    norms = mx.sqrt(mx.square(a).sum(axis=-1) * mx.square(b).sum(axis=-1))
    cosines = (a * b).sum(axis=-1) / mx.maximum(norms, 1e-12)
    return 1.0 - cosines.mean()


def weight_of(air: Air) -> float:
    """T_env of one calibration batch in kelvin; 1 where it was not measured.

    MisError where the altitude is not above 0.
    """
    if air.celsius is None:
        return 1.0
    if air.altitude_m is not None and air.altitude_m <= 0:
        why = f"the altitude is {air.altitude_m:g} m and divides eq. (1), so it must be above 0"
        raise MisError(f"{why}: use --importance rms here, or give another --altitude-m")
    return air.celsius + KELVIN


@dataclass
class Sums:
    """Sums over calibration batches, for one layer's channels.

    square: of means over tokens of a^2. env_weighted: of these times T_b^2.
    """

    square: np.ndarray
    env_weighted: np.ndarray

    def add(self, square: np.ndarray, weight: float) -> None:
        """Add one batch's means over tokens of a^2, (units,), at T_env = weight."""
        self.square += square
        self.env_weighted += square * weight**2


@dataclass
class ExpertSums:
    """Sums over a layer's tokens, for REAP (arXiv 2510.13999).

    REAP scores an expert by the mean, over the tokens that choose it, of its gate times the norm of
    its output. A token's gates sum to 1.
    """

    routed: np.ndarray  # tokens that chose each expert
    gated: np.ndarray  # sum of gate times norm
    env_weighted: np.ndarray  # `gated`, every batch times T_b

    def add(self, expert: int, gates: np.ndarray, outputs: mx.array, weight: float) -> None:
        """Add one batch's gates (n,) and outputs (n, D) of an expert, at T_env = weight."""
        squares = mx.square(outputs.astype(mx.float32)).sum(axis=-1)
        norms = np.array(mx.sqrt(squares), np.float64)
        total = float((gates * norms).sum())
        self.routed[expert] += len(gates)
        self.gated[expert] += total
        self.env_weighted[expert] += total * weight

    def scores(self) -> Sums:
        """Squared scores, as `rms` and `aais` take them; 0 for an expert that no token chose."""
        tokens = np.maximum(self.routed, 1)
        square = np.square(self.gated / tokens)
        env_weighted = np.square(self.env_weighted / tokens)
        return Sums(square=square, env_weighted=env_weighted)


@dataclass
class Statistics:
    """Everything that calibration gathers, by layer number.

    In a mixture of experts `ffn` has the neurons of all the layer's experts, one expert after
    another; `experts` has REAP's score of each, squared. `channels` are a short convolution's, in
    blocks that have one in place of heads.
    """

    ffn: dict[int, Sums] = field(default_factory=dict)
    experts: dict[int, Sums] = field(default_factory=dict)
    heads: dict[int, Sums] = field(default_factory=dict)
    channels: dict[int, Sums] = field(default_factory=dict)
    block: dict[int, float] = field(default_factory=dict)
    altitude_m: float | None = None
    measured: bool = False  # whether every batch had a T_env
    ambient_c: list[float] = field(default_factory=list)


def rms(sums: Sums) -> np.ndarray:
    """L2 over tokens and over batches, (F,).

    A neuron's removal adds a squared error in proportion to this one's square.
    """
    return np.sqrt(sums.square)


def aais(sums: Sums, altitude_m: float) -> np.ndarray:
    """I_j = sqrt( sum_b (rms_bj * T_b / h)^2 ).

    With constant T and h it is a positive multiple of `rms`.
    """
    return np.sqrt(sums.env_weighted) / altitude_m


def top(scores: np.ndarray, keep: int) -> tuple[int, ...]:
    """Sorted indices of the `keep` largest scores; of equal scores the lower index stays."""
    best = np.argsort(-scores, kind="stable")[:keep]
    return tuple(sorted(int(index) for index in best))


def top_in_groups(
    scores: np.ndarray,
    groups: int,
    keep: int,
    kept_groups: int,
) -> tuple[int, ...]:
    """Query heads to keep: the best of the best `kept_groups` key-value groups.

    Every group keeps equally many: keep / kept_groups.
    """
    group_size = len(scores) // groups
    heads = []
    for group in top(group_scores(scores, groups), kept_groups):
        start = group * group_size
        in_group = scores[start : start + group_size]
        heads += [start + head for head in top(in_group, keep // kept_groups)]
    return tuple(heads)


def group_scores(scores: np.ndarray, groups: int) -> np.ndarray:
    """Scores of key-value groups, (groups,): the L2 norm of their query heads' scores."""
    return np.sqrt(np.square(scores).reshape(groups, -1).sum(axis=-1))


def select_blocks(
    block: dict[int, float],
    keep: int,
    kinds: Sequence[int] = (),
) -> tuple[int, ...]:
    """Layers to keep, in order: those with the largest 1 - cosine; of equal ones the earlier stays.

    block: 1 - cosine by layer. kinds: of every layer; the j-th layer kept must be of the kind that
    layer j had, so that the pattern of kinds is preserved.
    """
    if len(set(kinds)) < 2:
        ranked = sorted(block, key=lambda layer: (-block[layer], layer))
        return tuple(sorted(ranked[:keep]))
    # best[j]: (sum, layers) of the best j layers among those seen so far
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    best += [(-np.inf, ())] * keep
    for layer in sorted(block):
        # From many to few: best[j - 1] must not contain this layer yet.
        for j in range(min(layer + 1, keep), 0, -1):
            if kinds[layer] != kinds[j - 1]:
                continue
            total, chosen = best[j - 1]
            total += block[layer]
            if total > best[j][0]:
                best[j] = (total, (*chosen, layer))
    return best[keep][1]


def conditions_size(
    sums: Sequence[Sums],
    size: int,
    multiple: int,
    altitude_m: float,
    experts: int = 1,
) -> int:
    """FFN size by the absolute threshold of eq. (1) (`--target conditions`).

    The threshold is the importance that `size` channels a layer pass at the reference, 8 °C and 832
    m. At the measured conditions more or fewer pass it; their mean per layer is rounded to
    `multiple`. A larger altitude divides by a larger h, so fewer pass: higher altitude prunes
    harder, as the paper says. experts: parts of equal size that a layer's channels belong to; the
    size, given and found, is that of one.
    """
    reference_t = REFERENCE_C + KELVIN
    reference = np.concatenate([rms(layer) for layer in sums]) * reference_t / REFERENCE_M
    measured = np.concatenate([aais(layer, altitude_m) for layer in sums])
    parts = experts * len(sums)
    threshold = np.sort(reference)[::-1][size * parts - 1]
    passing = int((measured >= threshold).sum()) / parts
    whole = len(sums[0].square) // experts
    steps = max(round(passing / multiple), 1)
    most = whole // multiple
    # a layer of fewer channels than `multiple` stays as it is
    return min(steps, most) * multiple or whole
