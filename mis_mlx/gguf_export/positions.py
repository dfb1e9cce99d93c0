"""Rotary positions as llama.cpp knows them: their kind, settings, and factors of frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from mis_mlx.gguf_export import gemma
from mis_mlx.gguf_export.words import YARN
from mis_mlx.models.architectures import base, families
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.types import MisError

Config = Mapping[str, Any]  # of a model, as config.json has it


def rope(config: Config) -> tuple[str, Config]:
    """(kind of rotary positions, their settings).

    MisError for a model that llama.cpp would compute differently. The trap: llama.cpp reads what
    it does not know as plain positions, and the model loses its thread without an error.
    """
    full = family(config).normalised()
    scaling = full.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    full_attention = (full.get("rope_parameters") or {}).get("full_attention", {})
    if full_attention.get("rope_type") == "proportional":
        return "proportional", full_attention
    _check_scaling(kind, scaling, families.family(config))
    return kind, scaling


def _check_scaling(kind: str, scaling: Config, architecture: base.Architecture) -> None:
    """MisError where llama.cpp has no such stretching of positions, or ignores a setting of it."""
    known = {"type", "rope_type", "rope_theta", *YARN} - {"mscale_all_dim"}
    known |= architecture.gguf_yarn_keys(scaling)
    unsupported = kind not in architecture.gguf_ropes
    detail = ""
    if kind == "yarn":
        unknown = sorted(set(scaling) - known)
        if unknown:
            detail = f" with {unknown[0]}"
        elif not scaling.get("original_max_position_embeddings"):
            detail = " without original_max_position_embeddings"
    if unsupported or detail:
        raise MisError(
            f"rotary positions of type {kind}{detail} have no place in a {architecture.gguf} GGUF: "
            f"use --format hf"
        )


def frequency_factors(config: Config) -> np.ndarray:
    """(head_dim / 2,) float32: what llama.cpp divides each frequency by.

    Only for Llama 3's long contexts, LongRoPE's and Gemma 4's. Llama 3: 1 for waves that turn often
    within the original context, `factor` for those that turn rarely, a mixture between.
    """
    kind, scaling = rope(config)
    if kind == "proportional":
        return gemma.frequency_factors(scaling, config["global_head_dim"])
    if kind == "longrope":
        return np.array(scaling["long_factor"], np.float32)
    head_dim = shape_of(config).head_dim
    context = scaling["original_max_position_embeddings"]
    frequencies = family(config).normalised()["rope_theta"] ** (
        -np.arange(0, head_dim, 2) / head_dim
    )
    turns = context * frequencies / (2 * np.pi)  # within the original context
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 1: turns often
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def words(rope: str, scaling: Config, full: Config) -> dict[str, Any]:
    """How positions are stretched, by the `GGUFWriter`'s words; nothing where they are plain."""
    told: dict[str, Any] = {}
    if rope in ("linear", "yarn"):
        told["rope_scaling_type"] = gguf.RopeScalingType(rope)
        keys = {"factor"}
        if rope == "yarn":
            keys = YARN.keys() & scaling
        for key in sorted(keys):
            told[f"rope_scaling_{YARN[key]}"] = scaling[key]
    if rope == "longrope":
        original = full["original_max_position_embeddings"]
        longer = max(1, full["max_position_embeddings"] / original)
        told["rope_scaling_orig_ctx_len"] = original
        factor = math.sqrt(1 + math.log(longer, original))
        told["rope_scaling_attn_factors"] = factor
    return told
