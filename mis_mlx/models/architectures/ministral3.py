"""Ministral 3: queries grow with the logarithm of the position."""

from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import modules
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.shape import Config


class Ministral3(Architecture):
    """A mistral whose blocks take the scale of queries as an argument in mlx-lm."""

    name = "ministral3"
    mlx = "ministral3"
    gguf = "mistral3"
    gguf_ropes = ("yarn",)
    qkv_bias = False
    other_biases = False
    rope_theta = 1e6
    heads_fill_hidden = False
    interleaved = True
    measurable = False

    def new_block(self, args: Any, i: int) -> nn.Module:
        """mlx-lm's, called as those of other families."""
        return modules.uniform(super().new_block(args, i))

    def finish(self, model: nn.Module) -> None:
        """The same of all blocks of a whole model."""
        model.model.layers = [modules.uniform(block) for block in model.model.layers]

    def gguf_words(self) -> dict[str, Any]:
        """How much queries grow."""
        scaling = self.normalised()["rope_scaling"]
        return {**super().gguf_words(), "attn_temperature_scale": scaling["llama_4_scaling_beta"]}

    def gguf_yarn_keys(self, scaling: Config) -> set[str]:
        """llama.cpp takes mscale for 1."""
        keys = {"mscale_all_dim", "llama_4_scaling_beta"}
        return keys | {"mscale"} if scaling.get("mscale", 1) == 1 else keys
