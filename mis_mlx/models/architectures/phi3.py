"""Phi 3: joined matrices, and positions that rotate a part of each head or are LongRoPE's."""

from collections.abc import Mapping
from typing import Any

from mis_mlx.models.architectures import config_checks
from mis_mlx.models.architectures.base import Architecture, linear
from mis_mlx.models.architectures.config_checks import SHARE, rotary_kind, rotary_settings
from mis_mlx.models.architectures.shape import Shapes

CONTEXT = "original_max_position_embeddings"


class Phi3(Architecture):
    """q, k and v are rows of one matrix, gate and up of another."""

    name = "phi3"
    mlx = "phi3"
    gguf = "phi3"
    gguf_ropes = ("default", "linear", "yarn", "longrope")
    qkv_bias = False
    other_biases = False
    head_dim_follows = True
    rope_kinds = ("default", "longrope")
    axes = ("layers", "ffn")
    why = "its heads are rows of one matrix, which cannot be cut"

    def normalised(self) -> dict[str, Any]:
        """With the share of each head that rotates, and LongRoPE's settings, for mlx-lm."""
        full = super().normalised()
        rope = full.get("rope_parameters") or {}
        full[SHARE] = full.get(SHARE) or rope.get(SHARE) or 1.0
        full[CONTEXT] = full.get(CONTEXT) or 4096
        scaling: Any = full.get("rope_scaling")
        if rotary_kind(scaling) == "longrope":
            full["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
        else:
            full["rope_scaling"] = None
        return full

    def check_positions(self) -> None:
        """Parts of heads, and one factor of LongRoPE's for each pair of channels."""
        config = self.config
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        rotated = config_checks.rotated_channels(config, self.name, head_dim)
        config_checks.check_ropes(config, self.rope_kinds)
        for key, rope in rotary_settings(config):
            if rotary_kind(rope) == "longrope":
                config_checks.check_long_rope(config, key, rope, pairs=rotated // 2)

    def projections(self, i: int, *, has_keys: bool) -> dict[str, int]:
        """One matrix."""
        return {"qkv_proj": sum(super().projections(i, has_keys=has_keys).values())}

    def mlp_tensors(self, i: int, *, stacked: bool) -> Shapes:
        """Gate and up in one matrix."""
        hidden = self.config["hidden_size"]
        ffn = self.ffn_size(i)
        tensors = linear("mlp.gate_up_proj", 2 * ffn, hidden, bias=False)
        return tensors | linear("mlp.down_proj", hidden, ffn, bias=False)


def has_own_positions(config: Mapping[str, Any]) -> bool:
    """Whether positions rotate a part of each head, or are LongRoPE's: no llama has them."""
    for _, place in [("", config), *rotary_settings(config)]:
        if rotary_kind(place) in ("longrope", "su"):
            return True
        if isinstance(place, Mapping) and place.get(SHARE) not in (None, 1):
            return True
    return False
