"""Compare this device's kernels and our arithmetic with numpy in float64.

Every check returns (error, the largest error that passes). A NaN never passes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import macos
from mis_mlx.maths import gptq, losses, reconstruction, rounding
from mis_mlx.models.architectures import modules
from mis_mlx.quantization.packed_format import Format

Found = tuple[float, float]
Compared = tuple[Any, Any]  # (what this device gives, what numpy gives)
Check = Callable[[], Found]
TypedCheck = Callable[[mx.Dtype], Found]
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
    """Compute on the CPU within: the witness where numpy cannot do the work."""
    with macos.no_installer(), mx.stream(mx.cpu):
        yield


def to_float64(array: Any) -> np.ndarray:
    """Copy an array of MLX or numpy to float64, in memory of its own."""
    if isinstance(array, mx.array):
        array = array.astype(mx.float32)  # numpy has no bfloat16
    return np.array(array, np.float64)


def relative_error(got: Any, want: Any) -> float:
    """Return the largest error as a share of the largest expected value.

    Of several arrays it is the worst; a NaN anywhere makes it NaN."""
    if isinstance(got, list | tuple):
        errors = [
            relative_error(actual, expected) for actual, expected in zip(got, want, strict=True)
        ]
        return float(np.max(errors))  # spreads NaN, as max() does not
    expected = to_float64(want)
    error = np.abs(to_float64(got) - expected).max()
    return float(error / np.abs(expected).max())


def random_normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Draw standard normal numbers."""
    numbers = mx.random.normal(shape, key=mx.random.key(seed))
    return numbers.astype(dtype)


def softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax, its logarithm) over the last axis, in float64."""
    log_sum = np.logaddexp.reduce(z, axis=-1, keepdims=True)
    log = z - log_sum
    return np.exp(log), log


def check_within(roundings: float) -> Callable[[Callable[..., Compared]], TypedCheck]:
    """Make a check of a function that returns what to compare.

    It passes where the error is at most `roundings` times the ROUNDING of the check's dtype."""

    def decorate(compared: Callable[..., Compared]) -> TypedCheck:
        def check(dtype: mx.Dtype) -> Found:
            return relative_error(*compared(dtype)), roundings * ROUNDING[dtype]

        return check

    return decorate


def in_both_types(checks: dict[str, TypedCheck]) -> dict[str, Check]:
    """Every check in float32, then every check in float16, by name."""
    return {
        **{f"{name}, float32": partial(check, mx.float32) for name, check in checks.items()},
        **{f"{name}, float16": partial(check, mx.float16) for name, check in checks.items()},
    }


def exact_rms_norm(x: mx.array, weight: mx.array) -> np.ndarray:
    """RMSNorm of x (..., D) with weight (D,) and epsilon 1e-5, in float64."""
    exact = to_float64(x)
    mean_square = np.square(exact).mean(axis=-1, keepdims=True)
    normed = exact / np.sqrt(mean_square + 1e-5)
    return normed * to_float64(weight)


def exact_attention(queries: mx.array, keys: mx.array, values: mx.array) -> np.ndarray:
    """Causal attention in float64, with heads of 64 and several query heads a key head.

    queries: (1, heads, T, 64). keys, values: (1, key heads, T, 64)."""
    _, heads, tokens, _ = queries.shape
    heads_per_key = heads // keys.shape[1]
    mask = np.triu(np.full((tokens, tokens), -np.inf), 1)
    each_key = np.repeat(to_float64(keys), heads_per_key, axis=1)
    each_value = np.repeat(to_float64(values), heads_per_key, axis=1)
    scores = to_float64(queries) @ each_key.swapaxes(-1, -2) / 8 + mask
    weights, _ = softmax(scores)
    return weights @ each_value


def kl_inputs(
    dtype: mx.Dtype, positions: int, width: int, vocab: int, *, divisor: float
) -> list[mx.array]:
    """[states, head, teacher's states, teacher's head]: (positions, width), (vocab, width), twice.

    Heads are normal with standard deviation 1 / divisor."""
    return [
        random_normal(0, positions, width, dtype=dtype),
        (random_normal(1, vocab, width) / divisor).astype(dtype),
        random_normal(2, positions, width, dtype=dtype),
        (random_normal(3, vocab, width) / divisor).astype(dtype),
    ]


def chunked(inputs: list[mx.array], teacher_logits: losses.Logits, rows: int) -> list[mx.array]:
    """[KL summed, its gradients in states and head] of `kl_inputs`, `rows` positions at a time."""
    states, head, teacher_states, _ = inputs
    ones = mx.ones(len(states))

    def loss(states: mx.array, head: mx.array) -> mx.array:
        return losses.kl_sum(
            states, head, teacher_states, teacher_logits, loss_mask=ones, rows=rows
        )

    value, grads = mx.value_and_grad(loss, [0, 1])(states, head)
    return [value, *grads]


