"""The door to mlx_lm, which takes seconds to import, and what its blocks are asked."""

import importlib
import inspect
import resource
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.compute import quick_exp
from mis_mlx.models.architectures import block_state
from mis_mlx.models.architectures.described import SLIDING

# Functions of mlx-lm that its blocks import, and what chooses a quicker one on a CPU.
QUICKER = {
    ("models.activations", "swiglu"): quick_exp.swiglu_or,
    ("models.base", "scaled_dot_product_attention"): quick_exp.attention_or,
}


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
    return found


def new_block(module: ModuleType, args: Any, i: int) -> nn.Module:
    """Block `i` as mlx-lm makes it, of random weights. module: the one that has its class."""
    usual = ("TransformerBlock", "DecoderLayer")
    classes = [kind for name, kind in vars(module).items() if name.endswith(usual)]
    kind = classes[0]
    parameters = inspect.signature(kind).parameters
    if "layer_idx" in parameters:
        return kind(args, layer_idx=i)  # type: ignore[no-any-return]
    types: Any = getattr(args, "layer_types", None)
    if types and "use_sliding" in parameters:
        return kind(args, use_sliding=types[i] == SLIDING)  # type: ignore[no-any-return]
    return kind(args)  # type: ignore[no-any-return]


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
