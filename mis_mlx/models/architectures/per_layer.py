"""Gemma 4: blocks that get channels of their own for every token, and share keys.

The last blocks use the keys and values of an earlier block of their kind.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import lookup
from mis_mlx.models.architectures.described import SLIDING
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


class PerLayer(Gemma):
    """A Gemma with a table of per-layer inputs, and shared keys and values."""

    axes = ("layers", "ffn")

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

    def check_own(self) -> None:
        """Check the table's rows, and that the last blocks find keys of their kind."""
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

    def mlp_tensors(self, i: int, *, stacked: bool) -> Shapes:
        """With what brings the block's channels in."""
        hidden = self.config["hidden_size"]
        channels = self.side_width
        return super().mlp_tensors(i, stacked=stacked) | {
            "per_layer_input_gate.weight": (channels, hidden),
            "per_layer_projection.weight": (hidden, channels),
            "post_per_layer_input_norm.weight": (hidden,),
        }

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

    def gguf_words(self) -> dict[str, Any]:
        """Windows, shared keys, and the table."""
        config: Config = self.config
        return {
            "sliding_window": config["sliding_window"],
            "sliding_window_pattern": [kind == SLIDING for kind in config["layer_types"]],
            "shared_kv_layers": config[SHARING],
            "embedding_length_per_layer_input": config[WIDTH],
            "final_logit_softcapping": config[SOFTCAP],
        }
