"""What llama.cpp's gemma4 and gemma3n need beside the other families' tensors and keys.

Both have a table of per-layer inputs and last blocks that use the keys of an earlier one; gemma3n
has AltUp's matrices, too. llama.cpp's gemma3n has most of its sizes in its program. A model of
other sizes is refused here: there it would open, and compute another function.
"""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from mis_mlx.models.architectures import arch, block_inputs, experts, tensor_shapes
from mis_mlx.models.architectures.families import Config, Shapes, family
from mis_mlx.models.architectures.sizes import ffn_size, key_owners
from mis_mlx.models.opening import load
from mis_mlx.storage.block_reader import Reader
from mis_mlx.types import Checkpoint, MisError

SLIDING = "sliding_attention"
# What llama.cpp's gemma3n has in its program: keys of config.json, and the value.
FIXED = {
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "laurel_rank": 64,
    "hidden_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}
OWN_KEYS = 20  # its first blocks, which have keys and values of their own
SPARSE = 10  # its first blocks, which silence neurons
SILENT = 0.95  # of the neurons of these blocks
NEVER = 1e30  # llama.cpp divides a frequency by this where channels do not rotate
STACKED = ("model.altup_projections", "model.altup_unembed_projections")
TABLES = (load.EMBEDDING, arch.PER_LAYER)  # the names of tables with a row for each token
USE_HF = "use --format hf, or the folder in mlx-lm"


def check(config: Config) -> None:
    """MisError where llama.cpp would compute another function than the model."""
    row = family(config)
    if not row.per_layer:
        return
    layers = config["num_hidden_layers"]
    own = layers - config[row.sharing]
    if row.versions:
        _check_program(config, own)
    kinds = config["layer_types"]
    for i, owner in enumerate(key_owners(config)):
        if owner is None:
            continue
        theirs = own - 1 - (kinds[i] == SLIDING)
        if owner != theirs:
            raise MisError(
                f"block {i} uses the keys of block {owner}, but in llama.cpp's {row.gguf} those of "
                f"block {theirs}: {USE_HF}"
            )


def _check_program(config: Config, own: int) -> None:
    """MisError where a model differs from what llama.cpp's gemma3n has in its program.

    own: how many of the first blocks have keys and values of their own.
    """
    for key, value in FIXED.items():
        if config[key] != value:
            raise MisError(
                f"{key} is {config[key]}, but llama.cpp's gemma3n has {value} in its program: "
                f"{USE_HF}"
            )
    layers = config["num_hidden_layers"]
    if own != min(OWN_KEYS, layers):
        raise MisError(
            f"{own} of {layers} blocks have keys of their own, but in llama.cpp's gemma3n the "
            f"first {OWN_KEYS} have: {USE_HF}"
        )
    silent = [SILENT if i < SPARSE else 0.0 for i in range(layers)]
    if config["activation_sparsity_pattern"] != silent:
        raise MisError(
            f"llama.cpp's gemma3n silences {SILENT:.0%} of the neurons of the first {SPARSE} "
            f"blocks and none elsewhere, unlike this model: {USE_HF}"
        )


def tensors_of(config: Config) -> Shapes:
    """Names and shapes of the tensors that a GGUF has, by our names, in forward order.

    As `arch.tensors_of` with experts stacked. AltUp's matrices at either end are stacked, too. The
    table of per-layer inputs has a row for every token. A gemma3n has keys and values in blocks
    that use another's: llama.cpp wants them, and reads none.
    """
    row = family(config)
    shapes = arch.tensors_of(config, stacked=True)
    if not row.per_layer:
        return shapes
    listed: Shapes = {}
    for name, shape in shapes.items():
        stem = _stem(name)
        if name.startswith(arch.PER_LAYER):
            listed[name] = (config["vocab_size"], *shape[1:])
        elif stem:
            listed[f"{stem}.weight"] = (config[row.versions] - 1, *shape)
        else:
            listed[name] = shape
    if row.versions:
        listed |= tensor_shapes.unused_shapes(config)
    return listed


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
        return experts.one_by_one(source, config)
    return [f"{stem}.{number}.weight" for number in range(config[family(config).versions] - 1)]


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
        return self._reader.rows(self._tensor, block_inputs.table_rows(self._config, ids))


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


def words(config: Config) -> dict[str, Any]:
    """What llama.cpp is told, by the `GGUFWriter`'s words; nothing of other families."""
    row = family(config)
    if not row.per_layer:
        return {}
    layers = config["num_hidden_layers"]
    told: dict[str, Any] = {
        "sliding_window": config["sliding_window"],
        "sliding_window_pattern": [kind == SLIDING for kind in config["layer_types"]],
        "shared_kv_layers": config[row.sharing],
        "embedding_length_per_layer_input": config[row.per_layer],
        "final_logit_softcapping": config[row.softcap],
    }
    if row.double_wide:
        told["feed_forward_length"] = [ffn_size(config, i) for i in range(layers)]
    if row.global_head_dim:
        told |= _two_head_sizes(config)
    if row.versions:
        told["altup_num_inputs"] = config[row.versions]
        told["altup_active_idx"] = config["altup_active_idx"]
        shares = config[row.sparsity]
        told["activation_sparsity_scale"] = [_deviations(share) for share in shares]
    return told


def _two_head_sizes(config: Config) -> dict[str, Any]:
    """Heads of blocks that see all tokens, and of those with a window, which have their own key."""
    wide = config[family(config).global_head_dim]
    narrow = config["head_dim"]
    local = config["rope_parameters"][SLIDING]
    return {
        "key_length": wide,
        "value_length": wide,
        "rope_dimension_count": wide,
        "key_length_swa": narrow,
        "value_length_swa": narrow,
        "rope_dimension_count_swa": narrow,
        "rope_freq_base_swa": local["rope_theta"],
    }


def _deviations(share: float) -> float:
    """The standard deviations above the mean that this share of normal numbers stays below."""
    return NormalDist().inv_cdf(share) if share else -np.inf
