"""Open a model to compute with it: what it computes in is decided here, once.

Some models do not fit float16. Qwen2 and Gemma pass its end in a few channels of a few tokens (the
first, line ends, full stops); then all is NaN. One short pass finds that out.
`load.open_checkpoint` opens a model of which only headers and weights are read: it decides nothing.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.hardware import rates
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.types import UNDECIDED, Checkpoint, Precision

# Token ids that `largest_activation` looks at: the lowest, which are bytes and frequent words; and
# some of all.
FREQUENT = 192
SPREAD = 64
LARGEST_ALLOWED = 65504 / 2  # of the residual stream on these tokens: other texts reach more
Fits = Callable[[Checkpoint, mx.Dtype], bool]  # whether a budget holds a model in a type


def open_to_compute(folder: str | Path, wanted: Precision = UNDECIDED) -> Checkpoint:
    """`load.open_checkpoint`, and what the model computes in is decided.

    wanted: of the command, or of another model of the same command.
    """
    return with_precision(load.open_checkpoint(folder), wanted)


def with_precision(
    checkpoint: Checkpoint, wanted: Precision, fits: Fits | None = None
) -> Checkpoint:
    """The model, with what it computes in decided.

    That is the type asked for, else the policy's, but another where float16 does
    not hold the model's activations. fits: default: a budget holds it in any type.
    """
    dtype = precision.usual_dtype(wanted)
    if not wanted.asked and dtype == mx.float16:
        dtype = _without_overflow(checkpoint, fits)
    decided = Precision(asked=wanted.asked, dtype=precision.name_of(dtype))
    return replace(checkpoint, precision=decided)


def _without_overflow(checkpoint: Checkpoint, fits: Fits | None) -> mx.Dtype:
    """float16, or the fallback where a model's activations come within a factor of two of its end.

    A line says so where a pass through the model decides.
    """
    known_to_overflow = not family(checkpoint.config).float16
    reach = math.inf if known_to_overflow else largest_activation(checkpoint)
    if reach <= LARGEST_ALLOWED:
        return mx.float16
    # M1 and M2 emulate bfloat16, so there float32 is both quicker and exact. From M3 on, or where
    # float32 does not fit the budget, it is bfloat16.
    dtype = mx.bfloat16
    if not rates.computes_bfloat16() and (fits is None or fits(checkpoint, mx.float32)):
        dtype = mx.float32
    if not known_to_overflow:
        cli.say(
            f"{checkpoint.path}: activations reach {reach:,.0f}, but float16 ends at 65,504: "
            f"computing in {precision.name_of(dtype)}"
        )
    return dtype


def largest_activation(checkpoint: Checkpoint) -> float:
    """The largest absolute value of the residual stream in float16; infinity beyond its range."""
    vocab = shape_of(checkpoint.config).vocab
    lowest = range(min(FREQUENT, vocab))
    spread = np.linspace(0, vocab - 1, SPREAD).astype(int)
    ids = np.unique([*lowest, *spread]).astype(np.int32)
    source = stream.Stream(checkpoint, mx.float16)
    reach = 0.0
    with suppress(stream.NotNumbers):
        hidden = source.embed([mx.array(ids[None])])
        for turn in source.sweep(hidden):
            most: Any = mx.abs(turn.go()[0]).max()
            reach = max(reach, most.item())
        source.finite(source.norm(hidden)[0])
        return reach
    return math.inf
