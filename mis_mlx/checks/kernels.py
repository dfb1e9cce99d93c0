"""Compare this device's kernels with numpy in float64, at the sizes of the default run.

A GPU takes other kernels there than at small sizes: Metal changes its kernel for softmax and
logsumexp above 4,096 columns, sorts above 2,048 numbers in several blocks, and multiplies large
matrices otherwise than small ones. Of a large result numpy makes some rows. Every check returns
(error, the largest error that passes). A NaN never passes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import precision
from mis_mlx.hardware import macos
from mis_mlx.maths import gptq, losses, rounding
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
FORMATS = (
    *(Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    Format(4, 32, "mxfp4"),
    Format(4, 16, "nvfp4"),
)
VOCAB = 24_576  # half of the default teacher's tokens
ALL_TOKENS = 49_152
HIDDEN = 576
TOKENS = 512
QUERY_HEADS = 9
KEY_HEADS = 3
HEAD_SIZE = 64
SEEN = 32  # rows of a large result that numpy makes, too


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


def _sampled_tokens() -> np.ndarray:
    """SEEN token ids, spread evenly over the vocabulary."""
    return np.linspace(0, VOCAB - 1, SEEN).astype(int)


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


def unpacked() -> Found:
    """Check each format's integers and values bit by bit, and that each weight got a near value.

    MLX cuts off up to a step at one end of an affine group, and scales in float16 move 8 bits by a
    quarter of a step. The error is infinite where an integer is wrong or a value is not near."""
    matrix = random_normal(0, 32, 256)
    return max(_unpacked(kind, matrix) for kind in FORMATS), 1e-6


def _unpacked(kind: Format, matrix: mx.array) -> float:
    """The error of one format."""
    weight = to_float64(matrix)
    packed = rounding.nearest(matrix, kind.group, kind.bits, kind.mode)
    codes = _codes(packed[0], kind.bits)
    scale, *bias = (np.repeat(np.array(part), kind.group, axis=1) for part in packed[1:])
    integers = codes
    if kind.mode == "affine":
        step = to_float64(scale)
        expected = codes * step + to_float64(bias[0])
        tolerance = 1.25 * np.abs(step)
        integers = to_float64(rounding.unpacked(packed[0], kind.bits))
    else:
        width = _fp4_widths(scale, kind.mode)
        sign = np.where(codes & 8, -1, 1)
        expected = sign * FP4[codes & 7] * width
        tolerance = 2 * width
    near = np.abs(expected - weight) <= tolerance
    if not near.all() or not np.array_equal(integers, codes):
        return np.inf
    values = rounding.values(packed, kind.group, kind.bits, kind.mode)
    return relative_error(values, expected)


def softmax_of_a_vocabulary() -> Found:
    """Check softmax and logsumexp over 24,576 and 49,152 columns, in float32 as all losses use."""
    outputs = list[mx.array]()
    expected = list[np.ndarray]()
    for columns in (VOCAB, ALL_TOKENS):
        logits = 4 * random_normal(columns, SEEN, columns)
        probabilities, log = softmax(to_float64(logits))
        log_sums = to_float64(logits)[:, 0] - log[:, 0]
        outputs += [mx.softmax(logits, axis=-1), mx.logsumexp(logits, axis=-1)]
        expected += [probabilities, log_sums]
    # a sum of 49,152; MLX's CPU is off by 8e-5
    return relative_error(outputs, expected), 25 * ROUNDING[mx.float32]


def large_product(dtype: mx.Dtype) -> Found:
    """Check logits of 128 positions under a head (24,576, 576), in `dtype` and widened to float32.

    The error is a share of what each of the two may be off."""
    hidden = random_normal(0, 128, HIDDEN, dtype=dtype)
    head = random_normal(1, VOCAB, HIDDEN, dtype=dtype)
    expected = to_float64(hidden[:SEEN]) @ to_float64(head).T
    plain = (hidden @ head.T)[:SEEN]
    widened = losses.wide_product(hidden, head)[:SEEN]
    plain_share = relative_error(plain, expected) / ROUNDING[dtype]
    widened_share = relative_error(widened, expected) / ROUNDING[mx.float32]
    return max(plain_share, widened_share), 1.0


@check_within(1)
def head_gradient(dtype: mx.Dtype) -> Compared:
    """Check the gradient of a head, added by `addmm`.

    A transposed (128, 24,576) times (128, 576) is added to (24,576, 576)."""
    gradient = random_normal(0, 128, VOCAB, dtype=dtype)
    hidden = random_normal(1, 128, HIDDEN, dtype=dtype)
    before = random_normal(2, VOCAB, HIDDEN, dtype=dtype)
    rows = _sampled_tokens()
    expected = to_float64(before)[rows] + to_float64(gradient)[:, rows].T @ to_float64(hidden)
    total = mx.addmm(before, gradient.T, hidden)
    return total[mx.array(rows)], expected


def _exact_attention(queries: mx.array, keys: mx.array, values: mx.array) -> np.ndarray:
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


@check_within(1)
def long_attention(dtype: mx.Dtype) -> Compared:
    """Check causal attention of 9 query heads over 3 key heads at 512 tokens.

    MLX has a kernel for many queries, one for a single one, as in decoding, and another one where
    it takes gradients."""
    query_shape = (1, QUERY_HEADS, TOKENS, HEAD_SIZE)
    key_shape = (1, KEY_HEADS, TOKENS, HEAD_SIZE)
    queries = random_normal(0, *query_shape, dtype=dtype)
    keys = random_normal(1, *key_shape, dtype=dtype)
    values = random_normal(2, *key_shape, dtype=dtype)
    expected = _exact_attention(queries, keys, values)
    attend = partial(mx.fast.scaled_dot_product_attention, scale=1 / 8)
    causal = partial(attend, mask="causal")
    (trained,), _ = mx.vjp(causal, [queries, keys, values], [mx.ones_like(queries)])
    fused = causal(queries, keys, values)
    single = attend(queries[:, :, -1:], keys, values)
    return [fused, trained, single], [expected, expected, expected[:, :, -1:]]


@check_within(5)  # one rounding more for logits, their softmax, its product
def chunked_losses(dtype: mx.Dtype) -> Compared:
    """Check log-probabilities of 48 tokens, 20 at a time, and gradients in states and head.

    The head's gradient is compared at some tokens."""
    states = random_normal(0, 48, HIDDEN, dtype=dtype)
    head = (random_normal(1, VOCAB, HIDDEN) / 24).astype(dtype)
    tokens = np.arange(48) * 97 % VOCAB

    def loss(states: mx.array, head: mx.array) -> mx.array:
        return -losses.token_logps(states, head, mx.array(tokens), rows=20).sum()

    value, (states_grad, head_grad) = mx.value_and_grad(loss, [0, 1])(states, head)
    rows = _sampled_tokens()
    gradient, log_q = softmax(to_float64(states) @ to_float64(head).T)
    right = np.arange(48), tokens
    gradient[right] -= 1.0  # in the logits
    return [value, states_grad, head_grad[mx.array(rows)]], [
        -np.sum(log_q[right]),
        gradient @ to_float64(head),
        gradient[:, rows].T @ to_float64(states),
    ]


