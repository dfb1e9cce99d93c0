"""mlx-lm's modules of a config, of random weights.

This is the only door to mlx_lm, which takes seconds to import.
"""

import importlib
import inspect
import resource
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models import altup, block_state, hybrid, modules
from mis_mlx.models.config import normalised
from mis_mlx.models.families import Config, Family, family


def mlx_lm(module: str) -> ModuleType:
    """`mlx_lm.<module>`, imported now.

    The import would lower the hard limit on open files, which cannot be raised again; that is
    prevented here.
    """
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"mlx_lm.{module}")
    finally:
        resource.setrlimit = setrlimit


def _block_module(row: Family) -> ModuleType:
    """The module of mlx-lm that has the family's blocks."""
    return mlx_lm(f"models.{row.block or row.mlx}")


def model_args(config: Config) -> Any:
    """mlx-lm's ModelArgs of a config, or what it has in their place for the text part."""
    row = family(config)
    if row.stateful:
        return hybrid.model_args(_block_module(row), config)
    module = mlx_lm(f"models.{row.mlx}")
    kind = module.TextConfig if row.written_as else module.ModelArgs
    return kind.from_dict(normalised(config))


def new_block(row: Family, args: Any, i: int) -> nn.Module:
    """Block `i` as mlx-lm makes it, of random weights; called with (x, mask, cache)."""
    module = _block_module(row)
    if row.versions:
        return altup.block(module, args, i)
    if row.stateful:
        return hybrid.block(module, args, i)
    usual = ("TransformerBlock", "DecoderLayer")
    classes = [kind for name, kind in vars(module).items() if name.endswith(usual)]
    kind = classes[0]
    if "layer_idx" in inspect.signature(kind).parameters:
        return kind(args, layer_idx=i)
    types: Any = getattr(args, "layer_types", None)
    slides = bool(types) and types[i] == "sliding_attention"
    options = {}
    if types and not row.sinks:
        options["use_sliding"] = slides
    new = kind(args, **options)
    if row.sinks:  # its blocks do not take their kind, and `window` asks them
        new.use_sliding = slides
    if row.kinds and not getattr(args, row.kinds)[i]:
        new.self_attn.rope = mlx_lm(f"models.{row.mlx}").NoPE()
    if row.scaled_queries:
        return modules.uniform(new)
    return new


def new_model(config: Config) -> nn.Module:
    """A whole model of random weights; its `model` gives the head's input."""
    row = family(config)
    args = model_args(config)
    if row.versions:
        return altup.Model(_block_module(row), args, config)
    if row.stateful:
        return hybrid.Model(_block_module(row), args, mlx_lm("models.cache"))
    model: nn.Module = mlx_lm(f"models.{row.mlx}").Model(args)
    if getattr(model, "lm_head", model) is None:  # nemotron-nas with a tied head
        del model.lm_head
    return model


def window(args: Any, block: nn.Module) -> int | None:
    """The number of tokens that this block looks back at; None: all."""
    if not block_state.attends(block):
        return None
    if getattr(block, "use_sliding", False) or getattr(block.self_attn, "is_sliding", False):
        return args.sliding_window
    return None


def mask(args: Any, block: nn.Module, hidden: mx.array) -> Any:
    """The mask that mlx-lm itself would give this block for `hidden` (B, T, D).

    None for a block without attention, which begins at a state of zeros.
    """
    if not block_state.attends(block):
        return None
    base = mlx_lm("models.base")
    return base.create_attention_mask(hidden, None, window_size=window(args, block))
