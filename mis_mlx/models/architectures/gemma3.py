"""Gemma 3: norms around attention and MLP, and a window in most blocks."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import stock
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.config_checks import whole_number
from mis_mlx.models.architectures.shape import Config

PERIOD = "sliding_window_pattern"
LOCAL = "rope_local_base_freq"


class Gemma(Architecture):
    """What all Gemmas share."""

    qkv_bias = False
    other_biases = False
    head_norms = "each"
    second_norms = (
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    steps = 2
    tied = True
    rope_theta = 1e6
    heads_fill_hidden = False
    float16 = False

    def local_theta(self) -> float:
        """The base of positions in blocks with a window."""
        ropes = self.config.get("rope_parameters") or {}
        local = ropes.get("sliding_attention", {})
        theta: float = local.get("rope_theta", 10_000.0)
        return theta

    def gguf_windows(self, slides: Sequence[bool]) -> bool:
        """The file says which blocks have one."""
        return True

    def embedding_scale(self, dtype: mx.Dtype) -> mx.array | None:
        """The square root of the hidden size."""
        return mx.array(self.config["hidden_size"] ** 0.5, dtype)


class Gemma3(Gemma):
    """mlx-lm tells blocks with a window by their place, counted from the first."""

    name = "gemma3_text"
    mlx = "gemma3_text"
    gguf = "gemma3"
    gain_offset = 1.0
    numbers = (LOCAL, "query_pre_attn_scalar")
    axes = ("layers", "ffn", "heads", "kv_heads")
    why = "its blocks have norms after attention and MLP, so channels cannot be ranked or rotated"

    def spelled_out(self) -> dict[str, Any]:
        """With the period, and the base of positions in blocks with a window."""
        full = super().spelled_out()
        full.setdefault(LOCAL, self.local_theta())
        full.setdefault(PERIOD, full.get("_sliding_window_pattern", 6))
        return full

    @property
    def period(self) -> int:
        """The config's."""
        return int(self.spelled_out()[PERIOD])

    def check_kinds(self, complete: Config) -> None:
        """Check the period, too."""
        super().check_kinds(complete)
        whole_number(complete, PERIOD, 1000)

    def prepare(self, model: nn.Module) -> None:
        """mlx-lm finds out in `sanitize` that there is no head."""
        if self.shape.tied:
            model.sanitize({})

    def new_norm(self) -> nn.Module:
        """One that multiplies by 1 + its weights."""
        kind = stock.mlx_lm(f"models.{self.mlx}").RMSNorm
        norm: nn.Module = kind(self.config["hidden_size"], eps=self.config["rms_norm_eps"])
        return norm

    def embedding_scale(self, dtype: mx.Dtype) -> mx.array | None:
        """The square root of the hidden size in bfloat16."""
        return mx.array(self.config["hidden_size"] ** 0.5, mx.bfloat16).astype(dtype)

    def query_gain(self) -> float:
        """What the queries' norm takes in for query_pre_attn_scalar in a GGUF.

        llama.cpp's gemma3 divides scores by head_dim, or by hidden / heads in the model of 62
        blocks, whatever the config says.
        """
        s = self.shape
        divisor: float = s.head_dim
        if s.layers == 62:
            divisor = s.hidden / s.heads
        return math.sqrt(divisor / self.config["query_pre_attn_scalar"])

    def gguf_words(self) -> dict[str, Any]:
        """The window, its period, and positions there."""
        full = self.normalised()
        return {
            "rope_freq_base_swa": full[LOCAL],
            "sliding_window_pattern": full[PERIOD],
            "sliding_window": self.model_args().sliding_window,
        }
