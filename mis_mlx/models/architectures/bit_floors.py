"""The fewest bits of matrices that are rounded more carefully than others: a gated delta rule's."""

import math

from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config
from mis_mlx.models.architectures.tensor_shapes import tensors_of


def delta_floors(config: Config) -> dict[str, int]:
    """{module path: the fewest bits} of the large matrices around gated delta rules."""
    return family(config).bit_floors()


def further_bits(config: Config) -> int:
    """How many bits the floors take in a model whose other matrices have 4."""
    floors = delta_floors(config) | dict.fromkeys(family(config).state_gates(), 8)
    if not floors:
        return 0
    shapes = tensors_of(config)
    total = 0
    for path, bits in floors.items():
        total += (bits - 4) * math.prod(shapes[f"{path}.weight"])
    return total
