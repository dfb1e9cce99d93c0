"""Modules that mlx-lm lacks, or that must be called in another way than mlx-lm calls them; and the
weight of one, packed or not.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.hardware.rates import on_gpu
from mis_mlx.maths import rounding


class InputRecorder(nn.Module):
    """A module in the place of `inner` that calls it, and remembers its inputs (B, T, in)."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner
        self._seen: list[mx.array] = []  # underscore: not a parameter

    def __getattr__(self, name: str) -> Any:
        if name in self or name in ("inner", "_seen"):
            return super().__getattr__(name)
        return getattr(self.inner, name)

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        return self.inner(x)

    @property
    def seen(self) -> list[mx.array]:
        """The inputs of all calls that were not taken yet."""
        return self._seen

    def take(self) -> mx.array:
        """The input of the first call that was not taken yet."""
        return self._seen.pop(0)


def uniform(block: nn.Module) -> nn.Module:
    """The same block, callable as those of other families: block(x, mask, cache=cache).

    Its class takes the factor of its queries as the second argument, and computes it where that is
    None.
    """

    class Block(type(block)):  # type: ignore[misc]
        def __call__(self, x: mx.array, *given: Any, cache: Any = None) -> mx.array:
            if len(given) < 2:
                given = (None, *given)
            return super().__call__(x, *given, cache=cache)

    # A module around the block would change the names of its parameters.
    block.__class__ = Block
    return block


def divided(norm: nn.Module, divisor: float) -> nn.Module:
    """The same last norm, its output divided by a divisor of logits: no head has to divide then."""
    if divisor == 1.0:
        return norm

    class Norm(type(norm)):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x) / divisor

    norm.__class__ = Norm
    return norm


def dense_weight(linear: nn.Module, rows: slice = slice(None)) -> mx.array:
    """The (out, in) float32 matrix of a linear layer or embedding, quantized or not. Lazy.

    rows: those of its rows that are wanted.
    """
    if not isinstance(linear, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return linear.weight[rows].astype(mx.float32)
    packed = linear.weight[rows]
    scales = linear.scales[rows]
    biases = linear.get("biases")
    if biases is not None:
        biases = biases[rows]
    parts = tuple(part for part in (packed, scales, biases) if part is not None)
    mode: Any = linear.mode
    return dequantized(parts, linear.group_size, linear.bits, mode)


def dequantized(packed: rounding.Packed, group: int, bits: int, mode: rounding.Mode) -> mx.array:
    """The matrix (out, in) float32 that a packed one stands for. Lazy, if small.

    A large one goes part by part: a CPU holds several copies of what it de-quantizes.
    """
    values = rounding.values
    if packed[0].size * 32 > rounding.OPENED * bits and not on_gpu():
        values = rounding.dequantized
    return values(packed, group, bits, mode)
