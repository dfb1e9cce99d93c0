"""What a student may cost at most: bytes or parameters. Arithmetic on configs."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import side_width
from mis_mlx.size_search import unequal_blocks
from mis_mlx.types import MisError

TENSOR_BYTES = 120  # in a file's header


class Limit(NamedTuple):
    """What a student may cost at most: parameters or bytes.

    cost(shape, bits of a weight): of a student. in_bytes: the limit is one of bytes.
    """

    flag: str  # as it was given: '--bytes 50MB'
    most: float
    cost: Callable[[Shape, float], float]
    words: Callable[[float], str]
    in_bytes: bool = False


def _number(
    flag: str,
    text: str,
    units: Mapping[str, float],
    example: str,
) -> tuple[float, str]:
    """(number times its unit, unit) of a flag's text; MisError with an example otherwise."""
    match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if match:
        number = float(match[1])
        unit = match[2]
        if unit in units and 0 < number < 1e18:
            return number * units[unit], unit
    raise MisError(f"{flag} {text!r} is not understood: write {example}")


def params_limit(config: Mapping[str, Any], text: str) -> Limit:
    """'0.667x' of the teacher's parameters, or '90M'."""
    units = {"x": 1.0, "": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
    value, unit = _number(
        "--params", text, units, "a share of the teacher, such as 0.667x, or a number, such as 90M"
    )
    teacher = arch.params(config)
    target = value
    if unit == "x":
        target *= teacher
    if target >= teacher:
        given = f"that is {count(target)} parameters, but the teacher has only {count(teacher)}"
        raise MisError(f"--params {text}: {given}: ask for fewer")
    return Limit(
        flag=f"--params {text}",
        most=target,
        cost=lambda shape, _: sum(weights_of(config, shape)),
        words=lambda cost: f"{count(cost)} parameters ({cost / teacher:.3f}x)",
    )


def count(n: float) -> str:
    """Parameters for people: '90.3M'."""
    if n >= 1e9:
        return f"{n / 1e9:.2f}B"
    if n >= 1e6:
        return f"{n / 1e6:.1f}M"
    return f"{n / 1e3:.0f}k"


def weights_of(config: Mapping[str, Any], shape: Shape) -> tuple[int, int]:
    """(weights of matrices, other numbers) of a student of this shape."""
    if side_width(config):
        return unequal_blocks.weights_of(config, shape)
    student = arch.student_config(config, shape)
    matrices = 0
    others = 0
    for block, count in arch.block_counts(student).items():
        for size in arch.layer_tensors(student, block=block).values():
            if len(size) == 2:
                matrices += count * math.prod(size)
            else:
                others += count * math.prod(size)
    tables = shape.vocab * shape.hidden
    if not shape.tied:
        tables *= 2
    return matrices + tables, others + shape.hidden


def file_bytes(config: Mapping[str, Any], shape: Shape, bpw: float) -> float:
    """Bytes of a student's file: matrices in `bpw` bits a weight, other numbers in 2 bytes."""
    weights, others = weights_of(config, shape)
    if side_width(config):
        header = TENSOR_BYTES * unequal_blocks.count_of_tensors(config, shape)
        return bpw / 8 * weights + 2 * others + header
    tensors = 0  # of a block
    for size in arch.layer_tensors(config).values():
        tensors += 3 if len(size) > 1 else 1  # with scales and biases
    header = TENSOR_BYTES * (shape.layers * tensors + 7)
    return bpw / 8 * weights + 2 * others + header


def bytes_limit(config: Mapping[str, Any], text: str) -> Limit:
    """At most so many bytes of weights on disk."""
    return Limit(
        flag=f"--bytes {text}",
        most=cli.parse_bytes(text, "--bytes"),
        cost=partial(file_bytes, config),
        words=lambda nbytes: f"{nbytes / 1e6:.4g} MB",
        in_bytes=True,
    )
