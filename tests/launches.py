"""How many kernels a GPU launches for arrays that are still lazy."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

# What only looks at an array in another way, or has nothing to compute.
VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Copy",
        "CustomTransforms",
        "Depends",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
    }
)
FIT_LAUNCHES = 51  # of `rounding.fit_grids` on a GPU
PRIMITIVE = re.compile(r'label ="([^"]*)", shape=rectangle')


def counted(*trees: Any) -> Counter[str]:
    """{primitive: how often} of what evaluating the arrays of these trees will launch.

    A compiled chain of operations is one. Reading weights is in it, where they are lazy. A change
    of shape that must copy is not.
    """
    arrays = [array for _, array in tree_flatten(trees)]
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    found = Counter(PRIMITIVE.findall(graph.getvalue()))
    for name in VIEWS:
        del found[name]
    return found
