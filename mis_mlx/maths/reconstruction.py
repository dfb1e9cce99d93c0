"""Least squares on streamed statistics: the change of a linear layer that best mends its output.

Sums are float64 and merge in any order. Of layers with more than `WIDE` inputs they are float32,
and solved by MLX, a sixth of numpy's bytes and quicker (benchmarks/quantizing.py): an 8 B model is
to go through a machine of 8 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

# with thousands of tokens the first ones win, with hundreds the last
RIDGES = (0.1, 0.3, 1.0, 10.0)
HELD_OUT = 4  # every fourth window judges a fit
WIDE = 2048  # inputs; float32 rounds the real teachers, of up to 2,048, as well


def precision(inputs: int) -> type[np.floating]:
    """Of sums over tokens of what goes into a layer, and of what is solved with them."""
    return np.float32 if inputs > WIDE else np.float64


def inverse_root(gram: np.ndarray) -> mx.array:
    """L^-1 (F, F) float32 of L L^T = G (F, F) float32. It takes little more memory than it has."""
    return mx.linalg.tri_inv(mx.linalg.cholesky(mx.array(gram), stream=mx.cpu), stream=mx.cpu)


class NormalEquations:
    """Sums for min over U of  sum_t w_t^2 |r_t - U a_t|^2 + ridge * mean(diag G) * |U|^2,  G = sum
    w^2 a a^T.

    a_t (F,) goes into the layer, r_t (D,) is what is missing at its output, U (D, F) is added to
    its weight. The ridge pulls U, not the weight, to zero: a direction that calibration never saw
    stays as it was.
    """

    def __init__(self, inputs: int, outputs: int):
        self.gram = np.zeros((inputs, inputs), precision(inputs))
        self.cross = np.zeros((inputs, outputs), precision(inputs))

    @staticmethod
    def products(a: mx.array, r: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        """What `add` takes, lazy, of tokens a (n, F), what is missing r (n, D), and each token's
        weight (n,).

        Products of one batch are float32 (on a CPU 5x quicker).
        """
        a = a.astype(mx.float32) * weight[:, None]
        r = r.astype(mx.float32) * weight[:, None]
        return a.T @ a, a.T @ r

    def add(self, gram: mx.array, cross: mx.array) -> None:
        """One batch's `products`, of which no copy is made."""
        self.gram += np.asarray(gram)
        self.cross += np.asarray(cross)

    def update(self, ridge: float) -> np.ndarray:
        """U (D, F). The gram is damped in place and put back: a copy would be a third of all that a
        fit takes.
        """
        diagonal = np.einsum("ii->i", self.gram)
        before = diagonal.copy()
        diagonal += ridge * before.mean() + np.finfo(before.dtype).tiny
        try:
            if self.gram.dtype == np.float32:
                root = inverse_root(self.gram)
                return np.array(root.T @ (root @ mx.array(self.cross))).T
            return np.asarray(np.linalg.solve(self.gram, self.cross).T)
        finally:
            diagonal[:] = before

    def judged(
        self, held_out: Sequence[HeldOut], ridges: Sequence[float] = RIDGES, whole: bool = True
    ) -> tuple[np.ndarray, float]:
        """(U (D, F), what it leaves of the error held out, by `left`): the ridge is the one that
        leaves least there, and U is then of all tokens, if `whole`. Nothing is changed, and 1 is
        left, where no ridge does better.
        """
        best = None
        least = 1.0
        for ridge in ridges:
            if (share := left(held_out, self.update(ridge))) < least:
                best = ridge
                least = share
        if best is None:
            return np.zeros_like(self.cross.T), 1.0
        for rows in held_out if whole else ():
            self.gram += np.asarray(rows.inputs.T @ rows.inputs)
            self.cross += np.asarray(rows.inputs.T @ rows.missing)
        return self.update(best), least


class HeldOut(NamedTuple):
    """Tokens that judge a fit: what goes into the layer (n, F), and what is missing at its output
    (n, D), both float32 and times each token's weight; the kind of text that they are of.
    """

    inputs: mx.array
    missing: mx.array
    kind: int = 0

    @classmethod
    def of(cls, inputs: mx.array, missing: mx.array, weight: mx.array, kind: int = 0) -> HeldOut:
        """Of tokens (n, F), (n, D) and their weights (n,), as `NormalEquations.products` takes
        them.
        """
        weights = weight[:, None]
        return cls(inputs.astype(mx.float32) * weights, missing.astype(mx.float32) * weights, kind)


def left(held_out: Sequence[HeldOut], update: np.ndarray) -> float:
    """What an update U (D, F) leaves of the weighted squared error on tokens held out, as a share
    of it.

    Kinds of text count alike, however many tokens there are of each, and the one that it serves
    worst counts as much as all together: half of the mean over kinds, and half of the largest. 1
    where there is no error.
    """
    before = dict[int, float]()
    after = dict[int, float]()
    turned = mx.array(update.T.astype(np.float32))
    for rows in held_out:
        rest = np.asarray(rows.missing - rows.inputs @ turned)
        before[rows.kind] = before.get(rows.kind, 0.0) + _sum_of_squares(np.asarray(rows.missing))
        after[rows.kind] = after.get(rows.kind, 0.0) + _sum_of_squares(rest)
    shares = [after[kind] / before[kind] if before[kind] else 1.0 for kind in before]
    return float(np.mean(shares) + max(shares)) / 2


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())
