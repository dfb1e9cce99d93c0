"""LFM2's short convolution in place of attention."""

from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import block_state, gated_delta


class Kernel(nn.Module):
    """The weights of a causal convolution, one kernel for each channel: (D, width, 1)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        scale = width**-0.5
        self.weight = mx.random.uniform(-scale, scale, (channels, width, 1))


class ShortConv(nn.Module):
    """A causal convolution over a few tokens, between two gates.

    It is written as a sum of shifted products: MLX's own convolution takes three times as long on a
    CPU, forwards and back.
    """

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.in_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.conv = Kernel(hidden, width)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)

    @property
    def reach(self) -> int:
        """The number of earlier tokens that a token sees."""
        return self.conv.weight.shape[1] - 1  # type: ignore[no-any-return]

    def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
        """(B, T, D) -> (B, T, D). cache: None, mlx-lm's ArraysCache, or `block_state.Inputs`."""
        joined = self.in_proj(x)
        gate, gate_out, inner = mx.split(joined, 3, axis=-1)
        gated = gate * inner
        if isinstance(cache, block_state.Inputs):
            rows = cache.extended(gated, self.reach)
        else:
            rows = gated_delta.behind_earlier(gated, cache, self.reach)
            if cache is not None:
                gated_delta.remember(cache, rows, self.reach)
        mixed = gated_delta.convolved(rows, self.conv.weight[..., 0], x.shape[1])
        return self.out_proj(gate_out * mixed)  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    """A block with a short convolution in place of attention, called as the others are."""

    def __init__(self, module: ModuleType, args: Any):
        super().__init__()
        hidden = args.hidden_size
        eps = args.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.conv = ShortConv(hidden, args.conv_L_cache)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = module.MLP(hidden, args.intermediate_size)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """(B, T, D) -> (B, T, D). mask: None. cache: as of `ShortConv`."""
        normed = self.input_layernorm(x)
        mixed = self.conv(normed, cache)
        h = x + mixed
        normed = self.post_attention_layernorm(h)
        return h + self.mlp(normed)  # type: ignore[no-any-return]
