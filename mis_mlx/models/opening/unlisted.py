"""A model of a family that mlx-lm has and our table has not: whole, as mlx-lm loads it."""

import re
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import FAMILIES, OPENED_AS
from mis_mlx.models.architectures.stock import mlx_lm
from mis_mlx.models.opening.config import read_json
from mis_mlx.storage import safetensors
from mis_mlx.types import MisError


def is_unlisted(folder: Path) -> bool:
    """Whether mlx-lm alone has the family of a folder, without the model's own program code."""
    config = read_json(folder, folder / "config.json")
    kind = str(config.get("model_type"))
    if kind in {*FAMILIES, *OPENED_AS} or config.get("model_file"):
        return False
    try:
        return bool(re.fullmatch(r"[\w-]+", kind) and mlx_lm("utils")._get_classes(config))
    except (ValueError, AttributeError):  # no such module, or one that has no model
        return False


def open_whole(folder: Path) -> tuple[dict[str, Any], nn.Module]:
    """(config, mlx-lm's model), whose weights are lazy and of the stored types.

    MisError where the folder is quantized already, or where mlx-lm does not load it.
    """
    config = read_json(folder, folder / "config.json")
    packed = arch.is_quantized(safetensors.index(folder))
    if packed or config.get("quantization") or config.get("quantization_config"):
        raise MisError(f"{folder} is quantized already: start from the unquantized model")
    try:
        model, _ = mlx_lm("utils").load_model(folder, lazy=True, trust_remote_code=False)
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        text = " ".join(str(error).split())[:160]
        why = f"mlx-lm does not load it as a {config['model_type']} ({text})"
        raise MisError(f"{folder}: {why}: download the model again") from None
    return config, model
