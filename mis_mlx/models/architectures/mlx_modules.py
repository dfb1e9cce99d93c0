"""mlx-lm's modules of a config, of random weights."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config


def model_args(config: Config) -> Any:
    """mlx-lm's ModelArgs of a config, or what it has in their place for the text part."""
    return family(config).model_args()


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
