"""What files have in another form: names of wrapped models, joined matrices, kernels.

Inside, every family has the same names (`mlp.gate_proj`, `rms_norm_eps`). `own_config` and
`own_name` of an architecture turn a file's config and names into that form, `stored_config` and
`stored_name` back.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mis_mlx.models.architectures.base import Architecture
from mis_mlx.storage.safetensors import InParts, Tensor
from mis_mlx.types import MisError, TensorAt

KERNEL = ".conv.conv.weight"  # what the name of a short convolution's kernel ends with,
DELTA_KERNEL = ".linear_attn.conv1d.weight"  # and that of the one before a delta rule
# matrices that a checkpoint may store as rows of one: the parts, in their order
JOINED_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def is_kernel(name: str) -> bool:
    """Whether a tensor is the kernel of a convolution."""
    return name.endswith((KERNEL, DELTA_KERNEL))


def own_tensor(name: str, stored: str, tensor: TensorAt) -> TensorAt:
    """A stored tensor under its name here.

    A kernel, which is stored as (D, 1, width) or (D, width, 1), has the second shape here: both
    have the same bytes.
    """
    shape = tensor.shape
    if name.endswith(DELTA_KERNEL) and len(shape) == 3 and shape[1] < shape[2]:
        # transformers adds 1 to the weights of norms in such a file
        raise MisError(
            f"{tensor.file}: is a Qwen 3.5 as transformers has it, and only MLX's form is read: "
            f"run mlx_lm.convert on the model first"
        )
    if is_kernel(name) and len(shape) == 3 and 1 in shape[1:]:
        shape = (shape[0], max(shape[1:]), 1)
    return replace(tensor, shape=shape, stored=(stored, tensor))


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """transformers wants a kernel as (D, 1, width); mlx-lm reads that, too."""
    if not name.endswith(KERNEL):
        return shape
    channels, width, _ = shape
    return channels, 1, width


def stored_tensor(name: str, tensor: Tensor) -> Tensor:
    """The same tensor in the form of `stored_shape`."""
    if not name.endswith(KERNEL):
        return tensor
    if isinstance(tensor, mx.array):
        return tensor.swapaxes(1, 2)
    kind, shape = tensor.spec
    parts = (part.swapaxes(1, 2) for part in tensor.parts)
    return InParts((kind, stored_shape(name, shape)), parts)


def whole_config(part: Architecture) -> dict[str, Any]:
    """The config of a whole model of which this is the text part."""
    config = part.config
    text = {key: value for key, value in config.items() if not key.startswith("quantization")}
    whole: dict[str, Any] = {
        "model_type": part.whole,
        "architectures": [part.wrapper],
        "text_config": text,
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"):
        if key in config:
            whole[key] = config[key]
    return whole | renamed_packing(part)


def renamed_packing(part: Architecture) -> dict[str, Any]:
    """What a config says of its packed matrices, by the names of their modules on disk."""
    packing = dict[str, Any]()
    for key in ("quantization", "quantization_config"):
        settings = part.config.get(key)
        if isinstance(settings, Mapping):
            packing[key] = {part.stored_name(name): value for name, value in settings.items()}
    return packing


def inside_names(name: str) -> list[str]:
    """The names that a tensor or module of such a model has in the family that it contains.

    There is one name for each matrix that is joined in it.
    """
    name = re.sub(r"^(model\.)?language_model\.", r"\1", name)
    joined = re.search(r"\b(qkv|gate_up)_proj\b", name)
    if not joined:
        return [name]
    matrix = f"{joined[1]}_proj"
    return [name.replace(matrix, f"{part}_proj") for part in JOINED_PARTS[joined[1]]]
