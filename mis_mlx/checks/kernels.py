"""This device's kernels and our arithmetic beside numpy in float64: (found, the most that is
right); NaN never is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import macos
from mis_mlx.maths import losses, reconstruction, rounding
from mis_mlx.models import load, policy
from mis_mlx.quantization.packed_format import Format

Found = tuple[float, float]
# Largest error as a share of the largest value: rounding of the result, and of sums of some hundred
# products.
ROUNDING = {mx.float32: 2e-5, mx.float16: 8e-3, mx.bfloat16: 3e-2}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FORMATS = {
    **{f"{bits}-bit": Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Format(4, 32, "mxfp4"),
    "nvfp4": Format(4, 16, "nvfp4"),
}


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within, the CPU computes in float32, whatever does outside: the witness of what numpy cannot
    do.
    """
    before = policy.use("float32")
    try:
        with macos.no_installer(), mx.stream(mx.cpu):
            yield
    finally:
        policy.use(before)


def wide(array: Any) -> np.ndarray:
    """The array in float64, in memory of its own."""
    return np.array(array.astype(mx.float32) if isinstance(array, mx.array) else array, np.float64)


def off(found: Any, want: Any) -> float:
    """The largest difference as a share of the largest value that was wanted; of several arrays the
    worst.
    """
    if isinstance(found, list | tuple):
        # spreads NaN, as max() does not
        return float(np.max([off(f, w) for f, w in zip(found, want, strict=True)]))
    return float(np.abs(wide(found) - wide(want)).max() / np.abs(wide(want)).max())


def drawn(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Standard normal numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def product(dtype: mx.Dtype) -> Found:
    """A matrix product. In float32 also what tells TF32 (M5, CUDA: MLX_ENABLE_TF32=0 turns it off)
    from float32.
    """
    a = drawn(0, 96, 256, dtype=dtype)
    b = drawn(1, 128, 256, dtype=dtype)
    return off(a @ b.T, wide(a) @ wide(b).T), ROUNDING[dtype]


def rms_norm(dtype: mx.Dtype) -> Found:
    """MLX's fast RMSNorm."""
    x = 3 * drawn(0, 24, 256, dtype=dtype)
    w = drawn(1, 256, dtype=dtype)
    want = wide(x) / np.sqrt(np.square(wide(x)).mean(axis=-1, keepdims=True) + 1e-5) * wide(w)
    return off(mx.fast.rms_norm(x, w, 1e-5), want), ROUNDING[dtype]


def rope(dtype: mx.Dtype) -> Found:
    """Rotary positions, from number 100 on."""
    x = drawn(0, 1, 2, 24, 64, dtype=dtype)
    half = 32
    angle = (100 + np.arange(24))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    a = wide(x)[..., :half]
    b = wide(x)[..., half:]
    want = np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )
    turned = mx.fast.rope(x, 64, traditional=False, base=10_000.0, scale=1.0, offset=100)
    # of float32 too: Metal's quick cosine is right to 13 bits
    return off(turned, want), ROUNDING[mx.float16]


def attention(dtype: mx.Dtype) -> Found:
    """Causal attention of two heads a key; of many queries and of one, which have kernels of their
    own.
    """
    q, k, v = (drawn(heads, 1, heads % 6, 40, 64, dtype=dtype) for heads in (4, 2, 8))
    z = wide(q) @ np.repeat(wide(k), 2, axis=1).swapaxes(-1, -2) / 8 + np.triu(
        np.full((40, 40), -np.inf), 1
    )
    want = softmax(z)[0] @ np.repeat(wide(v), 2, axis=1)
    work = partial(mx.fast.scaled_dot_product_attention, scale=1 / 8)
    return off(
        [work(q, k, v, mask="causal"), work(q[:, :, -1:], k, v)], [want, want[:, :, -1:]]
    ), ROUNDING[dtype]


def unpacked(name: str) -> Found:
    """A format's integers and values, taken apart bit by bit; and whether each weight got a near
    one. MLX cuts off up to a step at one end of an affine group, and scales in float16 move 8 bits
    by a quarter of one.
    """
    kind = FORMATS[name]
    weight = drawn(0, 32, 256)
    packed = rounding.nearest(weight, kind.group, kind.bits, kind.mode)
    bits = np.unpackbits(np.array(packed[0]).view(np.uint8), axis=1, bitorder="little")
    codes = bits.reshape(32, -1, kind.bits) @ (1 << np.arange(kind.bits))
    scale, *bias = (np.repeat(np.array(part), kind.group, axis=1) for part in packed[1:])
    if kind.mode == "affine":
        want = codes * wide(scale) + wide(bias[0])
        near = np.abs(want - wide(weight)) <= 1.25 * np.abs(wide(scale))
        right = (
            near.all()
            and (wide(rounding.integers(packed[0], kind.group, kind.bits)) == codes).all()
        )
    else:
        power = (scale >> 3 & 15).astype(int)
        part = scale & 7
        e4m3 = np.where(power > 0, (1 + part / 8) * 2.0 ** (power - 7), part / 8 * 2.0**-6)
        width = 2.0 ** (scale.astype(int) - 127) if kind.mode == "mxfp4" else e4m3
        want = np.where(codes & 8, -1, 1) * FP4[codes & 7] * width
        right = (np.abs(want - wide(weight)) <= 2 * width).all()
    return off(
        rounding.values(packed, kind.group, kind.bits, kind.mode), want
    ) if right else np.inf, 1e-6


