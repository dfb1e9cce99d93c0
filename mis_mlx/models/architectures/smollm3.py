"""SmolLM3: every fourth block has no rotary positions."""

from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import config_checks, stock
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.shape import Config
from mis_mlx.types import MisError

KEY = "no_rope_layers"  # of config.json: 0 for each block without positions, else 1


class SmolLM3(Architecture):
    """A llama but for its positions; llama.cpp counts blocks without them by place."""

    name = "smollm3"
    mlx = "smollm3"
    block_module = "llama"
    gguf = "smollm3"
    tied = True
    interleaved = True
    block_lists = ("layer_types", KEY)

    def spelled_out(self) -> dict[str, Any]:
        """With the blocks that have positions."""
        full = super().spelled_out()
        if full.get(KEY) is None:
            interval = full.get("no_rope_layer_interval") or 4
            full[KEY] = [int((i + 1) % interval != 0) for i in range(self.layers)]
        return full

    def check_kinds(self, complete: Config) -> None:
        """Check the list, too."""
        config_checks.check_list(self.config, KEY, {"0", "1"})
        super().check_kinds(complete)

    def new_block(self, args: Any, i: int) -> nn.Module:
        """A llama's, with or without positions."""
        block = super().new_block(args, i)
        if not getattr(args, KEY)[i]:
            block.self_attn.rope = stock.mlx_lm(f"models.{self.mlx}").NoPE()
        return block

    def check_gguf(self) -> None:
        """llama.cpp has the blocks without positions in its program, and no biases."""
        full = self.normalised()
        rotated = [int(i % 4 != 3) for i in range(self.layers)]
        if full[KEY] != rotated or full.get("attention_bias") or full.get("mlp_bias"):
            why = (
                f"llama.cpp's {self.gguf} has no biases, and rotary positions in all blocks but "
                f"every fourth"
            )
            raise MisError(
                f"{why}, unlike this model: use --format hf, which transformers and mlx-lm open"
            )
        super().check_gguf()