def sorting() -> Found:
    """Check sorting of 49,152 numbers a row: values, their order, and the 1,024 largest.

    The error is the share of numbers that are wrong; none may be."""
    x = random_normal(0, 4, ALL_TOKENS)
    exact = np.sort(np.array(x), axis=1)
    order = mx.argsort(x, axis=-1)
    ordered = mx.take_along_axis(x, order, axis=-1)
    largest = mx.sort(mx.topk(x, 1024, axis=-1), axis=-1)
    wrong = [
        np.array(mx.sort(x, axis=-1)) != exact,
        np.array(ordered) != exact,
        np.array(largest) != exact[:, -1024:],
    ]
    return float(max(differs.mean() for differs in wrong)), 0.0


@check_within(2)  # sums of 576
def packed_products(dtype: mx.Dtype) -> Compared:
    """Check products with a matrix (4,608, 576) in each format, of 40 rows and of one."""
    x = random_normal(0, 40, HIDDEN, dtype=dtype)
    outputs = list[mx.array]()
    expected = list[np.ndarray]()
    for kind in FORMATS:
        layer = nn.Linear(HIDDEN, 8 * HIDDEN, bias=False)
        layer.weight = random_normal(1, 8 * HIDDEN, HIDDEN, dtype=dtype)
        layer = layer.to_quantized(kind.group, kind.bits, kind.mode)
        exact = to_float64(x[:SEEN]) @ to_float64(modules.dense_weight(layer)).T
        outputs += [layer(x)[:SEEN], layer(x[:1])]
        expected += [exact, exact[:1]]
    return outputs, expected


@check_within(1)
def wide_norm(dtype: mx.Dtype) -> Compared:
    """Check RMSNorm over 576 and 8,192 columns."""
    outputs = list[mx.array]()
    expected = list[np.ndarray]()
    for columns in (HIDDEN, 8192):
        x = 3 * random_normal(columns, SEEN, columns, dtype=dtype)
        weight = random_normal(1, columns, dtype=dtype)
        outputs.append(mx.fast.rms_norm(x, weight, 1e-5))
        exact = to_float64(x)
        mean_square = np.square(exact).mean(axis=-1, keepdims=True)
        expected.append(exact / np.sqrt(mean_square + 1e-5) * to_float64(weight))
    return outputs, expected


def gptq_integers() -> Found:
    """Check the share of GPTQ's integers that the CPU computes differently.

    A scale's last bit may change one integer, and through it its neighbours."""
    weight = random_normal(0, 64, 256)
    inputs = to_float64(random_normal(1, 512, 256) @ random_normal(2, 256, 256))
    gram = inputs.T @ inputs

    def codes(*, fused: bool) -> np.ndarray:
        factor = gptq.factorize(gram.copy())
        packed = gptq.rounded([weight], factor, 64, 4, fused=fused)[0]
        return to_float64(rounding.unpacked(packed[0], 4))

    here = codes(fused=precision.compiles())
    with on_cpu():
        differs = here != codes(fused=False)
    return float(differs.mean()), 0.002


BY_TYPE: dict[str, TypedCheck] = {
    "RoPE": rope,
    "logits, 128 x 24,576": large_product,
    "gradient of a head, 24,576 x 576": head_gradient,
    "attention, 512 tokens": long_attention,
    "log-probabilities of 24,576 tokens, gradients": chunked_losses,
    "packed products, 4,608 x 576": packed_products,
    "RMSNorm of 576 and 8,192": wide_norm,
}
CHECKS: dict[str, Check] = {
    **{f"{name}, float32": partial(check, mx.float32) for name, check in BY_TYPE.items()},
    **{f"{name}, float16": partial(check, mx.float16) for name, check in BY_TYPE.items()},
    "packing and values of all formats": unpacked,
    "softmax of 24,576 and 49,152": softmax_of_a_vocabulary,
    "sorting 49,152, errors": sorting,
    "GPTQ, integers that differ from the CPU's": gptq_integers,
}
