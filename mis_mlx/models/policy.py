"""The one switch between Metal and a CPU: the type that computes, and packed weights or not.

Metal is quick in float16 and has kernels for packed weights. A CPU emulates half precision and
reads packed weights about 30 times slower than dense float32, so there everything becomes float32.

Some models do not fit float16. M1 and M2 emulate bfloat16, so there float32 is both quicker and
exact; from M3 on, or where float32 does not fit the budget, bfloat16 computes.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute.precision import POLICY as POLICY
from mis_mlx.compute.precision import policy as name
from mis_mlx.hardware import rates
from mis_mlx.models.config import shape_of
from mis_mlx.models.families import family
from mis_mlx.types import Checkpoint

DTYPES: dict[str, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}
# Token ids that `largest_activation` looks at: the lowest, which are bytes and frequent words; and
# some of all.
FREQUENT = 192
SPREAD = 64
LARGEST_ALLOWED = 65504 / 2  # of the residual stream on these tokens: other texts reach more
_decided: dict[tuple[Path, int], mx.Dtype] = {}
_tight: set[tuple[Path, int]] = set()  # models that the budget does not hold in float32
_used: list[str] = []  # the type that --compute-dtype gives, if it is given


# keyword-only, so that a command's own fields come first where they are given in order
@dataclass(frozen=True, kw_only=True)
class Computing:
    """The flag of every command that computes with a model; its `run` gives it to `use`."""

    compute_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """data type for computation; default: float32 on a CPU, float16 on Metal. If activations
    overflow float16: float32 on M1 and M2 where it fits, otherwise bfloat16
    """


def use(compute_dtype: str | None) -> str | None:
    """Make all models compute in this type from now on; None: in the device's usual type.

    Returns the type that held before.
    """
    before = _used[0] if _used else None
    _used.clear()
    if compute_dtype:
        _used.append(compute_dtype)
    return before


def keeps_packed() -> bool:
    """Whether packed weights compute as they are; else they are de-quantized when they are read.

    The numbers are the same.
    """
    return name() == "metal"


def usual_dtype() -> mx.Dtype:
    """The type that models compute in here, unless one of them cannot."""
    if _used:
        return DTYPES[_used[0]]
    return mx.float16 if name() == "metal" else mx.float32


def compute_dtype(model: Checkpoint) -> mx.Dtype:
    """The type that this model computes in.

    It is the usual type, or the model's `fallback_dtype` where its activations come within a factor
    of two of float16's end. One short pass finds that out, once a process.

    Qwen2 and Gemma pass it in a few channels of a few tokens (the first, line ends, full stops);
    then all is NaN.
    """
    usual = usual_dtype()
    if _used or usual != mx.float16:
        return usual
    key = (model.path, model.nbytes)
    if key not in _decided:
        _decided[key] = _judged(model)
    return _decided[key]


def _judged(model: Checkpoint) -> mx.Dtype:
    """float16 or the refuge; a line says so where a pass through the model decides."""
    if not family(model.config).float16:
        return fallback_dtype(model)
    reach = largest_activation(model)
    if reach <= LARGEST_ALLOWED:
        return mx.float16
    dtype = fallback_dtype(model)
    name = str(dtype).removeprefix("mlx.core.")
    cli.say(
        f"{model.path}: activations reach {reach:,.0f}, but float16 ends at 65,504: computing "
        f"in {name}"
    )
    return dtype


def fallback_dtype(model: Checkpoint) -> mx.Dtype:
    """The type of a model whose activations float16 does not hold.

    It is float32 on a GPU that emulates bfloat16, unless the budget is too small for it
    (`settle_fallback`); else bfloat16.
    """
    tight = (model.path, model.nbytes) in _tight
    return mx.bfloat16 if tight or rates.computes_bfloat16() else mx.float32


def settle_fallback(model: Checkpoint, fits: Callable[[mx.Dtype], bool]) -> None:
    """Note, before anything computes, whether the budget holds this model in float32.

    fits(dtype): whether it does. It is called only where float32 may be the model's refuge.
    """
    if _used or usual_dtype() != mx.float16 or rates.computes_bfloat16():
        return
    key = (model.path, model.nbytes)
    if fits(mx.float32):
        _tight.discard(key)
    else:
        _tight.add(key)
    _decided.pop(key, None)


def largest_activation(model: Checkpoint) -> float:
    """The largest absolute value of the residual stream in float16; infinity beyond its range."""
    from mis_mlx.models import stream  # which asks this module how to compute

    vocab = shape_of(model.config).vocab
    lowest = range(min(FREQUENT, vocab))
    spread = np.linspace(0, vocab - 1, SPREAD).astype(int)
    ids = np.unique([*lowest, *spread]).astype(np.int32)
    source = stream.Stream(model, mx.float16)
    reach = 0.0
    with suppress(stream.NotNumbers):
        hidden = source.embed([mx.array(ids[None])])
        for _, block in source.blocks():
            most: Any = mx.abs(source.run_block(block, hidden)[0]).max()
            reach = max(reach, most.item())
        source.finite(source.norm(hidden)[0])
        return reach
    return math.inf