def exact_kl(inputs: list[mx.array], rows: Any = slice(None)) -> list[np.ndarray]:
    """[KL(teacher || student) summed, its gradients in states and head] of `kl_inputs`, in float64.

    rows: the tokens whose rows of the head's gradient are computed; default: all."""
    states, head, teacher_states, teacher_head = inputs
    p, log_p = softmax(to_float64(teacher_states) @ to_float64(teacher_head).T)
    q, log_q = softmax(to_float64(states) @ to_float64(head).T)
    gradient = q - p  # in the logits
    kl = np.sum(p * (log_p - log_q))
    return [kl, gradient @ to_float64(head), gradient[:, rows].T @ to_float64(states)]


@check_within(1)
def product(dtype: mx.Dtype) -> Compared:
    """Check a matrix product.

    In float32 it also tells TF32 from float32 (M5, CUDA: MLX_ENABLE_TF32=0 turns TF32 off)."""
    left = random_normal(0, 96, 256, dtype=dtype)
    right = random_normal(1, 128, 256, dtype=dtype)
    return left @ right.T, to_float64(left) @ to_float64(right).T


@check_within(1)
def rms_norm(dtype: mx.Dtype) -> Compared:
    """Check MLX's fast RMSNorm."""
    x = 3 * random_normal(0, 24, 256, dtype=dtype)
    weight = random_normal(1, 256, dtype=dtype)
    return mx.fast.rms_norm(x, weight, 1e-5), exact_rms_norm(x, weight)


def rope(dtype: mx.Dtype) -> Found:
    """Check rotary positions, from position 100 on."""
    shape = (1, 2, 24, 64)
    x = random_normal(0, *shape, dtype=dtype)
    half = 32
    frequency = 10_000.0 ** (-np.arange(half) / half)
    angle = (100 + np.arange(24))[:, None] * frequency
    cos = np.cos(angle)
    sin = np.sin(angle)
    first, second = np.split(to_float64(x), 2, axis=-1)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    expected = np.concatenate([turned_first, turned_second], axis=-1)
    rotated = mx.fast.rope(x, 64, traditional=False, base=10_000.0, scale=1.0, offset=100)
    # float16's bound for float32 too: Metal's quick cosine is right to 13 bits
    return relative_error(rotated, expected), ROUNDING[mx.float16]


@check_within(1)
def attention(dtype: mx.Dtype) -> Compared:
    """Check causal attention with two query heads a key head, at 40 queries and at one.

    MLX has a kernel of its own for each of the two."""
    key_shape = (1, 2, 40, 64)
    query_shape = (1, 4, 40, 64)
    queries = random_normal(4, *query_shape, dtype=dtype)
    keys = random_normal(2, *key_shape, dtype=dtype)
    values = random_normal(8, *key_shape, dtype=dtype)
    attend = partial(mx.fast.scaled_dot_product_attention, scale=1 / 8)
    many = attend(queries, keys, values, mask="causal")
    single = attend(queries[:, :, -1:], keys, values)
    expected = exact_attention(queries, keys, values)
    return [many, single], [expected, expected[:, :, -1:]]


def _codes(packed: mx.array, bits: int) -> np.ndarray:
    """The integers in packed words (out, n) uint32, taken apart bit by bit."""
    octets = np.array(packed).view(np.uint8)
    ones = np.unpackbits(octets, axis=1, bitorder="little")
    powers = 1 << np.arange(bits)
    return ones.reshape(len(ones), -1, bits) @ powers


def _fp4_widths(scale: np.ndarray, mode: str) -> np.ndarray:
    """The numbers that scale bytes stand for: powers of two (mxfp4) or e4m3 (nvfp4)."""
    if mode == "mxfp4":
        return 2.0 ** (scale.astype(int) - 127)
    power = (scale >> 3 & 15).astype(int)
    fraction = scale & 7
    normal = (1 + fraction / 8) * 2.0 ** (power - 7)
    return np.where(power > 0, normal, fraction / 8 * 2.0**-6)


def unpacked(name: str) -> Found:
    """Check a format's integers and values bit by bit, and that each weight got a near value.

    MLX cuts off up to a step at one end of an affine group, and scales in float16 move 8 bits by a
    quarter of a step. The error is infinite where an integer is wrong or a value is not near."""
    kind = FORMATS[name]
    matrix = random_normal(0, 32, 256)
    weight = to_float64(matrix)
    packed = rounding.nearest(matrix, kind.group, kind.bits, kind.mode)
    codes = _codes(packed[0], kind.bits)
    scale, *bias = (np.repeat(np.array(part), kind.group, axis=1) for part in packed[1:])
    integers = codes
    if kind.mode == "affine":
        step = to_float64(scale)
        expected = codes * step + to_float64(bias[0])
        tolerance = 1.25 * np.abs(step)
        integers = to_float64(rounding.integers(packed[0], kind.group, kind.bits))
    else:
        width = _fp4_widths(scale, kind.mode)
        sign = np.where(codes & 8, -1, 1)
        expected = sign * FP4[codes & 7] * width
        tolerance = 2 * width
    near = np.abs(expected - weight) <= tolerance
    if not near.all() or not np.array_equal(integers, codes):
        return np.inf, 1e-6
    values = rounding.values(packed, kind.group, kind.bits, kind.mode)
    return relative_error(values, expected), 1e-6