def packed_products(dtype: mx.Dtype) -> Found:
    """Products with all packed formats, of many rows and of one; the worst."""
    x = drawn(0, 24, 256, dtype=dtype)
    found = list[mx.array]()
    want = list[np.ndarray]()
    for kind in FORMATS.values():
        layer = nn.Linear(256, 128, bias=False)
        layer.weight = drawn(1, 128, 256, dtype=dtype)
        layer = layer.to_quantized(kind.group, kind.bits, kind.mode)
        found += [layer(x), layer(x[:1])]
        dense = wide(load.dense_weight(layer))
        want += [wide(x) @ dense.T, wide(x[:1]) @ dense.T]
    return off(found, want), ROUNDING[dtype]


def softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax, its logarithm) over the last axis, in float64."""
    log = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    return np.exp(log), log


def chunked_kl(dtype: mx.Dtype) -> Found:
    """KL of 40 positions, eight at a time, with its gradients in hidden states and head."""
    h = drawn(0, 40, 64, dtype=dtype)
    w = (drawn(1, 512, 64) / 8).astype(dtype)
    t = drawn(2, 40, 64, dtype=dtype)
    work = mx.value_and_grad(
        lambda h, w: losses.kl_sum(h, w, t, lambda x: x @ w0.T, mx.ones(40), rows=8), [0, 1]
    )
    w0 = (drawn(3, 512, 64) / 8).astype(dtype)
    value, slopes = work(h, w)
    (p, log_p) = softmax(wide(t) @ wide(w0).T)
    (q, log_q) = softmax(wide(h) @ wide(w).T)
    want = [np.sum(p * (log_p - log_q)), (q - p) @ wide(w), (q - p).T @ wide(h)]
    # one rounding more for logits, their softmax, its product
    return off([value, *slopes], want), 5 * ROUNDING[dtype]


def logps(dtype: mx.Dtype) -> Found:
    """Log-probabilities of given tokens and their gradients, behind a cast and under a float32
    head, as LoRA has it.
    """
    h = drawn(0, 40, 64, dtype=dtype).astype(mx.float32)
    w = drawn(1, 512, 64) / 8
    ids = mx.arange(40) * 7
    work = mx.value_and_grad(
        lambda h, w: losses.token_logps(h.astype(dtype), w, ids, rows=8).sum(), [0, 1]
    )
    value, slopes = work(h, w)
    q, log_q = softmax(wide(h) @ wide(w).T)
    there = np.eye(512)[np.array(ids)] - q
    want = [
        np.take_along_axis(log_q, np.array(ids)[:, None], 1).sum(),
        there @ wide(w),
        there.T @ wide(h),
    ]
    return off([value, *slopes], want), 5 * ROUNDING[dtype]


def gptq() -> Found:
    """Share of GPTQ's integers that another device gives; a scale's last bit may turn one, and that
    its neighbours.
    """
    weight = np.array(drawn(0, 64, 256))
    inputs = wide(drawn(1, 512, 256) @ drawn(2, 256, 256))

    def codes() -> np.ndarray:
        return wide(
            rounding.integers(rounding.compensated(weight, inputs.T @ inputs, 64, 4)[0], 64, 4)
        )

    here = codes()
    with on_cpu():
        return float((here != codes()).mean()), 0.002


def closed_form() -> Found:
    """The repair's fit beside numpy's own solution of the same normal equations."""
    a = drawn(0, 400, 96)
    r = drawn(1, 400, 32)
    weight = mx.abs(drawn(2, 400)) + 0.5
    fit = reconstruction.NormalEquations(96, 32)
    for at in (slice(0, 150), slice(150, 400)):
        fit.add(*fit.products(a[at], r[at], weight[at]))
    wa, wr = (wide(of) * wide(weight)[:, None] for of in (a, r))
    gram = wa.T @ wa
    want = np.linalg.solve(gram + 0.1 * np.trace(gram) / 96 * np.eye(96), wa.T @ wr)
    return off(fit.update(0.1), want.T), 1e-4  # its products are float32


BY_TYPE = {"matrix product": product, "RMSNorm": rms_norm, "RoPE": rope, "attention": attention,
           "packed products": packed_products, "chunked KL, gradients": chunked_kl,
           "log-probabilities": logps}  # fmt: skip
CHECKS: dict[str, Callable[[], Found]] = {
    **{f"{name}, float32": partial(work, mx.float32) for name, work in BY_TYPE.items()},
    **{f"{name}, float16": partial(work, mx.float16) for name, work in BY_TYPE.items()},
    **{f"packing and values of {name}": partial(unpacked, name) for name in FORMATS},
    "GPTQ, integers unlike the CPU's": gptq,
    "repair, closed form": closed_form,
}
