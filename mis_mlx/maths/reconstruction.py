"""Least squares on streamed statistics: the change of a linear layer that best mends its output.

Sums are float64 and merge in any order."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

RIDGES = (0.1, 0.3, 1.0, 10.0)  # with thousands of tokens the first ones win, with hundreds the last


class NormalEquations:
    """Sums for min over U of  sum_t w_t^2 |r_t - U a_t|^2 + ridge * mean(diag G) * |U|^2,  G = sum w^2 a a^T.

    a_t (F,) goes into the layer, r_t (D,) is what is missing at its output, U (D, F) is added to its weight.
    The ridge pulls U, not the weight, to zero: a direction that calibration never saw stays as it was."""

    def __init__(self, inputs: int, outputs: int):
        self.gram = np.zeros((inputs, inputs))
        self.cross = np.zeros((inputs, outputs))
        self.before = 0.0  # sum of w^2 |r|^2

    @staticmethod
    def products(a: mx.array, r: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What `add` takes, lazy, of tokens a (n, F), what is missing r (n, D), and each token's weight (n,).

        Products of one batch are float32 (on a CPU 5x quicker), sums over batches float64."""
        a = a.astype(mx.float32) * weight[:, None]
        r = r.astype(mx.float32) * weight[:, None]
        return a.T @ a, a.T @ r, r

    def add(self, gram: mx.array, cross: mx.array, missing: mx.array) -> None:
        """One batch's `products`."""
        self.gram += np.array(gram)
        self.cross += np.array(cross)
        self.before += float(np.square(np.array(missing), dtype=np.float64).sum())

    def left(self, update: np.ndarray) -> float:
        """The share of the weighted squared error that remains with an update U (D, F); 1 where there is none."""
        after = self.before - 2 * (update.T * self.cross).sum() + (update.T * (self.gram @ update.T)).sum()
        return float(after / self.before) if self.before else 1.0

    def update(self, ridge: float) -> np.ndarray:
        """U (D, F)."""
        size = len(self.gram)
        damped = self.gram + (ridge * np.trace(self.gram) / size + 1e-300) * np.eye(size)
        return np.asarray(np.linalg.solve(damped, self.cross).T)

    def judged(self, held_out: NormalEquations, ridges: Sequence[float] = RIDGES) -> tuple[np.ndarray, float]:
        """(U (D, F), the share of the error that it leaves held out): the ridge is the one that leaves least there,
        and U is then of all tokens. Nothing is changed, and 1 is left, where no ridge does better than that."""
        best, least = None, 1.0
        for ridge in ridges:
            if (left := held_out.left(self.update(ridge))) < least:
                best, least = ridge, left
        if best is None:
            return np.zeros(self.cross.T.shape), 1.0
        self.gram += held_out.gram
        self.cross += held_out.cross
        return self.update(best), least
