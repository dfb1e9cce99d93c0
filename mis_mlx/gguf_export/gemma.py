"""What llama.cpp's gemma4 and gemma3n need beside the other families' tensors and keys.

Both have a table of per-layer inputs and last blocks that use the keys of an earlier one; gemma3n
has AltUp's matrices, too. llama.cpp's gemma3n has most of its sizes in its program. A model of
other sizes is refused here: there it would open, and compute another function.
"""

from collections.abc import Mapping
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from mis_mlx.models.architectures import arch, side_inputs, tensor_shapes
from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config, Shapes
from mis_mlx.models.architectures.sizes import side_width, versions
from mis_mlx.models.opening import load
from mis_mlx.storage.block_reader import Reader
from mis_mlx.types import Checkpoint

NEVER = 1e30  # llama.cpp divides a frequency by this where channels do not rotate
STACKED = ("model.altup_projections", "model.altup_unembed_projections")
TABLES = (load.EMBEDDING, arch.PER_LAYER)  # the names of tables with a row for each token


def tensors_of(config: Config) -> Shapes:
    """Names and shapes of the tensors that a GGUF has, by our names, in forward order.

    As `arch.tensors_of` with experts stacked. AltUp's matrices at either end are stacked, too. The
    table of per-layer inputs has a row for every token. A gemma3n has keys and values in blocks
    that use another's: llama.cpp wants them, and reads none.
    """
    shapes = arch.tensors_of(config, stacked=True)
    if not side_width(config):
        return shapes
    listed: Shapes = {}
    for name, shape in shapes.items():
        stem = _stem(name)
        if name.startswith(arch.PER_LAYER):
            listed[name] = (config["vocab_size"], *shape[1:])
        elif stem:
            listed[f"{stem}.weight"] = (versions(config) - 1, *shape)
        else:
            listed[name] = shape
    return listed | family(config).written_zeros()


def _stem(name: str) -> str:
    """The name of the stack that one of AltUp's matrices at either end is part of, or ""."""
    for stem in STACKED:
        if name.startswith(f"{stem}."):
            return stem
    return ""


def matrices(source: str, config: Config) -> list[str]:
    """The names of the stored tensors that a tensor of `tensors_of` is made of, in order."""
    stem = _stem(source)
    if not stem:
        return tensor_shapes.one_by_one(source, config)
    return [f"{stem}.{number}.weight" for number in range(versions(config) - 1)]


def stays_wide(name: str) -> bool:
    """Whether llama.cpp leaves a matrix as it is when it makes a K-quant."""
    return "altup" in name or "laurel." in name or "per_layer_model_projection" in name


def zeros(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Zeros of this shape as ggml's type, uint8 (rows, bytes of a row)."""
    values = np.zeros(shape, np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    return packed.view(np.uint8)


class TableRows:
    """The table of per-layer inputs of a checkpoint, as stored; read from disk where it is asked.

    name: of its integers, scales or biases. Tokens behind its end have the row of token 0.
    """

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._config = checkpoint.config
        self._tensor = checkpoint.tensors[name]
        self._reader = Reader({name: self._tensor})

    def __getitem__(self, index: slice) -> mx.array:
        """Some tokens' rows."""
        ids = np.arange(self._config["vocab_size"])[index]
        return self._reader.rows(self._tensor, side_inputs.table_rows(self._config, ids))


def clipped(values: np.ndarray, source: str, config: Config) -> np.ndarray:
    """AltUp's coefficients within the bounds that the model keeps them in; other tensors as is."""
    if not source.endswith("_coefs.weight"):
        return values
    bound = config["altup_coef_clip"]
    return np.clip(values, -bound, bound)


def frequency_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """(head_dim / 2,) float32: what llama.cpp divides the frequencies of global heads by.

    Only a share of their channels rotates, with frequencies of the whole head.
    """
    rotated = int(head_dim * rope["partial_rotary_factor"] / 2)
    factors = np.full(head_dim // 2, NEVER, np.float32)
    factors[:rotated] = 1.0
    return factors
