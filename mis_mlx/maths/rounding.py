"""Round a matrix to one of MLX's formats: each weight to its nearest value, or so that its output
changes least.
"""

import math
from typing import Literal

import mlx.core as mx
import numpy as np

from mis_mlx.maths.reconstruction import inverse_root
from mis_mlx.types import MisError

Mode = Literal["affine", "mxfp4", "nvfp4"]
# As stored: integers (out, in * bits / 32) uint32, scales and biases (out, in / group) float16;
# without biases and with 8-bit scales in the other modes.
Packed = tuple[mx.array, ...]
BEYOND = "a matrix has weights beyond 65,504, where float16 scales end: leave the model unquantized"
BITS = (3, 4, 5, 6, 8)  # 2 are never worth it at these sizes; 7 MLX does not have
# Of quantization/bit_allocation, whose memory is planned:
# of what matrices see of windows; a block in float32, if more; a window at least
HELD_BYTES = 128 * 2**20
SLAB = 2**18  # weights whose gradients and errors exist at once
OPENED = 2**20  # weights that are de-quantized at a time
PART = 2**24  # weights of a matrix that are rounded at a time
DAMPING = 0.01  # of the gram matrix's mean diagonal, added to it: the paper's


def nearest(weight: mx.array, group: int, bits: int, mode: Mode = "affine") -> Packed:
    """Every weight of a matrix (out, in) to the nearest value that its group has, by MLX's own
    rule. Lazy.
    """
    packed, *scales = mx.quantize(weight.astype(mx.float32), group_size=group, bits=bits, mode=mode)
    # Affine scales are fitted in float32 and stored in float16: bfloat16 scales would cost 3 bits
    # of them.
    return packed, *(s.astype(mx.float16) if mode == "affine" else s for s in scales)


def values(packed: Packed, group: int, bits: int, mode: Mode = "affine") -> mx.array:
    """The matrix (out, in) float32 that a packed one stands for. Lazy."""
    scales = [s.astype(mx.float32) if mode == "affine" else s for s in packed[1:]]
    biases = scales[1] if mode == "affine" else None
    return mx.dequantize(packed[0], scales[0], biases, group, bits, mode).astype(mx.float32)


def opened(packed: Packed, group: int, bits: int, mode: Mode = "affine") -> mx.array:
    """`values`, made part by part: of a whole matrix a CPU holds up to five copies meanwhile."""
    shape, rows = packed[0].shape, max(1, OPENED * bits // 32 // math.prod(packed[0].shape[1:]))
    whole = np.empty((*shape[:-1], shape[-1] * 32 // bits), np.float32)
    for at in range(0, len(whole), rows):
        whole[at : at + rows] = values(tuple(p[at : at + rows] for p in packed), group, bits, mode)
    return mx.array(whole)


def integers(packed: mx.array, group: int, bits: int) -> mx.array:
    """What is packed in (out, in * bits / 32) uint32, for a scale of 1 and a bias of 0: (out, in)
    uint8. Lazy.
    """
    ones = mx.ones((len(packed), packed.shape[1] * 32 // bits // group))
    return mx.dequantize(packed, ones, mx.zeros_like(ones), group_size=group, bits=bits).astype(
        mx.uint8
    )


def compensated(weight: np.ndarray, gram: np.ndarray, group: int, bits: int) -> Packed:
    """A matrix W (out, in) rounded column by column, each error made up for by the columns still to
    come.

    gram: G (in, in), the sum of a a^T over inputs a; what is made small is the output's squared
    error, trace((W - Q) G (W - Q)^T). GPTQ (arXiv 2210.17323, algorithm 1), with columns in their
    own order, so that the groups are MLX's: scale and bias of a group are what MLX gives to its
    weights as compensated until then. Where inputs do not correlate, the result is `nearest`'s, bit
    for bit. Rows do not know of each other: a large matrix is rounded some of them at a time.
    """
    u = inverse_factor(gram)
    rows = max(1, PART // weight.shape[1])
    parts = [
        _by_columns(weight[at : at + rows], u, group, bits) for at in range(0, len(weight), rows)
    ]
    return (
        tuple(mx.concatenate(list(part)) for part in zip(*parts, strict=True))
        if parts[1:]
        else parts[0]
    )


def _by_columns(weight: np.ndarray, u: np.ndarray, group: int, bits: int) -> Packed:
    if np.abs(weight).max() > 65504:
        raise MisError(BEYOND)
    # (in, out): a column of the matrix lies in one piece
    w = np.array(weight.T, np.float64, order="C")
    chosen = np.empty(w.shape, np.uint32)
    grids = []
    for start in range(0, len(w), group):
        end = start + group
        grids.append(
            mx.quantize(mx.array(w[start:end].T.astype(np.float32)), group_size=group, bits=bits)[
                1:
            ]
        )
        scale, bias = (np.array(a)[:, 0] for a in grids[-1])  # integers are found with these
        # and mean this, as stored
        kept, shift = (a.astype(np.float16).astype(np.float64) for a in (scale, bias))
        error = np.empty((group, w.shape[1]))
        for j in range(start, end):
            q = np.clip(np.rint((w[j].astype(np.float32) - bias) / scale), 0, 2**bits - 1)
            chosen[j] = q
            error[j - start] = (w[j] - (kept * q + shift)) / u[j, j]
            w[j + 1 : end] -= u[j, j + 1 : end, None] * error[j - start]
        w[end:] -= u[start:end, end:].T @ error
    scales, biases = (
        mx.concatenate(list(part), axis=1).astype(mx.float16) for part in zip(*grids, strict=True)
    )
    # As MLX packs integers: one stream of bits a row, the lowest first.
    each = chosen.T.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    packed = np.packbits(each.reshape(len(each), -1), axis=1, bitorder="little").view(np.uint32)
    return mx.array(packed), scales, biases


def inverse_factor(gram: np.ndarray) -> np.ndarray:
    """The upper triangular U (in, in), in the gram's precision, of U^T U = (G + damping)^-1."""
    turned = gram[::-1, ::-1].copy()  # the lower factor of this, turned back, is the upper one of G
    turned.flat[:: len(gram) + 1] += DAMPING * np.trace(gram) / len(gram) or 1.0
    if turned.dtype == np.float32:
        return np.array(inverse_root(turned))[::-1, ::-1]
    turned = np.linalg.cholesky(turned)
    return np.linalg.inv(turned[::-1, ::-1])
