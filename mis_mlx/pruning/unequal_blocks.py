"""The size of a student whose blocks are not alike, as Gemma 4's and Gemma 3n's are not.

Which blocks a cut in depth takes is not known before calibration. So the largest ones are counted,
and no student is larger than it was thought to be. Arithmetic on configs.
"""

import math
from collections.abc import Mapping
from typing import Any

from mis_mlx.models import arch, model_writer, tensor_shapes
from mis_mlx.models.config import Shape
from mis_mlx.models.families import family

PARTS = 3  # tensors of a packed matrix: integers, scales, biases


def _largest_student(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The config of the largest student of this shape: blocks that must stay, and large ones."""
    fixed = arch.fixed_blocks(config)

    def rank(block: int) -> tuple[bool, int]:
        tensors = arch.layer_tensors(config, block=block)
        return block in fixed, sum(map(math.prod, tensors.values()))

    blocks = range(config["num_hidden_layers"])
    ranked = sorted(blocks, key=rank, reverse=True)
    kept = sorted(ranked[: shape.layers])
    return arch.student_config(config, shape, kept)


def _packed(name: str, size: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that is rounded to few bits."""
    return len(size) > 1 and not name.endswith(arch.COEFFICIENTS)


def weights_of(config: Mapping[str, Any], shape: Shape) -> tuple[int, int]:
    """(weights of matrices, other numbers) of the largest student of this shape.

    The zeros that a written Gemma 3n has in place of unused keys count as other numbers, by their
    bytes.
    """
    student = _largest_student(config, shape)
    matrices = 0
    others = 0
    for name, size in arch.tensors_of(student).items():
        if _packed(name, size):
            matrices += math.prod(size)
        else:
            others += math.prod(size)
    if family(student).written_as:
        others += _zeros(student)
    return matrices, others


def _zeros(config: Mapping[str, Any]) -> int:
    """The numbers of 2 bytes that take as many bytes as the zeros of unused keys and values."""
    packing = model_writer.ZEROS
    bits = packing["bits"] + 32 / packing["group_size"]
    total: float = 0
    for size in tensor_shapes.unused_shapes(config).values():
        share = bits / 16 if len(size) > 1 else 1
        total += share * math.prod(size)
    return math.ceil(total)


def count_of_tensors(config: Mapping[str, Any], shape: Shape) -> int:
    """The number of tensors in the file of a student of this shape, once it is rounded."""
    student = _largest_student(config, shape)
    shapes = arch.tensors_of(student)
    if family(student).written_as:
        shapes = {**shapes, **tensor_shapes.unused_shapes(student)}
    return sum(PARTS if _packed(name, size) else 1 for name, size in shapes.items())


def fixed_share(config: Mapping[str, Any], shape: Shape) -> float:
    """The share of a student's weights in the small matrices that always have 8 bits."""
    student = _largest_student(config, shape)
    shapes = arch.tensors_of(student)
    gates = sum(math.prod(shapes[f"{path}.weight"]) for path in tensor_shapes.gates(student))
    matrices, _ = weights_of(config, shape)
    return gates / matrices
