"""llama.cpp's graph of gemma4 in numpy's float64, from a GGUF alone.

Follows src/models/gemma4.cpp of llama.cpp (as in llama-cpp-python 0.3.36), with
GELU computed where llama.cpp looks it up, and numbers from its program where it reads no key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

Array = np.ndarray


def gelu(x: Array) -> Array:
    """The tanh form."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


class Graph:
    """What both architectures share. file: the GGUF."""

    def __init__(self, file: GGUFReader):
        self.arch = str(file.fields["general.architecture"].contents())
        self._fields = file.fields
        self.weights = dict[str, Array]()
        for tensor in file.tensors:
            shape = [*reversed(tensor.shape.tolist())]
            values = dequantize(tensor.data, tensor.tensor_type)
            self.weights[tensor.name] = values.reshape(shape).astype(np.float64)
        self.layers = self.key("block_count")
        self.eps = self.key("attention.layer_norm_rms_epsilon")
        self.slides = self.key("attention.sliding_window_pattern")
        self.heads = self.key("attention.head_count")
        self.kv_heads = self.key("attention.head_count_kv")
        self.cached = dict[int, tuple[Array, Array]]()

    def key(self, name: str) -> Any:
        """The value of one of the architecture's keys."""
        return self._fields[f"{self.arch}.{name}"].contents()

    def norm(self, x: Array, name: str = "") -> Array:
        """RMSNorm by a weight, or by none."""
        scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return scaled * self.weights[f"{name}.weight"] if name else scaled

    def linear(self, x: Array, name: str) -> Array:
        """(..., in) -> (..., out)."""
        return x @ self.weights[f"{name}.weight"].T

    def rotated(self, x: Array, i: int) -> Array:
        """RoPE of x (T, heads, d), halves of a head in pairs."""
        head_dim = x.shape[-1]
        half = head_dim // 2
        base = self.key("rope.freq_base_swa" if self.slides[i] else "rope.freq_base")
        frequencies = base ** (-np.arange(half) * 2.0 / head_dim)
        if not self.slides[i] and "rope_freqs.weight" in self.weights:
            frequencies = frequencies / self.weights["rope_freqs.weight"]
        angles = np.arange(len(x))[:, None, None] * frequencies
        first = x[..., :half]
        second = x[..., half:]
        turned = first * np.cos(angles) - second * np.sin(angles)
        other = first * np.sin(angles) + second * np.cos(angles)
        return np.concatenate([turned, other], -1)

    def attention(self, x: Array, i: int, own: int) -> Array:
        """build_attn with a cache that the blocks from `own` on read only. x: (T, D), normed."""
        name = f"blk.{i}."
        tokens = len(x)
        queries = self.linear(x, f"{name}attn_q").reshape(tokens, self.heads, -1)
        queries = self.rotated(self.norm(queries, f"{name}attn_q_norm"), i)
        if i < own:
            keys = self.linear(x, f"{name}attn_k").reshape(tokens, self.kv_heads, -1)
            keys = self.rotated(self.norm(keys, f"{name}attn_k_norm"), i)
            values = self.linear(x, f"{name}attn_v").reshape(tokens, self.kv_heads, -1)
            self.cached[i] = (keys, self.norm(values))
        source = i
        if i >= own:
            source = own - 1 - int(self.slides[i])
        group = self.heads // self.kv_heads
        keys, values = (np.repeat(part, group, axis=1) for part in self.cached[source])
        scores = np.einsum("qhd,khd->hqk", queries, keys)  # f_attention_scale is 1
        back = np.arange(tokens)[:, None] - np.arange(tokens)
        hidden = back < 0
        if self.slides[i]:
            hidden = hidden | (back >= self.key("attention.sliding_window"))
        scores = np.where(hidden, -np.inf, scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares = shares / shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, values).reshape(tokens, -1)
        return self.linear(mixed, f"{name}attn_output")

    def per_layer(self, ids: list[int], scaled: Array) -> Array:
        """project_per_layer_inputs: (T, L, P)."""
        width = self.key("embedding_length_per_layer_input")
        shape = (len(ids), self.layers, width)
        rows = self.weights["per_layer_token_embd.weight"][ids].reshape(shape) * np.sqrt(width)
        projected = self.linear(scaled, "per_layer_model_proj") / np.sqrt(scaled.shape[-1])
        projected = self.norm(projected.reshape(shape), "per_layer_proj_norm")
        return (projected + rows) / np.sqrt(2)

    def gated(self, x: Array, i: int, channels: Array) -> Array:
        """What a block makes of its per-layer inputs (T, P)."""
        name = f"blk.{i}."
        inner = gelu(self.linear(x, f"{name}inp_gate")) * channels
        return self.norm(self.linear(inner, f"{name}proj"), f"{name}post_norm")

    def head(self, x: Array, cap: float) -> Array:
        """Logits (T, V)."""
        logits = self.linear(self.norm(x, "output_norm"), "token_embd")
        return cap * np.tanh(logits / cap)

    def embedded(self, ids: list[int]) -> Array:
        """(T, D), scaled."""
        rows = self.weights["token_embd.weight"][ids]
        return rows * np.sqrt(rows.shape[-1])


def gemma4(file: GGUFReader, ids: list[int]) -> Array:
    """Logits (T, V)."""
    graph = Graph(file)
    own = graph.layers - graph.key("attention.shared_kv_layers")
    x = graph.embedded(ids)
    channels = graph.per_layer(ids, x)
    for i in range(graph.layers):
        name = f"blk.{i}."
        attended = graph.attention(graph.norm(x, f"{name}attn_norm"), i, own)
        x = x + graph.norm(attended, f"{name}post_attention_norm")
        inner = graph.norm(x, f"{name}ffn_norm")
        gate = gelu(graph.linear(inner, f"{name}ffn_gate"))
        assert gate.shape[-1] == graph.key("feed_forward_length")[i]
        made = graph.linear(gate * graph.linear(inner, f"{name}ffn_up"), f"{name}ffn_down")
        x = x + graph.norm(made, f"{name}post_ffw_norm")
        x = x + graph.gated(x, i, channels[:, i])
        x = x * graph.weights[f"{name}layer_output_scale.weight"]
    return graph.head(x, graph.key("final_logit_softcapping"))
