"""Which model families there are: a row says what a block of one holds and how it may be cut.

A new family is a new row; nothing else asks for a model's type. Does not read configs (models/config) or weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json, as mlx-lm and transformers read it."""

    name: str  # the model_type
    mlx: str  # the module of mlx_lm.models
    gguf: str  # the architecture of llama.cpp
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    other_biases: bool = True  # o_proj by attention_bias, the MLP by mlp_bias: those of other families have none
    head_norms: bool = False  # RMSNorm of every query and key head
    rope_theta: float = 10_000.0  # where the config has none
    heads_fill_hidden: bool = True  # transformers demands that heads divide the hidden size
    head_dim_follows: bool = False  # head_dim is hidden / heads, whatever the config says: neither is cut alone


ROWS = (
    Family("llama", "llama", "llama"),
    Family("mistral", "llama", "llama"),
    Family("qwen2", "qwen2", "qwen2", True, other_biases=False, rope_theta=1_000_000.0, head_dim_follows=True),
    Family("qwen3", "qwen3", "qwen3", False, other_biases=False, head_norms=True, heads_fill_hidden=False),
)
FAMILIES = {row.name: row for row in ROWS}


def family(config: Mapping[str, Any]) -> Family:
    """The row of a config that was checked (`config.check_config`)."""
    return FAMILIES[config["model_type"]]
