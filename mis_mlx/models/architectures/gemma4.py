"""Gemma 4 E2B and E4B: blocks that get channels of their own for every token, and share keys.

The last blocks use the keys and values of an earlier block of their kind. Heads have two sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import lookup
from mis_mlx.models.architectures.config_checks import (
    ATTENTION,
    SHARE,
    positive_number,
    rotary_kind,
    whole_number,
)
from mis_mlx.models.architectures.described import FULL, SLIDING
from mis_mlx.models.architectures.gemma3 import Gemma
from mis_mlx.models.architectures.shape import Config, Shape, Shapes
from mis_mlx.types import MisError

# what the names of the table of per-layer inputs begin with
PER_LAYER = "model.embed_tokens_per_layer."
WIDTH = "hidden_size_per_layer_input"
ROWS = "vocab_size_per_layer_input"
SHARING = "num_kv_shared_layers"  # how many of the last blocks
SOFTCAP = "final_logit_softcapping"
USE_HF = "use --format hf, or the folder in mlx-lm"
HEAD_DIM = "global_head_dim"  # of blocks that see all tokens
DOUBLE = "use_double_wide_mlp"  # whether blocks that share keys have twice the neurons


class Gemma4(Gemma):
    """Blocks that see all tokens have wider heads, of which a part rotates."""

    name = "gemma4_text"
    mlx = "gemma4_text"
    gguf = "gemma4"
    axes = ("layers", "ffn")
    numbers = (WIDTH, HEAD_DIM, "sliding_window", ROWS)
    stated = (SHARING, DOUBLE, SOFTCAP, "layer_types")
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
        """With what brings channels in, and a number that multiplies the block's output."""
        hidden = self.config["hidden_size"]
        channels = self.side_width
        return super().mlp_tensors(i, stacked=stacked) | {
            "per_layer_input_gate.weight": (channels, hidden),
            "per_layer_projection.weight": (hidden, channels),
            "post_per_layer_input_norm.weight": (hidden,),
            "layer_scalar": (1,),
        }

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
        """Check the table's rows, that the last blocks find keys of their kind, and wider heads."""
        config = self.config
        rows = config[ROWS]
        vocab = config["vocab_size"]
        if rows != vocab:
            why = f"the table of per-layer inputs has {rows:,} rows, but the embedding {vocab:,}"
            raise MisError(f"{why}: only tables with equally many rows are supported")
        layers = self.layers
        shared = config[SHARING]
        if type(shared) is not int or not 0 <= shared < layers:
            raise MisError(f"{SHARING} is {shared!r}, but should be 0 to {layers - 1}")
        own = layers - shared
        kinds = config["layer_types"]
        lost = set(kinds[own:]) - set(kinds[:own])
        if lost:
            raise MisError(
                f"blocks of {min(lost)} share keys and values, but none of the first {own} blocks "
                f"makes any: this config is not usable"
            )
        head_dim = whole_number(config, HEAD_DIM, 4096)
        if head_dim % 2:
            raise MisError(f"{HEAD_DIM} is {head_dim}, but rotary positions need an even one")

    def gguf_words(self) -> dict[str, Any]:
        """Heads of blocks that see all tokens, and of those with a window: their own keys."""
        wide = self.config[HEAD_DIM]
        narrow = self.config["head_dim"]
        config = self.config
        return {
            "sliding_window": config["sliding_window"],
            "sliding_window_pattern": [kind == SLIDING for kind in config["layer_types"]],
            "shared_kv_layers": config[SHARING],
            "embedding_length_per_layer_input": config[WIDTH],
            "final_logit_softcapping": config[SOFTCAP],
            "feed_forward_length": [self.ffn_size(i) for i in range(self.layers)],
            "key_length": wide,
            "value_length": wide,
            "rope_dimension_count": wide,
            "key_length_swa": narrow,
            "value_length_swa": narrow,
            "rope_dimension_count_swa": narrow,
            "rope_freq_base_swa": self.config["rope_parameters"][SLIDING]["rope_theta"],
        }

    @property
    def side_width(self) -> int:
        """The config's."""
        return int(self.config[WIDTH])

    @property
    def softcap(self) -> float:
        """The config's."""
        return float(self.config[SOFTCAP])

    def further_widths(self) -> dict[str, int]:
        """Of per-layer channels."""
        return {WIDTH: self.side_width}

    def key_owners(self) -> tuple[int | None, ...]:
        """The last block of the same kind that has keys and values of its own."""
        own = self.layers - self.config[SHARING]
        kinds = self.config["layer_types"]
        last = {kind: i for i, kind in enumerate(kinds[:own])}
        return (*[None] * own, *(last[kind] for kind in kinds[own:]))

    def unlike_blocks(self) -> list[int]:
        """The first block of each kind, with keys of its own and without."""
        first: dict[tuple[str, bool], int] = {}
        for i, owner in enumerate(self.key_owners()):
            first.setdefault((self.config["layer_types"][i], owner is None), i)
        return list(first.values())

    def fixed_blocks(self) -> set[int]:
        """The blocks whose keys and values later blocks use, and the last one then.

        transformers makes the last one see all tokens whatever its kind is.
        """
        owners = {owner for owner in self.key_owners() if owner is not None}
        if owners:
            owners.add(self.layers - 1)
        return owners

    def side_tensors(self) -> Shapes:
        """A table with channels for every token and block; as many come from the embedding."""
        width = self.side_width
        total = self.layers * width
        return {
            f"{PER_LAYER}weight": (self.config[ROWS], total),
            "model.per_layer_model_projection.weight": (total, self.config["hidden_size"]),
            "model.per_layer_projection_norm.weight": (width,),
        }

    def unused_shapes(self) -> Shapes:
        """Keys and values that published files have for blocks that use another's."""
        shape = self.shape
        unused: Shapes = {}
        for i, owner in enumerate(self.key_owners()):
            if owner is None:
                continue
            head_dim = self.head_size(i)
            rows = shape.kv_heads * head_dim
            stem = f"model.layers.{i}.self_attn"
            unused[f"{stem}.k_proj.weight"] = (rows, shape.hidden)
            unused[f"{stem}.v_proj.weight"] = (rows, shape.hidden)
            unused[f"{stem}.k_norm.weight"] = (head_dim,)
        return unused

    def gates(self) -> set[str]:
        """The matrices through which per-layer inputs come in."""
        paths = {"model.per_layer_model_projection"}
        for i in range(self.layers):
            for name in ("per_layer_input_gate", "per_layer_projection"):
                paths.add(f"model.layers.{i}.{name}")
        return paths

    def prepare(self, model: nn.Module) -> None:
        """The table has a gradient with the same bits at every run."""
        table = model.model.embed_tokens_per_layer
        model.model.embed_tokens_per_layer = lookup.Embedding(*table.weight.shape)

    def side_channels(self, model: nn.Module, tokens: mx.array, embedded: mx.array) -> mx.array:
        """As mlx-lm's own model computes them."""
        # It names these two with an underscore; tests/models/test_gemma4.py notices if they go.
        rows = model.model._get_per_layer_inputs(tokens)
        channels: mx.array = model.model._project_per_layer_inputs(embedded, rows)
        return channels

    def cut(self, edited: dict[str, Any], shape: Shape, kept: Sequence[int]) -> None:
        """Fewer blocks share keys, and the table has a row for every token that stays."""
        owners = self.key_owners()
        edited[SHARING] = sum(owners[i] is not None for i in kept)
        if shape.vocab != self.shape.vocab:
            edited[ROWS] = shape.vocab
        super().cut(edited, shape, kept)

    def check_gguf(self) -> None:
        """llama.cpp takes keys from the last two blocks that have some."""
        super().check_gguf()
        own = self.layers - self.config[SHARING]
        kinds = self.config["layer_types"]
        for i, owner in enumerate(self.key_owners()):
            theirs = own - 1 - (kinds[i] == SLIDING)
            if owner not in (None, theirs):
                raise MisError(
                    f"block {i} uses the keys of block {owner}, but in llama.cpp's {self.gguf} "
                    f"those of block {theirs}: {USE_HF}"
                )
