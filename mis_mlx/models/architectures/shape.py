"""The sizes of a model, what config.json calls them, and the names of its axes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]  # a config.json
Shapes = dict[str, tuple[int, ...]]  # {tensor: (out, in)}, in forward order
ALL = ("layers", "ffn", "experts", "heads", "kv_heads", "hidden")
DENSE = tuple(axis for axis in ALL if axis != "experts")
GATED = ("gate_proj", "up_proj", "down_proj")
KEYS = {  # of a `Shape`, as config.json calls them
    "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocab": "vocab_size", "tied": "tie_word_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes that define a uniform model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0  # of a block; `ffn` is the width of one

    def __str__(self) -> str:
        ffn = f"FFN {self.ffn}"
        if self.experts:
            ffn = f"{self.experts} experts of {ffn}"
        heads = f"{self.heads} heads, {self.kv_heads} kv heads"
        return f"{self.layers} layers, hidden {self.hidden}, {ffn}, {heads}, {self.vocab:,} tokens"


def weight_count(tensors: Shapes) -> int:
    """The number of weights in tensors of these shapes."""
    return sum(map(math.prod, tensors.values()))
