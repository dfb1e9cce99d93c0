"""Least squares on streamed statistics: the change of a linear layer that best repairs its output.

Sums are float64 and merge in any order. Layers with more than `WIDE` inputs have float32 sums,
solved by MLX: a sixth of numpy's bytes and quicker (benchmarks/quantizing.py), because an 8 B model
must go through a machine of 8 GB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

# With thousands of tokens the first ones win, with hundreds the last.
RIDGES = (0.1, 0.3, 1.0, 10.0)
HELD_OUT = 4  # every fourth window judges a fit
# Inputs. The real teachers have up to 2,048, and float32 would round their sums as well.
WIDE = 2048


def precision(inputs: int) -> type[np.floating]:
    """The numpy type of sums over the tokens of a layer with so many inputs, and of their solution.

    float32 above `WIDE` inputs, else float64.
    """
    if is_wide(inputs):
        return np.float32
    return np.float64


def square_bytes(size: int) -> int:
    """Bytes of sums (size, size)."""
    return np.dtype(precision(size)).itemsize * size**2


def is_wide(inputs: int) -> bool:
    """Whether a layer has so many inputs that its sums must take little memory."""
    return inputs > WIDE


def held_out_windows(kinds: Sequence[int]) -> list[int]:
    """Which windows, of these kinds of text, are held out to judge a block by.

    Of every kind each fourth, or the last of fewer. Where there are several kinds, one of a single
    window judges nothing.
    """
    held_out = list[int]()
    several = len(set(kinds)) > 1
    for kind in sorted(set(kinds)):
        windows = [number for number, window_kind in enumerate(kinds) if window_kind == kind]
        every = min(HELD_OUT, len(windows))
        if not (several and every == 1):
            held_out += windows[every - 1 :: every]
    return sorted(held_out) or [len(kinds) - 1]


def token_rms(rows: mx.array) -> mx.array:
    """(..., D) -> (...), of each row, never 0."""
    return mx.maximum(mx.sqrt(mx.square(rows).mean(axis=-1)), 1e-6)


class NormalEquations:
    """Sums for the change U of a layer's weight that best restores the layer's output:

    min over U of  sum_t w_t^2 |r_t - U a_t|^2 + ridge * mean(diag G) * |U|^2,  G = sum w^2 a a^T.

    a_t (F,) goes into the layer, r_t (D,) is missing at its output, U (D, F) is added to its
    weight. The ridge pulls U, not the weight, to zero: a direction that calibration never saw stays
    as it was.
    """

    def __init__(self, inputs: int, outputs: int):
        dtype = precision(inputs)
        self.gram = np.zeros((inputs, inputs), dtype)
        self.cross = np.zeros((inputs, outputs), dtype)

    @staticmethod
    def products(a: mx.array, r: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        """The two products that `add` takes: (G (F, F), cross (F, D)) of one batch. Lazy.

        a: inputs of tokens (n, F). r: missing outputs (n, D). weight: of each token (n,). Products
        of one batch are float32 (on a CPU 5x quicker).
        """
        # The weight scales inputs and outputs, so it is squared in both products.
        a = a.astype(mx.float32) * weight[:, None]
        r = r.astype(mx.float32) * weight[:, None]
        return a.T @ a, a.T @ r

    def add(self, gram: mx.array, cross: mx.array) -> None:
        """Add one batch's `products`, without a copy of them."""
        self.gram += np.asarray(gram)
        self.cross += np.asarray(cross)

    def update(self, ridge: float) -> np.ndarray:
        """The solution U (D, F) for this ridge.

        The gram is damped in place and put back: a copy would be a third of all the memory that a
        fit takes.
        """
        diagonal = np.einsum("ii->i", self.gram)  # a view: writing to it writes to the gram
        before = diagonal.copy()
        # The smallest number keeps the diagonal above 0 even where the gram is all zeros.
        diagonal += ridge * before.mean() + np.finfo(before.dtype).tiny
        try:
            if self.gram.dtype == np.float32:
                # G^-1 = L^-T L^-1, applied one factor after the other. They take little more memory
                # than G. MLX has no Metal version of these two, so they name the CPU's stream.
                factor = mx.linalg.cholesky(mx.array(self.gram), stream=mx.cpu)  # noqa: TID251
                root = mx.linalg.tri_inv(factor, stream=mx.cpu)  # noqa: TID251
                return np.array(root.T @ (root @ mx.array(self.cross))).T
            return np.asarray(np.linalg.solve(self.gram, self.cross).T)
        finally:
            diagonal[:] = before

    def best_update(
        self,
        held_out: Sequence[HeldOut],
        ridges: Sequence[float] = RIDGES,
        with_held_out: bool = True,
    ) -> tuple[np.ndarray, float]:
        """(U (D, F), the share of the held-out error that remains), for the best of the ridges.

        The best ridge is the one that leaves least error, measured by `remaining_error`. With
        `with_held_out` U is then fitted to all tokens, the held-out ones included. Where no ridge
        improves anything, U is 0 and the share 1.
        """
        best = None
        least = 1.0
        for ridge in ridges:
            share = remaining_error(held_out, self.update(ridge))
            if share < least:
                best = ridge
                least = share
        if best is None:
            return np.zeros_like(self.cross.T), 1.0
        if with_held_out:
            # The held-out tokens have chosen the ridge; now they help to fit.
            for rows in held_out:
                # Not by `add`: one product dies before the next one is made.
                self.gram += np.asarray(rows.inputs.T @ rows.inputs)
                self.cross += np.asarray(rows.inputs.T @ rows.missing)
        return self.update(best), least


class HeldOut(NamedTuple):
    """Tokens that judge a fit, both arrays float32 and multiplied by each token's weight.

    inputs: (n, F), into the layer. missing: (n, D), at its output. kind: of the tokens' text.
    """

    inputs: mx.array
    missing: mx.array
    kind: int = 0

    @classmethod
    def of(cls, inputs: mx.array, missing: mx.array, weight: mx.array, kind: int = 0) -> HeldOut:
        """Weigh tokens (n, F), (n, D) with weights (n,), as `NormalEquations.products` does."""
        weights = weight[:, None]
        return cls(inputs.astype(mx.float32) * weights, missing.astype(mx.float32) * weights, kind)


def remaining_error(held_out: Sequence[HeldOut], update: np.ndarray) -> float:
    """The share of the weighted squared error on held-out tokens that an update U (D, F) leaves.

    Kinds of text count alike, however many tokens each has. The kind that gains least counts as
    much as all together: the result is half the mean over kinds plus half the largest. A kind
    without error counts as 1.
    """
    before: defaultdict[int, float] = defaultdict(float)
    after: defaultdict[int, float] = defaultdict(float)
    transposed = mx.array(update.T.astype(np.float32))
    for rows in held_out:
        rest = np.asarray(rows.missing - rows.inputs @ transposed)
        before[rows.kind] += _sum_of_squares(np.asarray(rows.missing))
        after[rows.kind] += _sum_of_squares(rest)
    shares = []
    for kind, error in before.items():
        share = after[kind] / error if error else 1.0
        shares.append(share)
    return float(np.mean(shares) + max(shares)) / 2


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())
