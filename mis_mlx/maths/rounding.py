"""Round a matrix to one of MLX's formats, each weight to a value near it.

`nearest` takes MLX's own scales, `fitted` better ones. GPTQ, which chooses the values so that the
matrix's output changes least, is maths/gptq.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal

import mlx.core as mx
import numpy as np

from mis_mlx.types import MisError

Mode = Literal["affine", "mxfp4", "nvfp4"]
# As stored: integers (out, in * bits / 32) uint32, scales and biases (out, in / group) float16.
# The other modes have no biases, and 8-bit scales.
Packed = tuple[mx.array, ...]
FLOAT16_MOST = 65504
BEYOND = "a matrix has weights beyond 65,504, where float16 scales end: leave the model unquantized"
# Numbers of bits whose cost is measured; MLX has no 7-bit format.
CANDIDATE_BITS = (3, 4, 5, 6, 8)
ENOUGH_BITS = 8  # rounding costs nothing there: such matrices get their nearest values
GROUPS = (32, 64, 128)  # weights that may share a scale
# The next two belong to quantization/bit_allocation; the planner reads them from here.
# Bytes of the windows' inputs and cotangents that a block holds. It holds at least one window, and
# as many bytes as its own matrices have in float32.
HELD_BYTES = 128 * 2**20
SLAB = 2**18  # weights whose gradients and errors exist at once
OPENED = 2**20  # weights that are de-quantized at a time
PART = 2**24  # weights of a matrix that are rounded at a time
SAMPLED = 2**15  # weights of a matrix on which `fit_share` is measured, at least a row
FITTED = 2**18  # weights whose grids are fitted at a time
# How much of a group's range is cut off at an end in a step, by bits; four steps are tried. Of 8
# bits nothing is cut off: the range costs next to nothing there.
RANGE_STEPS = {2: 0.16, 3: 0.1, 4: 0.1, 5: 0.04, 6: 0.02}
REFINED = 2  # least-squares fits after the best range is found
LEAST_SCALE = 1e-12
LEAST_VARIANCE = 1e-9


def nearest(
    weight: mx.array,
    group: int,
    bits: int,
    mode: Mode = "affine",
) -> Packed:
    """A matrix (out, in) with every weight at its group's nearest value, by MLX's own rule. Lazy.

    Affine scales and biases are stored in float16.
    """
    # A scale in bfloat16 would lose 3 bits of its precision. So a matrix in bfloat16 is widened
    # first: MLX then fits the scales in float32.
    wide = weight.astype(mx.float32)
    packed, *scales = mx.quantize(
        wide,
        group_size=group,
        bits=bits,
        mode=mode,
    )
    if mode != "affine":
        return packed, *scales
    return packed, *(scale.astype(mx.float16) for scale in scales)


def fitted(weight: mx.array, group: int, bits: int) -> Packed:
    """A matrix (out, in) with every weight at its group's nearest value, on grids of `fit_grids`.

    In groups of 64 its squared error is 65 % of `nearest`'s at 2 bits for normal weights, 75 % at 3
    and 82 % at 4. Evaluated, some rows at a time. MisError when a weight exceeds float16's range.
    """
    rows = max(1, FITTED // weight.shape[1])
    parts = []
    for start in range(0, len(weight), rows):
        some = weight[start : start + rows].astype(mx.float32)
        if (mx.abs(some) > FLOAT16_MOST).any().item():
            raise MisError(BEYOND)
        groups = some.reshape(len(some), -1, group)
        scales, biases = fit_grids(groups, bits)
        levels = _levels(groups, scales, biases, bits).reshape(some.shape)
        words = packed_words(np.array(levels).T, bits)
        # By numpy, so that both are evaluated: a lazy one would keep all candidates' arrays.
        stored = [mx.array(np.array(part.astype(mx.float16))) for part in (scales, biases)]
        parts.append((mx.array(words), *stored))
    return concatenated(parts)


def squared_error(weight: mx.array, group: int, bits: int, *, fit: bool) -> float:
    """The sum of squared errors of `fitted`, or of `nearest`, on a small matrix (out, in)."""
    rows = weight.astype(mx.float32)
    if fit:
        groups = rows.reshape(len(rows), -1, group)
        errors = _best_fit(groups, bits, mx.ones(group)).errors * group
    else:
        errors = mx.square(values(nearest(rows, group, bits), group, bits) - rows)
    return float(errors.sum().item())  # type: ignore[arg-type]


def fit_share(weight: mx.array, group: int, bits: int) -> float:
    """The share of `nearest`'s squared error that `fitted` leaves, on some rows of a matrix."""
    step = max(1, weight.size // SAMPLED)
    rows = weight[::step]
    plain = squared_error(rows, group, bits, fit=False)
    if not plain:
        return 1.0
    return squared_error(rows, group, bits, fit=True) / plain


def fit_grids(
    groups: mx.array,
    bits: int,
    importance: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """(scales, biases) (...,) float32 of groups (..., G) whose rounded values are near them. Lazy.

    importance: (G,) or (..., G), what a squared error of each weight counts; None: all the same.

    MLX spreads the values from a group's least weight to its largest one, and moves an end so that
    zero is among them. A narrower range rounds most weights better and cuts a few off. So several
    ranges are tried, each end by itself. The best one is refined: while its integers are fixed,
    scale and bias are a line fitted by least squares. MLX's own grid is the first candidate, so the
    error is never larger than with that.
    """
    if importance is None:
        importance = mx.ones(groups.shape[-1])
    fit = _best_fit(groups, bits, importance)
    return fit.scales, fit.biases


class _GridFit:
    """The best grids of groups (..., G) so far: scales and biases (...), and their errors (...).

    importance: as of `fit_grids`. MLX's own grids are the first.
    """

    def __init__(self, groups: mx.array, bits: int, importance: mx.array):
        self.groups = groups
        self.bits = bits
        self.shares = importance / importance.sum(axis=-1, keepdims=True)
        size = groups.shape[-1]
        own = mx.quantize(groups.reshape(-1, size), group_size=size, bits=bits)
        self.scales = own[1].reshape(groups.shape[:-1])
        self.biases = own[2].reshape(groups.shape[:-1])
        self.errors = self._error(self.scales, self.biases)

    def offer(self, scales: mx.array, biases: mx.array) -> None:
        """Take these grids for the groups where their error is smaller."""
        # A group of equal weights has no range: it keeps MLX's grid.
        usable = mx.abs(scales) > LEAST_SCALE
        safe = mx.where(usable, scales, 1.0)
        errors = self._error(safe, biases)
        wins = usable & (errors < self.errors)
        self.errors = mx.where(wins, errors, self.errors)
        self.scales = mx.where(wins, scales, self.scales)
        self.biases = mx.where(wins, biases, self.biases)

    def line(self) -> tuple[mx.array, mx.array]:
        """Scales and biases of least squares, where the integers stay as they are now."""
        levels = _levels(self.groups, self.scales, self.biases, self.bits)
        mean_level = self._mean(levels)
        mean_weight = self._mean(self.groups)
        off_mean = levels - mean_level[..., None]
        variance = self._mean(mx.square(off_mean))
        covariance = self._mean(off_mean * self.groups)
        scales = covariance / mx.maximum(variance, LEAST_VARIANCE)
        return scales, mean_weight - scales * mean_level

    def _error(self, scales: mx.array, biases: mx.array) -> mx.array:
        levels = _levels(self.groups, scales, biases, self.bits)
        # float16 is stored: of 8 bits its rounding is a good part of the error.
        scale = scales.astype(mx.float16).astype(mx.float32)[..., None]
        bias = biases.astype(mx.float16).astype(mx.float32)[..., None]
        rounded = levels * scale + bias
        return self._mean(mx.square(self.groups - rounded))

    def _mean(self, values: mx.array) -> mx.array:
        """The mean (...) over a group (..., G), each weight counted by its share."""
        return (values * self.shares).sum(axis=-1)


def _best_fit(groups: mx.array, bits: int, importance: mx.array) -> _GridFit:
    """The grids of `fit_grids`, with their errors. Lazy."""
    fit = _GridFit(groups, bits, importance)
    low = groups.min(axis=-1)
    high = groups.max(axis=-1)
    for low_share, high_share in product(_range_shares(bits), repeat=2):
        width = high * high_share - low * low_share
        fit.offer(width / (2**bits - 1), low * low_share)
    for _ in range(REFINED):
        fit.offer(*fit.line())
    return fit


def _levels(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The integers (..., G) float32 nearest to groups (..., G), on grids (...)."""
    levels = mx.round((groups - biases[..., None]) / scales[..., None])
    return mx.clip(levels, 0, 2**bits - 1)


def _range_shares(bits: int) -> tuple[float, ...]:
    """Shares of a group's least and of its largest weight that are tried as ends of its range."""
    step = RANGE_STEPS.get(bits)
    if step is None:
        return (1.0,)
    return tuple(1.0 - step * number for number in range(4))


def values(
    packed: Packed,
    group: int,
    bits: int,
    mode: Mode = "affine",
) -> mx.array:
    """The matrix (out, in) float32 that a packed one stands for. Lazy."""
    scales = packed[1]
    biases = None
    if mode == "affine":
        scales = scales.astype(mx.float32)
        biases = packed[2].astype(mx.float32)
    weight = mx.dequantize(
        packed[0],
        scales,
        biases,
        group_size=group,
        bits=bits,
        mode=mode,
    )
    return weight.astype(mx.float32)


def dequantized(
    packed: Packed,
    group: int,
    bits: int,
    mode: Mode = "affine",
) -> mx.array:
    """`values`, computed part by part and evaluated."""
    *outer, words = packed[0].shape
    matrix = np.empty((*outer, words * 32 // bits), np.float32)
    start = 0
    for part in value_parts(packed, group, bits, mode):
        end = start + len(part)
        matrix[start:end] = part
        start = end
    return mx.array(matrix)


def value_parts(
    packed: Packed,
    group: int,
    bits: int,
    mode: Mode = "affine",
) -> Iterator[mx.array]:
    """`values` of some rows after the others, lazy.

    De-quantizing a matrix at once makes a CPU hold up to five copies of it meanwhile.
    """
    words_per_row = math.prod(packed[0].shape[1:])
    rows = max(1, OPENED * bits // 32 // words_per_row)
    for start in range(0, len(packed[0]), rows):
        some = tuple(part[start : start + rows] for part in packed)
        yield values(some, group, bits, mode)


def integers(packed: mx.array, group: int, bits: int) -> mx.array:
    """The integers in packed words (out, in * bits / 32) uint32, as (out, in) uint8. Lazy."""
    # A scale of 1 and a bias of 0 leave the integers as they are.
    groups = packed.shape[1] * 32 // bits // group
    ones = mx.ones((len(packed), groups))
    zeros = mx.zeros_like(ones)
    levels = mx.dequantize(
        packed,
        ones,
        zeros,
        group_size=group,
        bits=bits,
    )
    return levels.astype(mx.uint8)


def unpacked(packed: mx.array, bits: int) -> mx.array:
    """`integers`, evaluated, by numpy: on a CPU about ten times as quick, in little memory."""
    words = np.array(packed)
    rows = len(words)
    levels = np.empty((rows, words.shape[1] * 32 // bits), np.uint8)
    step = max(1, OPENED // levels.shape[1])
    mask = np.uint64(2**bits - 1)
    for start in range(0, rows, step):
        # Eight integers lie in as many bytes as each has bits.
        eights = words[start : start + step].view(np.uint8).reshape(-1, bits)
        padded = np.zeros((len(eights), 8), np.uint8)
        padded[:, :bits] = eights
        codes = padded.view("<u8").reshape(-1)
        some = np.empty((len(codes), 8), np.uint8)
        for k in range(8):
            shift = np.uint64(bits * k)
            shifted = codes >> shift
            some[:, k] = shifted & mask
        levels[start : start + step] = some.reshape(-1, levels.shape[1])
    return mx.array(levels)


def concatenated(parts: Sequence[Packed]) -> Packed:
    """One packed matrix, made of some rows of it after the others."""
    if len(parts) == 1:
        return parts[0]
    return tuple(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))


def packed_words(chosen: np.ndarray, bits: int) -> np.ndarray:
    """Integers (in, out) as MLX packs them, (out, in * bits / 32) uint32.

    A row is one stream of bits, the lowest bit of an integer first.
    """
    positions = np.arange(bits, dtype=np.uint8)
    stream = chosen.T.astype(np.uint8)[..., None] >> positions
    stream &= 1
    packed = np.packbits(stream.reshape(len(stream), -1), axis=1, bitorder="little")
    return packed.view(np.uint32)
