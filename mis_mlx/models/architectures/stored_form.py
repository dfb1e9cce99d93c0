"""Families whose files name tensors and sizes in another way: LFM2, Qwen 3.5.

Inside, every family has the same names (`mlp.gate_proj`, `rms_norm_eps`). Here a config and its
tensors are turned into that form when a folder is opened, and back when one is written.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.models.architectures.config_checks import whole_number
from mis_mlx.models.architectures.families import WRAPPERS, Config, Family, family, known_family
from mis_mlx.storage.safetensors import InParts, Named, Spec, Specs, Tensor
from mis_mlx.types import MisError, TensorAt

KERNEL = ".conv.conv.weight"  # what the name of a short convolution's kernel ends with,
DELTA_KERNEL = ".linear_attn.conv1d.weight"  # and that of the one before a delta rule
MOST = 1_000_000
# matrices that a checkpoint may store as rows of one: the parts, in their order
JOINED_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# keys of an LFM2 that say what other keys say, too
DERIVED = (
    "block_auto_adjust_ff_dim",
    "block_dim",
    "block_ff_dim",
    "block_ffn_dim_multiplier",
    "block_multiple_of",
    "block_norm_eps",
    "conv_dim",
    "conv_dim_out",
    "full_attn_idxs",
    "norm_eps",
    "num_heads",
    "theta",
    "tie_embedding",
)


def own_name(row: Family, name: str) -> str:
    """The name here of a tensor or module that has this one on disk."""
    return _renamed(name, [(stored, own) for own, stored in row.renamed])


def stored_name(row: Family, name: str) -> str:
    """The name on disk of a tensor or module that has this one here."""
    return _renamed(name, row.renamed)


def _renamed(name: str, parts: Any) -> str:
    text = f"{name}."  # so that the name of a module ends as that of its tensors does
    for before, after in parts:
        text = text.replace(before, after)
    return text.removesuffix(".")


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


def own_config(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """A config as it is used here; of most families it is the stored one.

    MisError, with the file's name, where sizes are missing or contradict each other.
    """
    row = known_family(config)
    if row is None or not row.renamed:
        return config
    try:
        if row.period:
            return _own_delta(config, row)
        return config if "rms_norm_eps" in config else _own_lfm2(config, row)
    except MisError as error:
        raise MisError(f"{where}: {error}") from None


def _own_lfm2(config: Config, row: Family) -> dict[str, Any]:
    own = {key: value for key, value in config.items() if key not in DERIVED}
    hidden = config.get("hidden_size")
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        size = config.get(key)
        if size not in (None, hidden):
            raise MisError(
                f"{key} is {size!r}, but hidden_size {hidden!r}: only blocks of that width are "
                f"supported"
            )
    own["intermediate_size"] = _ffn_size(config)
    own["rms_norm_eps"] = config.get("norm_eps")
    # either name may say that the head has weights of its own, which is refused
    tied = [config.get(key) for key in ("tie_word_embeddings", "tie_embedding")]
    own["tie_word_embeddings"] = False not in tied
    own["layer_types"] = _kinds(config, row)
    packed = own.get("quantization")
    if isinstance(packed, dict):
        own["quantization"] = {own_name(row, key): value for key, value in packed.items()}
    return own


def _own_delta(config: Config, row: Family) -> dict[str, Any]:
    """The text part's config with mlx-lm's defaults, and the kind of each block."""
    own = dict(config)
    interval = whole_number(config, row.period, 1000, default=4)
    layers = whole_number(config, "num_hidden_layers", MOST)
    own[row.period] = interval
    if config.get("layer_types") is None:
        attending = [(i + 1) % interval == 0 for i in range(layers)]
        own["layer_types"] = ["full_attention" if yes else row.stateful for yes in attending]
    rope = config.get("rope_parameters") or {}
    if isinstance(rope, Mapping):
        usual = {
            "rope_type": "default",
            "rope_theta": config.get("rope_theta") or row.rope_theta,
            "partial_rotary_factor": config.get("partial_rotary_factor") or 0.25,
        }
        own["rope_parameters"] = {**usual, **rope}
    return own


def _ffn_size(config: Config) -> int:
    """The number of neurons, as mlx-lm and transformers count them.

    Published files give a larger size, of which two thirds are used, in whole multiples.
    """
    key = "intermediate_size"
    if config.get("block_ff_dim") is not None:
        key = "block_ff_dim"
    size = whole_number(config, key, MOST)
    if not config.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    factor = config.get("block_ffn_dim_multiplier")
    if factor is not None:
        size = int(factor * size)
    multiple = whole_number(config, "block_multiple_of", MOST, default=256)
    return multiple * -(-size // multiple)


def _kinds(config: Config, row: Family) -> Any:
    """The kind of each block, which older files tell by the numbers of those with attention."""
    numbers = config.get("full_attn_idxs")
    layers = whole_number(config, "num_hidden_layers", MOST)
    if not isinstance(numbers, list):
        return config.get("layer_types")
    kinds = ["full_attention" if i in numbers else row.stateful for i in range(layers)]
    stated = config.get("layer_types")
    if stated not in (None, kinds):
        raise MisError(
            f"full_attn_idxs is {numbers}, but layer_types has another order: use another model"
        )
    return kinds


def published(
    config: Mapping[str, Any], specs: Specs, tensors: Named
) -> tuple[dict[str, Any], Specs, Named]:
    """The config, shapes and tensors of a model in the form of its family's files.

    The arguments are those of `model_writer.write_folder`.
    """
    row = family(config)
    stored_specs = dict[str, Spec]()
    for name, (kind, shape) in specs.items():
        stored_specs[stored_name(row, name)] = (kind, _stored_shape(name, shape))
    return outer_config(config), stored_specs, _stored_tensors(row, tensors)


def _stored_tensors(row: Family, tensors: Named) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield stored_name(row, name), _stored_tensor(name, tensor)


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """transformers wants a kernel as (D, 1, width); mlx-lm reads that, too."""
    if not name.endswith(KERNEL):
        return shape
    channels, width, _ = shape
    return channels, 1, width


def _stored_tensor(name: str, tensor: Tensor) -> Tensor:
    if not name.endswith(KERNEL):
        return tensor
    if isinstance(tensor, mx.array):
        return tensor.swapaxes(1, 2)
    kind, shape = tensor.spec
    parts = (part.swapaxes(1, 2) for part in tensor.parts)
    return InParts((kind, _stored_shape(name, shape)), parts)


def outer_config(config: Config) -> dict[str, Any]:
    """A config as the family's files have it: what mlx-lm and transformers read.

    The number of neurons is said as it is: it is not adjusted when the file is read.
    """
    row = family(config)
    rename = partial(stored_name, row)
    if row.written_as:
        return whole_config(config, rename)
    outer = {key: value for key, value in config.items() if key not in ("rms_norm_eps", "head_dim")}
    outer |= _renamed_packing(config, rename)
    kinds = config["layer_types"]
    hidden = config["hidden_size"]
    theta = config.get("rope_theta") or row.rope_theta
    attending = [i for i, kind in enumerate(kinds) if kind != row.stateful]
    return {
        **outer,
        "norm_eps": config["rms_norm_eps"],
        "block_norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "block_dim": hidden,
        "block_ff_dim": config["intermediate_size"],
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 1,
        "conv_bias": False,
        "conv_dim": hidden,
        "conv_dim_out": hidden,
        "full_attn_idxs": attending,
        "num_heads": config["num_attention_heads"],
        "rope_theta": theta,
        "theta": theta,
        "tie_embedding": True,
    }


def whole_config(config: Config, rename: Callable[[str], str]) -> dict[str, Any]:
    """The config of a whole model whose text part has this one.

    rename: gives the name that a module of ours has in the whole model.
    """
    outer = family(config).written_as
    text = {key: value for key, value in config.items() if not key.startswith("quantization")}
    whole: dict[str, Any] = {
        "model_type": outer,
        "architectures": [WRAPPERS[outer]],
        "text_config": text,
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"):
        if key in config:
            whole[key] = config[key]
    return whole | _renamed_packing(config, rename)


def _renamed_packing(config: Config, rename: Callable[[str], str]) -> dict[str, Any]:
    """What a config says of its packed matrices, by the names of their modules on disk."""
    renamed = dict[str, Any]()
    for key in ("quantization", "quantization_config"):
        settings = config.get(key)
        if isinstance(settings, Mapping):
            renamed[key] = {rename(name): value for name, value in settings.items()}
    return renamed


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
