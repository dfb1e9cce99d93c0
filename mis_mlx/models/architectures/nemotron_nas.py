"""Nemotron-NAS: a llama whose blocks differ in FFN width."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import block_widths
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.shape import Shape


class NemotronNas(Architecture):
    """Its config has a list `block_configs`; models/architectures/block_widths reads it."""

    name = "nemotron-nas"
    mlx = "nemotron-nas"
    gguf = "deci"
    rope_theta = 500_000.0
    head_dim_follows = True
    interleaved = True
    own = (block_widths.KEY,)
    block_lists = ("layer_types", block_widths.KEY)
    axes = ("layers",)
    why = "its blocks have widths of their own"
    transformers = False

    def own_config(self) -> dict[str, Any]:
        """With `intermediate_size`, of the widest block, and `num_key_value_heads`."""
        config = dict(self.config)
        group = block_widths.checked_group(config, config.get(block_widths.KEY))
        config["intermediate_size"] = max(block_widths.widths(config))
        config["num_key_value_heads"] = config["num_attention_heads"] // group
        return config

    def ffn_size(self, i: int, ffn: int | None = None) -> int:
        """Block i's own."""
        return block_widths.widths(self.config)[i] if ffn is None else ffn

    def _widths(self) -> list[int]:
        return list(block_widths.widths(self.config))

    def unlike_blocks(self) -> list[int]:
        """The first block of every width."""
        sizes = self._widths()
        return [sizes.index(size) for size in sorted(set(sizes))]

    def block_counts(self) -> dict[int, int]:
        """By width."""
        sizes = self._widths()
        return {sizes.index(size): sizes.count(size) for size in set(sizes)}

    def new_model(self) -> nn.Module:
        """mlx-lm's; one with a tied head has an empty place for it."""
        model = super().new_model()
        if model.lm_head is None:
            del model.lm_head
        return model

    def cut(self, edited: dict[str, Any], shape: Shape, kept: Sequence[int]) -> None:
        """The FFN size is that of the widest block that stays."""
        super().cut(edited, shape, kept)
        edited[self.ffn_key] = max(block_widths.widths(edited))

    def gguf_words(self) -> dict[str, Any]:
        """A number for each block, of heads too."""
        shape = self.shape
        return {
            "feed_forward_length": self._widths(),
            "head_count": [shape.heads] * shape.layers,
            "head_count_kv": [shape.kv_heads] * shape.layers,
        }