@check_within(1)
def packed_products(dtype: mx.Dtype) -> Compared:
    """Check products with all packed formats, of 24 rows and of one; the worst."""
    x = random_normal(0, 24, 256, dtype=dtype)
    row = x[:1]
    outputs = list[mx.array]()
    expected = list[np.ndarray]()
    for kind in FORMATS.values():
        layer = nn.Linear(256, 128, bias=False)
        layer.weight = random_normal(1, 128, 256, dtype=dtype)
        layer = layer.to_quantized(kind.group, kind.bits, kind.mode)
        outputs.append(layer(x))
        outputs.append(layer(row))
        dense = to_float64(modules.dense_weight(layer))
        expected.append(to_float64(x) @ dense.T)
        expected.append(to_float64(row) @ dense.T)
    return outputs, expected


@check_within(5)  # one rounding more for logits, their softmax, its product
def chunked_kl(dtype: mx.Dtype) -> Compared:
    """Check the KL of 40 positions, eight at a time, with its gradients in states and head."""
    inputs = kl_inputs(dtype, positions=40, width=64, vocab=512, divisor=8)
    teacher_head = inputs[-1]

    def teacher_logits(hidden: mx.array) -> mx.array:
        return hidden @ teacher_head.T

    outputs = chunked(inputs, teacher_logits, rows=8)
    expected = exact_kl(inputs)
    return outputs, expected


@check_within(5)
def logps(dtype: mx.Dtype) -> Compared:
    """Check log-probabilities of given tokens and their gradients.

    States pass a cast to `dtype` and meet a float32 head, as with LoRA."""
    states = random_normal(0, 40, 64, dtype=dtype).astype(mx.float32)
    head = random_normal(1, 512, 64) / 8
    ids = mx.arange(40) * 7

    def total(states: mx.array, head: mx.array) -> mx.array:
        return losses.token_logps(states.astype(dtype), head, ids, rows=8).sum()

    value, grads = mx.value_and_grad(total, [0, 1])(states, head)
    q, log_q = softmax(to_float64(states) @ to_float64(head).T)
    targets = np.array(ids)
    chosen = np.take_along_axis(log_q, targets[:, None], 1)
    gradient = np.eye(512)[targets] - q  # in the logits
    return [value, *grads], [
        chosen.sum(),
        gradient @ to_float64(head),
        gradient.T @ to_float64(states),
    ]


def gptq_integers() -> Found:
    """Check the share of GPTQ's integers that the CPU computes differently.

    A scale's last bit may change one integer, and through it its neighbours."""
    weight = random_normal(0, 64, 256)
    inputs = to_float64(random_normal(1, 512, 256) @ random_normal(2, 256, 256))
    gram = inputs.T @ inputs

    def codes() -> np.ndarray:
        factor = gptq.factorize(gram.copy())
        packed = gptq.rounded([weight], factor, 64, 4)[0]
        return to_float64(rounding.integers(packed[0], 64, 4))

    here = codes()
    with on_cpu():
        differs = here != codes()
    return float(differs.mean()), 0.002


def closed_form() -> Found:
    """Check the repair's fit against numpy's solution of the same normal equations."""
    inputs = random_normal(0, 400, 96)
    missing = random_normal(1, 400, 32)
    weight = mx.abs(random_normal(2, 400)) + 0.5
    fit = reconstruction.NormalEquations(96, 32)
    for rows in (slice(0, 150), slice(150, 400)):
        gram, cross = fit.products(inputs[rows], missing[rows], weight[rows])
        fit.add(gram, cross)
    column = to_float64(weight)[:, None]
    weighted = to_float64(inputs) * column
    exact_gram = weighted.T @ weighted
    exact_cross = weighted.T @ (to_float64(missing) * column)
    ridge = 0.1 * np.trace(exact_gram) / 96 * np.eye(96)
    expected = np.linalg.solve(exact_gram + ridge, exact_cross)
    return relative_error(fit.update(0.1), expected.T), 1e-4  # its products are float32


BY_TYPE: dict[str, TypedCheck] = {
    "matrix product": product,
    "RMSNorm": rms_norm,
    "RoPE": rope,
    "attention": attention,
    "packed products": packed_products,
    "chunked KL, gradients": chunked_kl,
    "log-probabilities": logps,
}
CHECKS: dict[str, Check] = {
    **in_both_types(BY_TYPE),
    **{f"packing and values of {name}": partial(unpacked, name) for name in FORMATS},
    "GPTQ, integers that differ from the CPU's": gptq_integers,
    "repair, closed form": closed_form,
}
