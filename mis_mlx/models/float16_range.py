"""Whether float16 holds a model's activations: looked at once, before anything is ranked, repaired or rounded.

Qwen2 and Gemma pass float16's 65,504 in a few channels of a few tokens (the first one, line ends, full stops); after
that all is NaN.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.models import stream
from mis_mlx.models.config import shape_of
from mis_mlx.types import Checkpoint

FREQUENT, SPREAD = 192, 64  # token ids looked at: the lowest, which are bytes and frequent words; and some of all
MOST = 65504 / 2  # of the residual stream on these: other texts reach more
_overflows: dict[tuple[Path, int], bool] = {}


def overflows(model: Checkpoint) -> bool:
    """Whether this model's activations come within a factor of two of float16's end; said once, in one line.

    One pass over the model with 256 tokens, once a process for each folder.
    """
    key = (model.path, model.nbytes)
    if key not in _overflows:
        reach = largest(model)
        _overflows[key] = reach > MOST
        if _overflows[key]:
            cli.say(f"{model.path}: activations reach {reach:,.0f}, float16 ends at 65,504: computing in bfloat16")
    return _overflows[key]


def largest(model: Checkpoint) -> float:
    """The largest absolute value of the residual stream in float16; infinity where it went beyond."""
    vocab = shape_of(model.config).vocab
    ids = np.unique([*range(min(FREQUENT, vocab)), *np.linspace(0, vocab - 1, SPREAD).astype(int)])
    source, reach = stream.Stream(model, mx.float16), 0.0
    with suppress(stream.NotNumbers):
        hidden = source.embed([mx.array(ids[None].astype(np.int32))])
        for _, block in source.blocks():
            most: Any = mx.abs(source.through(block, hidden)[0]).max()
            reach = max(reach, most.item())
        source.finite(source.norm(hidden)[0])
        return reach
    return math.inf
