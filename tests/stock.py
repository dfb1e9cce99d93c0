"""Models as stock mlx_lm opens them, called alike; their tensors by our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import tensor_shapes
from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.stored_form import inside_names
from mis_mlx.models.opening import load


def opened(folder: Path) -> nn.Module:
    """The model in a folder, called with token ids alone."""
    model: nn.Module = load.mlx_lm("utils").load(str(folder))[0]
    return model


def ours(named: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Arrays by the names that tensors of such a config have here, without those nobody uses."""
    architecture = family(config)
    unused = tensor_shapes.unused_tensors(config)
    found = {}
    for name, array in named.items():
        renamed = architecture.own_name(name)
        (inside,) = inside_names(renamed)
        if inside not in unused:
            found[inside] = array
    return found
