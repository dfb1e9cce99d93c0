"""Models with two kinds of blocks, and LFM2's short convolution in place of attention."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import block_state, gated_delta, lookup

NewBlock = Callable[[Any, int], nn.Module]  # (args, number of the block)


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


class _Inner(nn.Module):
    """A whole model but for its head: token ids -> the head's input."""

    def __init__(self, module: ModuleType, args: Any, new_block: NewBlock):
        super().__init__()
        hidden = args.hidden_size
        layers = range(args.num_hidden_layers)
        self.embed_tokens = lookup.Embedding(args.vocab_size, hidden)
        self.layers = [new_block(args, i) for i in layers]
        self.norm = nn.RMSNorm(hidden, eps=args.rms_norm_eps)
        self._module = module

    def __call__(self, tokens: mx.array) -> mx.array:
        """(B, T) -> (B, T, D)."""
        hidden = self.embed_tokens(tokens)
        mask = self._module.create_attention_mask(hidden, None)
        for layer in self.layers:
            hidden = layer(hidden, mask if block_state.attends(layer) else None)
        return self.norm(hidden)  # type: ignore[no-any-return]


class Model(nn.Module):
    """A whole model of random weights, used as mlx-lm's other models are.

    `model` gives the head's input and has tensors by our names. module: mlx-lm's of the attention
    blocks.
    """

    def __init__(self, module: ModuleType, args: Any, new_block: NewBlock):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = _Inner(module, args, new_block)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Token ids (B, T) -> logits (B, T, V)."""
        hidden = self.model(tokens)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)  # type: ignore[no-any-return]
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return self.model.layers  # type: ignore[no-any-return]
