"""The fewest bits of matrices that are rounded more carefully than others: a gated delta rule's.

An error there stays in the state for all later tokens. A Qwen 3.5 27B in ParoQuant's 4 bits, its
linear attention with the rest, followed 40.3 % of IFEval's prompts where 57.8 % were followed
before, as a user measured (z-lab/paroquant, issue 45).
"""

import math
from collections.abc import Sequence

from mis_mlx.models.architectures.families import Config, family
from mis_mlx.models.architectures.tensor_shapes import tensors_of

DELTA_BITS = 5  # of the large matrices


def delta_floors(config: Config) -> dict[str, int]:
    """{module path: the fewest bits} of the large matrices around gated delta rules."""
    paths = _paths(config, ("in_proj_qkv", "in_proj_z", "out_proj"))
    return dict.fromkeys(paths, DELTA_BITS)


def delta_gates(config: Config) -> set[str]:
    """Module paths of what says how much each head forgets and learns of a token."""
    return _paths(config, ("in_proj_a", "in_proj_b"))


def _paths(config: Config, names: Sequence[str]) -> set[str]:
    """Module paths of these matrices in every block with a delta rule."""
    paths = set[str]()
    if family(config).stateful != "linear_attention":
        return paths
    for i, kind in enumerate(config["layer_types"]):
        if kind == "linear_attention":
            paths.update(f"model.layers.{i}.linear_attn.{name}" for name in names)
    return paths


def further_bits(config: Config) -> int:
    """How many bits the floors take in a model whose other matrices have 4."""
    floors = delta_floors(config) | dict.fromkeys(delta_gates(config), 8)
    if not floors:
        return 0
    shapes = tensors_of(config)
    total = 0
    for path, bits in floors.items():
        total += (bits - 4) * math.prod(shapes[f"{path}.weight"])
    return total
