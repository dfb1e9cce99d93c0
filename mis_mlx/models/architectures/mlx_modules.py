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
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import quick_exp
from mis_mlx.models.architectures import altup, arch, block_state, hybrid, modules
from mis_mlx.models.architectures.families import Config, Family, family
from mis_mlx.models.architectures.sizes import normalised

# Functions of mlx-lm that its blocks import, and what chooses a quicker one on a CPU.
QUICKER = {
    ("models.activations", "swiglu"): quick_exp.swiglu_or,
    ("models.base", "scaled_dot_product_attention"): quick_exp.attention_or,
}
SLIDING = "sliding_attention"  # the kind, in layer_types, of a block that sees a window


def mlx_lm(module: str) -> ModuleType:
    """`mlx_lm.<module>`, imported now; blocks imported from here on have quicker functions.

    The import would lower the hard limit on open files, which cannot be raised again; that is
    prevented here.
    """
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None  # type: ignore[assignment]
    try:
        for (owner, name), chosen in QUICKER.items():
            functions = importlib.import_module(f"mlx_lm.{owner}")
            stock = getattr(functions, name)
            if stock.__module__ != quick_exp.__name__:
                setattr(functions, name, chosen(stock))
        found = importlib.import_module(f"mlx_lm.{module}")
    finally:
        resource.setrlimit = setrlimit
    if hasattr(found, "_ACT2FN"):  # of nemotron-nas, whose blocks do not take `swiglu`
        found._ACT2FN["silu"] = quick_exp.silu_or(nn.silu)
    return found


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
    options = {}
    if types and not row.sinks:
        options["use_sliding"] = types[i] == SLIDING
    new = kind(args, **options)
    if row.sinks:
        _say_kind(new, args, i)
    if row.kinds and not getattr(args, row.kinds)[i]:
        new.self_attn.rope = mlx_lm(f"models.{row.mlx}").NoPE()
    if row.scaled_queries:
        return modules.uniform(new)
    return new


def _say_kind(block: nn.Module, args: Any, i: int) -> None:
    """Give a block i of gpt_oss, which mlx-lm does not tell its kind, what `window` asks for."""
    block.use_sliding = args.layer_types[i] == SLIDING


def new_model(config: Config) -> nn.Module:
    """A whole model of random weights; its `model` gives the head's input."""
    row = family(config)
    args = model_args(config)
    if row.versions:
        return altup.Model(_block_module(row), args, config)
    if row.stateful:
        return hybrid.Model(_block_module(row), args, mlx_lm("models.cache"))
    model: nn.Module = mlx_lm(f"models.{row.mlx}").Model(args)
    if row.sinks:
        for i, block in enumerate(model.model.layers):
            _say_kind(block, args, i)
    if getattr(model, "lm_head", model) is None:  # nemotron-nas with a tied head
        del model.lm_head
    return model


def set_dtype(model: nn.Module, config: Config, dtype: mx.Dtype) -> None:
    """Cast the floats of a whole model, but for those that are float32 in a model of any type.

    `nn.Module.set_dtype` would cast these, too.
    """
    cast = []
    parameters = dict[str, mx.array](tree_flatten(model.parameters()))
    for name, array in parameters.items():
        if mx.issubdtype(array.dtype, mx.floating):
            own_dtype = arch.type_of(config, name, dtype)
            cast.append((name, array.astype(own_dtype)))
    model.update(tree_unflatten(cast))


def window(args: Any, block: nn.Module) -> int | None:
    """The number of tokens that this block looks back at; None: all.

    block: of `new_block` or `new_model`. AttributeError where a model has windows and its block
    does not say whether it is one that slides.
    """
    width: int | None = getattr(args, "sliding_window", None)
    if width is None or not block_state.attends(block):
        return None
    attention = block.self_attn
    slides = attention.is_sliding if hasattr(attention, "is_sliding") else block.use_sliding
    return width if slides else None


def mask(args: Any, block: nn.Module, hidden: mx.array) -> Any:
    """The mask that mlx-lm itself would give this block for `hidden` (B, T, D).

    None for a block without attention, which begins at a state of zeros.
    """
    if not block_state.attends(block):
        return None
    base = mlx_lm("models.base")
    return base.create_attention_mask(hidden, None, window_size=window(args, block))
