"""Granite: embedding, residuals, attention and logits are multiplied by numbers of the config."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import modules
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.config_checks import positive_number

SCALE = "embedding_multiplier"
DIVISOR = "logits_scaling"


class Granite(Architecture):
    """mlx-lm's blocks know of residuals and attention; embedding and head are told here."""

    name = "granite"
    mlx = "granite"
    gguf = "granite"
    head_dim_follows = True
    interleaved = True
    numbers = ("residual_multiplier", "attention_multiplier")

    def check_own(self) -> None:
        """Two numbers that may be absent."""
        for key in (SCALE, DIVISOR):
            if self.config.get(key):
                positive_number(self.config[key], key)

    def embedding_scale(self, dtype: mx.Dtype) -> mx.array | None:
        """The config's."""
        factor = self.config.get(SCALE)
        return mx.array(float(factor), dtype) if factor else None

    def new_norm(self) -> nn.Module:
        """Its output is divided as logits are, so no head has to divide."""
        return self._divided(super().new_norm())

    def finish(self, model: nn.Module) -> None:
        """The last norm divides, so mlx-lm's own division is by 1."""
        model.model.norm = self._divided(model.model.norm)
        model.logits_scaling = 1.0

    def _divided(self, norm: nn.Module) -> nn.Module:
        return modules.divided(norm, float(self.config.get(DIVISOR) or 1.0))

    def gguf_words(self) -> dict[str, Any]:
        """Its four numbers."""
        words = {
            "embedding_scale": SCALE,
            "logit_scale": DIVISOR,
            "residual_scale": "residual_multiplier",
            "attention_scale": "attention_multiplier",
        }
        return {word: self.config.get(key) or 1.0 for word, key in words.items()}
