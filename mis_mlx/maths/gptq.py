"""GPTQ (arXiv 2210.17323): round a matrix so that its output changes least.

A matrix W (out, in) becomes Q. For inputs a with G = sum a a^T the output's squared error is
trace((W - Q) G (W - Q)^T). Columns are rounded one after the other, and the columns still to come
make up for the error of those before.

With G = N D N^T, N unit upper triangular and D diagonal, and E = W - Q, the error is the sum over
columns j of D_jj |E_j + sum_{i<j} N_ij E_i|^2. So column j is best rounded from
W_j + sum_{i<j} N_ij E_i, and what its own rounding then lacks counts D_jj. These are the paper's
numbers, without the inverse of G: N and D take the place of G, so that a matrix with 14,336 inputs
needs 0.8 GB instead of 2.5.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.maths.reconstruction import is_wide, precision
from mis_mlx.maths.rounding import (
    BEYOND,
    CANDIDATE_BITS,
    ENOUGH_BITS,
    FLOAT16_MOST,
    FUSED_CANDIDATES,
    GROUPS,
    PART,
    RANGE_ENDS,
    Packed,
    concatenated,
    fit_grids,
    packed_words,
)
from mis_mlx.types import MisError

DAMPING = 0.01  # share of the gram matrix's mean diagonal that is added to it, as in the paper
# Columns that are factorized at a time, and rows of a wide gram matrix that are summed at a time.
PANEL = 512
# Where a panel is not positive definite: times as much each time, and how many times at the most.
MORE_DAMPING = 10
MOST_DAMPINGS = 12
COLUMN_NUMBERS = 10  # that are written for a weight of a column until its error is known


class Factor(NamedTuple):
    """A damped gram matrix (in, in) as N D N^T.

    feedback: N, unit upper triangular; what lies on and below its diagonal is never read. costs: D,
    (in,), what the squared error of a column costs once later columns have made up for it.
    """

    feedback: np.ndarray
    costs: np.ndarray


def factorize(gram: np.ndarray) -> Factor:
    """The factor of G (in, in), which is overwritten. Only its upper triangle is read.

    It takes no more memory than G and a few panels of it, in G's own precision.
    """
    # Without damping an input that calibration never saw would make G singular; where it saw none
    # at all, G becomes the identity.
    damping = DAMPING * np.trace(gram) / len(gram)
    if damping == 0:
        damping = 1.0
    np.einsum("ii->i", gram)[:] += damping
    # Flipped in both axes, the lower triangular factor of the flipped G is the upper one of G.
    _cholesky(gram[::-1, ::-1], damping)
    diagonal = gram.diagonal().copy()
    gram /= diagonal
    return Factor(gram, diagonal**2)


def _cholesky(a: np.ndarray, damping: float) -> None:
    """Put L of A = L L^T (n, n) into A's lower triangle. What lies above it is never read.

    Panel by panel: numpy's own function makes copies of all of A. damping: of A's diagonal.
    """
    size = len(a)
    for start in range(0, size, PANEL):
        end = min(start + PANEL, size)
        corner = _corner(a[start:end, start:end], damping)
        a[start:end, start:end] = corner
        if end == size:
            return
        # the panel below the corner: X of X corner^T = A
        panel = a[end:, start:end] @ np.linalg.inv(corner).T
        a[end:, start:end] = panel
        # What the panel explains goes from the rest, some rows at a time.
        for first in range(end, size, PANEL):
            last = min(first + PANEL, size)
            left = panel[first - end : last - end]
            right = panel[: last - end]
            a[first:last, end:last] -= left @ right.T


def _corner(a: np.ndarray, damping: float) -> np.ndarray:
    """L of A = L L^T (n, n). Where float32 has lost what makes A positive, A gets more damping.

    MisError where that does not help, as of sums that overflowed.
    """
    for _ in range(MOST_DAMPINGS):
        try:
            return np.linalg.cholesky(a)
        except np.linalg.LinAlgError:
            damping *= MORE_DAMPING
            np.einsum("ii->i", a)[:] += damping
    raise MisError("a matrix's inputs are too large or not finite: use --q-method round")


def rounded(
    weights: Sequence[mx.array],
    factor: Factor,
    group: int,
    bits: int,
    *,
    fit: bool = True,
    fused: bool = False,
) -> list[Packed]:
    """Matrices [(out, in)] that read the inputs of the factor, in an affine format.

    Columns keep their own order, so that the groups are MLX's. `fit_grids` fits a group's scale and
    bias to its weights as compensated until then. Without `fit` it is MLX's rule; where inputs do
    not correlate, the result is then `nearest`'s, bit for bit. fused: for a GPU, as of
    `rounding.fit_grids`. MisError when a weight exceeds float16's range.
    """
    parts = []
    most = max(1, PART // len(factor.costs))
    for rows in _some_rows(weights, most):
        packed = _by_columns(rows, factor, group, bits, fit=fit, fused=fused)
        parts.append(packed)
    joined = concatenated(parts)
    if len(weights) == 1:
        return [joined]
    lengths = [len(weight) for weight in weights]
    ends = np.cumsum(lengths)[:-1].tolist()
    split = [mx.split(part, ends) for part in joined]
    return list(zip(*split, strict=True))


def _some_rows(weights: Sequence[mx.array], most: int) -> Iterator[np.ndarray]:
    """All rows of matrices with the same inputs, as (at most `most`, in) float32 at a time.

    Rows do not depend on each other, so small matrices share the work and large ones divide it.
    """
    waiting: list[np.ndarray] = []
    room = most
    for weight in weights:
        start = 0
        while start < len(weight):
            end = min(start + room, len(weight))
            rows = weight[start:end].astype(mx.float32)
            waiting.append(np.array(rows))
            room -= end - start
            start = end
            if not room:
                yield np.concatenate(waiting)
                waiting.clear()
                room = most
    if waiting:
        yield np.concatenate(waiting)


def _by_columns(
    weight: np.ndarray,
    factor: Factor,
    group: int,
    bits: int,
    *,
    fit: bool,
    fused: bool,
) -> Packed:
    """Some rows W (out, in), rounded column by column in the precision of the factor."""
    if np.abs(weight).max() > FLOAT16_MOST:
        raise MisError(BEYOND)
    feedback, costs = factor
    # (in, out), so that a column of the matrix lies in one piece. A column that is rounded leaves
    # its error here.
    w = np.array(weight.T, feedback.dtype, order="C")
    largest = 2**bits - 1
    chosen = np.empty(w.shape, np.uint8)
    scales = []
    biases = []
    for start in range(0, len(w), group):
        end = start + group
        # What all errors so far ask of the group's columns, in one matrix product. The columns can
        # give it together, so each of them sees what those before it will do.
        before = feedback[:start, start:end]
        asked = before.T @ w[:start]
        unit = np.triu(feedback[start:end, start:end], 1)
        np.fill_diagonal(unit, 1)
        inverse = np.linalg.inv(unit)
        wanted = w[start:end] + inverse.T @ asked
        # The grid of this group is fitted to its weights as earlier columns have corrected them.
        columns = mx.array(wanted.T.astype(np.float32))
        group_costs = mx.array(costs[start:end].astype(np.float32))
        group_scales, group_biases = _grids(columns, group_costs, bits, fit=fit, fused=fused)
        scales.append(group_scales)
        biases.append(group_biases)
        # The float32 scale and bias find an integer. Its value is what the stored float16 ones make
        # of it, so the error that later columns make up for includes the rounding of the scale.
        scale = np.array(group_scales).reshape(-1)
        bias = np.array(group_biases).reshape(-1)
        stored_scale = scale.astype(np.float16).astype(w.dtype)
        stored_bias = bias.astype(np.float16).astype(w.dtype)
        for j in range(group):
            column = wanted[j].astype(np.float32)
            levels = np.rint((column - bias) / scale)
            q = np.clip(levels, 0, largest)
            value = stored_scale * q + stored_bias
            chosen[start + j] = q
            w[start + j] -= value
            # Inside the group each column is corrected at once: the next one is rounded next.
            error = wanted[j] - value
            wanted[j + 1 :] -= inverse[j, j + 1 :, None] * error
    del w  # packing takes as much again
    words = mx.array(packed_words(chosen, bits))
    all_scales = mx.concatenate(scales, axis=1)
    all_biases = mx.concatenate(biases, axis=1)
    return words, all_scales.astype(mx.float16), all_biases.astype(mx.float16)


def _grids(
    columns: mx.array,
    costs: mx.array,
    bits: int,
    *,
    fit: bool,
    fused: bool,
) -> tuple[mx.array, mx.array]:
    """(scales, biases) (out, 1) of one group of columns (out, G), whose errors cost (G,)."""
    if fit:
        scales, biases = fit_grids(columns, bits, costs, fused=fused)
    else:
        group = columns.shape[1]
        _, scales, biases = mx.quantize(columns, group_size=group, bits=bits)
    return scales.reshape(-1, 1), biases.reshape(-1, 1)


Sides = Sequence[tuple[int, int]]  # (in, out) of matrices, those with the same inputs together


def work_bytes(sides: Sides, *, fused: bool) -> int:
    """The most that `factorize` and `rounded` hold besides G.

    To factorize, three panels and three corners. To round, 20 bytes for each weight of those
    rounded at a time, and those already packed; for a GPU two arrays of the grids that are tried
    for a group.
    """
    widest = max(inputs for inputs, _ in sides)
    panel = min(PANEL, widest)
    panels = 3 * (widest + panel) * panel * np.dtype(precision(widest)).itemsize
    weights = max(inputs * outputs for inputs, outputs in sides)
    columns = 20 * min(weights, PART)
    if fused:
        tried = RANGE_ENDS**2 * max(GROUPS) * max(outputs for _, outputs in sides)
        columns += 2 * 4 * min(tried, FUSED_CANDIDATES)
    return max(panels, 2 * packed_bytes(weights) + columns)


def packed_bytes(weights: int) -> int:
    """The most bytes of so many weights that are rounded."""
    bits = max(b for b in CANDIDATE_BITS if b < ENOUGH_BITS)
    return weights * bits // 8 + 4 * weights // min(GROUPS)


def operations(sides: Sides, group: int) -> tuple[float, float, float]:
    """What rounding matrices in groups of so many weights takes of numpy.

    (operations of a token's products in G; of those that round; float32 numbers that are written
    column by column.)
    """
    of_products: float = 0
    of_rounding: float = 0
    of_columns: float = 0
    for inputs, outputs in sides:
        # of wide ones one triangle of the sums, and float32, twice as quick as float64
        share = 0.5 if is_wide(inputs) else 1
        of_products += share * 2 * inputs**2
        of_rounding += share * inputs**2 * (inputs / 3 + outputs)
        # A column corrects those behind it in its group, half of them in the mean: a product and a
        # difference for each. A float64 number counts as two.
        of_columns += 2 * share * inputs * outputs * (group + COLUMN_NUMBERS)
    return of_products, of_rounding, of_columns
