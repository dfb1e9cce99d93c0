"""The size of a student whose blocks are not alike, as Gemma 4's are not.

Which blocks a cut in depth takes is not known before calibration. So the largest ones are counted,
and no student is larger than it was thought to be. Arithmetic on configs.
"""

from mis_mlx.models.architectures import arch, tensor_shapes
from mis_mlx.models.architectures.shape import Config, Shape, Shapes, weight_count

PARTS = 3  # tensors of a packed matrix: integers, scales, biases


def _largest_student(config: Config, shape: Shape) -> Config:
    """The config of the largest student of this shape: blocks that must stay, and large ones."""
    fixed = arch.fixed_blocks(config)

    def rank(block: int) -> tuple[bool, int]:
        tensors = arch.layer_tensors(config, block=block)
        weights = weight_count(tensors)
        stays = block in fixed
        return stays, weights

    blocks = range(config["num_hidden_layers"])
    ranked = sorted(blocks, key=rank, reverse=True)
    largest = ranked[: shape.layers]
    return arch.student_config(config, shape, sorted(largest))


def _packed(tensors: Shapes) -> Shapes:
    """The matrices among these tensors that are rounded to few bits."""
    matrices: Shapes = {}
    for name, size in tensors.items():
        if len(size) > 1:
            matrices[name] = size
    return matrices


def weights_of(config: Config, shape: Shape) -> tuple[int, int]:
    """(weights of matrices, other numbers) of the largest student of this shape."""
    student = _largest_student(config, shape)
    tensors = arch.tensors_of(student)
    packed = _packed(tensors)
    matrices = weight_count(packed)
    return matrices, weight_count(tensors) - matrices


def count_of_tensors(config: Config, shape: Shape) -> int:
    """The number of tensors in the file of a student of this shape, once it is rounded."""
    student = _largest_student(config, shape)
    tensors = arch.tensors_of(student)
    packed = len(_packed(tensors))
    further = PARTS - 1
    return len(tensors) + further * packed


def fixed_share(config: Config, shape: Shape) -> float:
    """The share of a student's weights in the small matrices that always have 8 bits."""
    student = _largest_student(config, shape)
    tensors = arch.tensors_of(student)
    gates: Shapes = {}
    for path in tensor_shapes.gates(student):
        name = f"{path}.weight"
        gates[name] = tensors[name]
    matrices = _packed(tensors)
    return weight_count(gates) / weight_count(matrices)
