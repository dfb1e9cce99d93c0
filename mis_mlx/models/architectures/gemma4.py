"""Gemma 4 E2B and E4B: per-layer inputs, and heads of two sizes."""

from collections.abc import Mapping
from typing import Any

from mis_mlx.models.architectures.config_checks import (
    ATTENTION,
    SHARE,
    positive_number,
    rotary_kind,
    whole_number,
)
from mis_mlx.models.architectures.described import FULL, SLIDING
from mis_mlx.models.architectures.per_layer import ROWS, SHARING, SOFTCAP, WIDTH, PerLayer
from mis_mlx.models.architectures.shape import Config, Shapes
from mis_mlx.types import MisError

HEAD_DIM = "global_head_dim"  # of blocks that see all tokens
DOUBLE = "use_double_wide_mlp"  # whether blocks that share keys have twice the neurons


class Gemma4(PerLayer):
    """Blocks that see all tokens have wider heads, of which a part rotates."""

    name = "gemma4_text"
    mlx = "gemma4_text"
    gguf = "gemma4"
    numbers = (WIDTH, HEAD_DIM, "sliding_window", ROWS)
    stated = (SHARING, DOUBLE, SOFTCAP, "layer_types")
    own = (SHARING, DOUBLE, SOFTCAP)
    only = (
        ("attention_k_eq_v", False),
        ("enable_moe_block", False),
        ("tie_word_embeddings", True),
    )
    why = "its heads have two sizes, and norms follow attention and MLP"

    def rope_scaling(self, rope: Config) -> None:
        """mlx-lm reads `rope_parameters` itself."""

    def head_size(self, i: int) -> int:
        """By the kind of the block."""
        if self.config["layer_types"][i] == FULL:
            return int(self.config[HEAD_DIM])
        return super().head_size(i)

    def ffn_size(self, i: int) -> int:
        """Twice as many where the block uses another's keys."""
        size = super().ffn_size(i)
        doubled = self.config[DOUBLE] and self.key_owners()[i] is not None
        return 2 * size if doubled else size

    def mlp_tensors(self, i: int, *, stacked: bool) -> Shapes:
        """With a number that the output of the block is multiplied by."""
        return super().mlp_tensors(i, stacked=stacked) | {"layer_scalar": (1,)}

    def check_positions(self) -> None:
        """Blocks with a window have plain positions; others rotate a part of each head."""
        ropes = self.config.get("rope_parameters")
        if not isinstance(ropes, Mapping) or set(ropes) != ATTENTION:
            kinds = " and ".join(sorted(ATTENTION))
            raise MisError(
                f"rope_parameters must have {kinds}, as every {self.name} does: download the "
                f"model again"
            )
        for attention, expected in ((SLIDING, "default"), (FULL, "proportional")):
            rope = ropes[attention]
            key = f"rope_parameters.{attention}"
            kind = rotary_kind(rope)
            if kind != expected:
                raise MisError(f"{key} is {kind!r}, but for a {self.name} it must be {expected!r}")
            positive_number(rope.get("rope_theta"), f"{key}.rope_theta")
            share = rope.get(SHARE, 1.0)
            positive_number(share, f"{key}.{SHARE}")
            if share > 1 or (share < 1 and expected == "default"):
                raise MisError(f"{key}.{SHARE} is {share}, but must be 1")
            if rope.get("factor", 1.0) != 1.0:
                raise MisError(f"{key}.factor is {rope['factor']!r}, but only 1 is supported")

    def check_own(self) -> None:
        """Check the wider heads, too."""
        super().check_own()
        head_dim = whole_number(self.config, HEAD_DIM, 4096)
        if head_dim % 2:
            raise MisError(f"{HEAD_DIM} is {head_dim}, but rotary positions need an even one")

    def gguf_words(self) -> dict[str, Any]:
        """Heads of blocks that see all tokens, and of those with a window: their own keys."""
        wide = self.config[HEAD_DIM]
        narrow = self.config["head_dim"]
        return super().gguf_words() | {
            "feed_forward_length": [self.ffn_size(i) for i in range(self.layers)],
            "key_length": wide,
            "value_length": wide,
            "rope_dimension_count": wide,
            "key_length_swa": narrow,
            "value_length_swa": narrow,
            "rope_dimension_count_swa": narrow,
            "rope_freq_base_swa": self.config["rope_parameters"][SLIDING]["rope_theta"],
        }
