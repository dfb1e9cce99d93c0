"""Round a matrix to one of MLX's formats, each weight to a value near it.

`nearest` takes MLX's own scales, `fitted` better ones. GPTQ, which chooses the values so that the
matrix's output changes least, is maths/gptq.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal

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
OPENED = 2**18  # weights that are de-quantized at a time
PART = 2**24  # weights of a matrix that are rounded at a time
SAMPLED = 2**15  # weights of a matrix on which `fit_share` is measured, at least a row
FITTED = 2**18  # weights whose grids are fitted at a time
# Weights times the grids that are tried for them at once, in arrays of float32. There are at most
# two of these. A GPU takes more at once, which is fewer launches.
CANDIDATES = 2**20
FUSED_CANDIDATES = 4 * CANDIDATES
RANGE_ENDS = 4  # places of a range's end that are tried, at either end
# How much of a group's range is cut off at an end in a step, by bits. Of 8 bits nothing is cut off:
# the range costs next to nothing there.
RANGE_STEPS = {2: 0.16, 3: 0.1, 4: 0.1, 5: 0.04, 6: 0.02}
REFINED = 2  # least-squares fits after the best range is found
# float32 numbers that a CPU writes for a weight of 3 to 6 bits whose grid is fitted
FITTED_NUMBERS = 225
LEAST_SCALE = 1e-12
LEAST_VARIANCE = 1e-9


def stochastic(weight: mx.array, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """The weight in float16 or bfloat16, each value up or down at random, right in the mean. Lazy.

    A value between two neighbours becomes the upper one as often as it is near to it, so that
    changes smaller than their distance stay in the mean; what `dtype` can hold stays as it is.
    Float32 stays float32. key: of `mx.random`.
    """
    if dtype == mx.float32:
        return weight.astype(dtype)
    wide = weight.astype(mx.float32)
    near = wide.astype(dtype)
    missed = mx.abs(wide - near.astype(mx.float32))
    # The bits of a float behind its sign rise with its size.
    larger = mx.abs(wide) > mx.abs(near.astype(mx.float32))
    bits = near.view(mx.uint16)
    other = mx.where(larger, bits + 1, bits - 1).view(dtype)
    distance = mx.abs(other.astype(mx.float32) - near.astype(mx.float32))
    moves = mx.random.uniform(shape=wide.shape, key=key) * distance < missed
    return mx.where(moves, other, near)


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


def fitted(weight: mx.array, group: int, bits: int, *, fused: bool = False) -> Packed:
    """A matrix (out, in) with every weight at its group's nearest value, on grids of `fit_grids`.

    In groups of 64 its squared error is 65 % of `nearest`'s at 2 bits for normal weights, 75 % at 3
    and 82 % at 4. Evaluated, some rows at a time. fused: as of `_best_grids`. MisError when a
    weight exceeds float16's range.
    """
    rows = max(1, FITTED // weight.shape[1])
    parts = []
    for start in range(0, len(weight), rows):
        some = weight[start : start + rows].astype(mx.float32)
        if (mx.abs(some) > FLOAT16_MOST).any().item():
            raise MisError(BEYOND)
        groups = some.reshape(len(some), -1, group)
        scales, biases = fit_grids(groups, bits, fused=fused)
        levels = _levels(groups, scales[..., None], biases[..., None], _largest(bits))
        words = packed_words(np.array(levels.reshape(some.shape)).T, bits)
        # By numpy, so that both are evaluated: a lazy one would keep all candidates' arrays.
        stored = [mx.array(np.array(part.astype(mx.float16))) for part in (scales, biases)]
        parts.append((mx.array(words), *stored))
    return concatenated(parts)


def squared_error(
    weight: mx.array,
    group: int,
    bits: int,
    *,
    fit: bool,
    fused: bool = False,
) -> float:
    """The sum of squared errors of `fitted`, or of `nearest`, on a small matrix (out, in)."""
    rows = weight.astype(mx.float32)
    if fit:
        groups = rows.reshape(len(rows), -1, group)
        _, _, means = _best_grids(groups, bits, fused=fused)
        errors = means * group
    else:
        errors = mx.square(values(nearest(rows, group, bits), group, bits) - rows)
    return float(errors.sum().item())  # type: ignore[arg-type]


def fit_share(weight: mx.array, group: int, bits: int, *, fused: bool = False) -> float:
    """The share of `nearest`'s squared error that `fitted` leaves, on some rows of a matrix."""
    step = max(1, weight.size // SAMPLED)
    rows = weight[::step]
    plain = squared_error(rows, group, bits, fit=False)
    if not plain:
        return 1.0
    return squared_error(rows, group, bits, fit=True, fused=fused) / plain


def fit_grids(
    groups: mx.array,
    bits: int,
    importance: mx.array | None = None,
    *,
    fused: bool = False,
) -> tuple[mx.array, mx.array]:
    """(scales, biases) (...,) float32 of groups (..., G) whose rounded values are near them. Lazy.

    importance: (G,), what a squared error of each weight counts; None: all the same. fused: as of
    `_best_grids`.

    MLX spreads the values from a group's least weight to its largest one, and moves an end so that
    zero is among them. A narrower range rounds most weights better and cuts a few off. So several
    ranges are tried, each end by itself. The best one is refined: while its integers are fixed,
    scale and bias are a line fitted by least squares. MLX's own grid is the first candidate, so the
    error is never larger than with that.
    """
    scales, biases, _ = _best_grids(groups, bits, importance, fused=fused)
    return scales, biases


def _best_grids(
    groups: mx.array,
    bits: int,
    importance: mx.array | None = None,
    *,
    fused: bool,
) -> tuple[mx.array, ...]:
    """Scales and biases of `fit_grids`, and the mean squared errors (...) with them. Lazy.

    fused: chains of element-wise operations are compiled to one kernel each. A GPU launches 51
    kernels then for a slab of groups, not 137. A CPU is slower with it. The numbers are the same.
    """
    size = groups.shape[-1]
    if importance is None:
        importance = mx.ones(size)
    shares = importance / importance.sum()
    ends = list(product(_range_shares(bits), repeat=2))
    ranges = mx.array(np.array(ends, np.float32).T[..., None, None])
    largest = _largest(bits)
    fit = _fit
    candidates = CANDIDATES
    if fused:
        fit = _fused_fit
        candidates = FUSED_CANDIDATES
    rows = max(1, candidates // (len(ends) * size))
    flat = groups.reshape(-1, size)
    fits: list[tuple[mx.array, ...]] = []
    for start in range(0, len(flat), rows):
        some = flat[start : start + rows]
        if fits:
            # One slab after the other: MLX would hold the candidates of several at once.
            some = mx.depends([some], list(fits[-1]))[0]
        _, *own = mx.quantize(some, group_size=size, bits=bits)
        fits.append(fit(some, shares, own, ranges=ranges, largest=largest))
    return tuple(part.reshape(groups.shape[:-1]) for part in concatenated(fits))


def _fit(
    groups: mx.array,
    shares: mx.array,
    own: Sequence[mx.array],
    *,
    ranges: mx.array,
    largest: mx.array,
) -> tuple[mx.array, ...]:
    """Scales, biases and errors (R, 1) of `fit_grids`, of groups (R, G). Lazy.

    shares: (G,), of the importance. own: MLX's scales and biases (R, 1). ranges: (2, C, 1, 1), the
    shares of a group's least and of its largest weight where the C ranges end that are tried.
    largest: `_largest` of the bits.

    Everything keeps the axes of the groups: a change of shape would end a chain of operations that
    MLX compiles to one kernel.
    """

    def mean(values: mx.array) -> mx.array:
        """The mean (..., 1) over groups (..., G), each weight counted by its share."""
        return (values * shares).sum(axis=-1, keepdims=True)

    def error(scales: mx.array, biases: mx.array) -> mx.array:
        """The mean squared errors (..., R, 1) on grids (..., R, 1)."""
        levels = _levels(groups, scales, biases, largest)
        # float16 is stored: of 8 bits its rounding is a good part of the error.
        scale = scales.astype(mx.float16).astype(mx.float32)
        bias = biases.astype(mx.float16).astype(mx.float32)
        rounded = levels * scale + bias
        return mean(mx.square(groups - rounded))

    def compared(scales: mx.array, biases: mx.array) -> tuple[mx.array, mx.array]:
        """Whether grids (..., R, 1) have smaller errors than the best so far; and these errors."""
        # A group of equal weights has no range: it keeps MLX's grid.
        usable = mx.abs(scales) > LEAST_SCALE
        safe = mx.where(usable, scales, 1.0)
        errors = error(safe, biases)
        return usable & (errors < best[2]), errors

    def chosen(wins: mx.array, *grid: mx.array) -> tuple[mx.array, ...]:
        """The best grids with these in the place of those that lose against them."""
        return tuple(mx.where(wins, mine, other) for mine, other in zip(grid, best, strict=True))

    best: tuple[mx.array, ...] = (*own, error(*own))
    mean_weight = mean(groups)
    # All ranges at once, in arrays (C, R, G). Of equally good ones the first is taken.
    low_shares, high_shares = ranges
    low = groups.min(axis=-1, keepdims=True)
    high = groups.max(axis=-1, keepdims=True)
    biases = low_shares * low
    wins, errors = compared((high_shares * high - biases) / largest, biases)
    errors = mx.where(wins, errors, mx.inf)
    least = errors.min(axis=0)
    first = errors.argmin(axis=0)
    # The best range's grid is made again: its shares are few, the grids of all ranges many.
    biases = mx.take(low_shares, first) * low
    scales = (mx.take(high_shares, first) * high - biases) / largest
    best = chosen(least < mx.inf, scales, biases, least)
    for _ in range(REFINED):
        # The line of least squares, where the integers stay as they are now.
        levels = _levels(groups, best[0], best[1], largest)
        mean_level = mean(levels)
        off_mean = levels - mean_level
        # The integers' variance, and their covariance with the weights: one array, one sum.
        is_variance = mx.array([True, False]).reshape(2, 1, 1)
        other = mx.where(is_variance, off_mean, groups)
        variance, covariance = mean(off_mean * other)
        scales = covariance / mx.maximum(variance, LEAST_VARIANCE)
        biases = mean_weight - scales * mean_level
        wins, errors = compared(scales, biases)
        best = chosen(wins, scales, biases, errors)
    return best


_fused_fit = mx.compile(_fit)


def _largest(bits: int) -> mx.array:
    """The largest integer of a grid. As an array it lets one compiled function do for all bits."""
    return mx.array(float(2**bits - 1))


def _levels(groups: mx.array, scales: mx.array, biases: mx.array, largest: mx.array) -> mx.array:
    """The integers (..., G) float32 nearest to groups (..., G), on grids (..., 1)."""
    levels = mx.round((groups - biases) / scales)
    return mx.clip(levels, 0, largest)


def _range_shares(bits: int) -> tuple[float, ...]:
    """Shares of a group's least and of its largest weight that are tried as ends of its range."""
    step = RANGE_STEPS.get(bits)
    if step is None:
        return (1.0,)
    return tuple(1.0 - step * number for number in range(RANGE_ENDS))


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
    """`values`, computed part by part and evaluated, on a CPU."""
    *outer, words = packed[0].shape
    matrix: Any = mx.zeros((*outer, words * 32 // bits), mx.float32)
    mx.eval(matrix)
    there = np.asarray(memoryview(matrix))  # numpy writes where MLX reads: no second copy
    start = 0
    for part in value_parts(packed, group, bits, mode):
        end = start + len(part)
        there[start:end] = part
        start = end
    return matrix  # type: ignore[no-any-return]


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


def unpacked(packed: mx.array, bits: int) -> mx.array:
    """The integers in packed words (out, in * bits / 32) uint32, as (out, in) uint8.

    By numpy: on a CPU about ten times as quick as by MLX, in little memory.
    """
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
