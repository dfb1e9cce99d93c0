"""How large a model is once it is quantized."""

import math
from dataclasses import replace

from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.tensor_shapes import tensors_of
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.settings.recipe import QuantizationConfig

BIAS_BITS = 32  # scale and bias of a group


def rounded_bytes(m: ModelSize, rounding: QuantizationConfig) -> int:
    """Bytes of a model in the mean bits asked for.

    Where no bits are asked for, in 4 bits, with the embedding and the head in 8.
    """
    if rounding.target_bpw:
        return int(rounding.target_bpw * m.params / 8)
    bits = (4 + BIAS_BITS / rounding.q_group_size) * m.params + 4 * m.tables_params
    architecture = family(m.config)
    floors = architecture.bit_floors() | dict.fromkeys(architecture.state_gates(), 8)
    shapes = tensors_of(m.config) if floors else {}
    for path, fewest in floors.items():
        bits += (fewest - 4) * math.prod(shapes[f"{path}.weight"])
    return int(bits / 8)


def rounded_size(m: ModelSize, rounding: QuantizationConfig) -> ModelSize:
    """A model once it is rounded."""
    nbytes = rounded_bytes(m, rounding)
    share = nbytes / m.params
    return replace(
        m,
        nbytes=nbytes,
        block_bytes=int(share * m.largest_block_params),
        head_bytes=int(share * m.head_params),
        packed=True,
        as_stored=m.gpu,
    )


def files_bytes(m: ModelSize, rounding: QuantizationConfig) -> int:
    """Bytes on disk once a model is rounded: itself, and its blocks and head as begun."""
    packed = rounded_bytes(m, rounding)
    if not rounding.compensates:
        return packed
    kept = m.all_block_params
    # The head may get fewer than 8 bits, and is rounded by what reaches it then.
    if rounding.target_bpw is not None:
        kept += m.head_params
    return packed + packed * kept // m.params
