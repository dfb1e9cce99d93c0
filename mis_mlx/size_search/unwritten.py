"""Students that nobody writes: the teacher's blocks, cut and rounded in memory as they stream past.

A search asks what many students lose. All of them go through one pass over the teacher's file: a
block is read once, and every student makes its own of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware.memory import headroom_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.models.architectures import arch, modules
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.pass_cost import block_matrix
from mis_mlx.models.passing.stream import Arrays, Batches, Hidden, Stream
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.pruning import slicing
from mis_mlx.quantization import packed_format
from mis_mlx.storage.block_reader import Reader
from mis_mlx.types import Checkpoint, KeptUnits

MOST = 8  # students in one pass
TEXT_TOKENS = 160  # of a question and its answer, about
# Of a weight that is rounded to its nearest value: in float32, packed, and made again.
ROUNDED_BYTES = 4 + 1 + 4 + 4

DTYPE = "bfloat16"  # of a cut student's weights before they are rounded, as on disk
Running = tuple["StudentStream", Hidden]


@dataclass(frozen=True)
class Student:
    """The teacher cut and rounded. reader: the teacher with the student's vocabulary.

    keep: the units that stay; None: all. formats: of each matrix that is rounded, by its path; {}:
    none is. fit: on fitted grids, else on MLX's own.
    """

    reader: Checkpoint
    shape: Shape
    keep: KeptUnits | None = field(default=None, compare=False)
    formats: packed_format.Formats = field(default_factory=dict, compare=False)
    fit: bool = True

    @property
    def changed(self) -> bool:
        """Whether its blocks are others than the teacher's."""
        return bool(self.keep or self.formats)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its config.json, before it is rounded."""
        if self.keep is None:
            return self.reader.config
        return arch.student_config(self.reader.config, self.shape, self.keep.layers, DTYPE)

    @property
    def nbytes(self) -> int:
        """Bytes of its file: rounded matrices, and all else in 2 bytes a number."""
        return packed_format.packed_bytes(self.config, self.formats, DTYPE)


class StudentStream(Stream):
    """A student in a pass over its teacher: it reads the tables, and is given the blocks.

    Small matrices outside of blocks, which have 8 bits in some families, stay as they are.
    """

    def __init__(self, student: Student):
        tensors = student.reader.tensors
        outside = {name: t for name, t in tensors.items() if arch.block_of(name) is None}
        super().__init__(replace(student.reader, config=student.config, tensors=outside))
        self.student = student
        self._outside = outside
        # tables that are cut or rounded here are not packed
        stored = {}
        for name, tensor in outside.items():
            path, _, kind = name.rpartition(".")
            made = student.keep or path in student.formats
            if not (made and f"{path}.weight" in load.TABLES and kind != "weight"):
                stored[name] = tensor
        self.checkpoint = replace(self.checkpoint, tensors=stored)
        self.reader = Reader(outside)
        layers = range(shape_of(student.reader.config).layers)
        kept = student.keep.layers if student.keep else layers
        self._numbers = {layer: number for number, layer in enumerate(kept)}

    def _stored(self, prefix: str, rows: np.ndarray | None = None) -> Arrays:
        """As of a model on disk; rows of a table that is rounded are so."""
        kind = self.student.formats.get(prefix.removesuffix("."))
        if kind is None and self.student.keep is None:
            return super()._stored(prefix, rows)
        raw = {}
        for name, tensor in self._outside.items():
            if name.startswith(prefix):
                ids = np.arange(tensor.shape[0]) if rows is None else rows
                raw[name] = self.reader.rows(tensor, ids)
        name = f"{prefix}weight"
        weight = load.dense(self.student.reader, name, raw)
        if self.student.keep:
            weight = weight.astype(arch.type_of(self.student.config, name, mx.bfloat16))
        if kind is not None:
            weight = self._rounded(weight, kind)
        return {name: weight}

    def _rounded(self, weight: mx.array, kind: packed_format.Format) -> mx.array:
        packed = packed_format.rounded_matrix(weight, kind, fit=self.student.fit)
        return packed_format.weight_of(packed, kind, self.dtype)

    def through(self, layer: int, block: nn.Module, hidden: Hidden) -> None:
        """All batches through what the student has in place of a block of the teacher, in place."""
        number = self._numbers.get(layer)
        if number is None:
            return
        self.block_index = number
        BlockTurn(self, number, self._own_block(number, block), hidden).go()

    def _own_block(self, number: int, block: nn.Module) -> nn.Module:
        """Block `number` of the student, made of the teacher's, evaluated."""
        student = self.student
        if not student.changed:
            return block
        own = family(student.config).new_block(self.args, number)
        take = partial(_dense, dict(block.named_modules()))
        prefix = f"model.layers.{number}."
        weights = []
        for name in arch.tensors_of(student.config):
            if not name.startswith(prefix):
                continue
            path = name.removesuffix(".weight")
            if student.keep:
                array = slicing.taken(student.reader, student.keep, take, name)
                assert isinstance(array, mx.array)  # tables alone come in parts
                array = array.astype(arch.type_of(student.config, name, mx.bfloat16))
            else:
                array = take(name)
            if path in student.formats:
                array = self._rounded(array, student.formats[path])
            # as from a file: a product of other strides has other last bits
            array = mx.contiguous(array.astype(arch.type_of(student.config, name, self.dtype)))
            stream.evaluate_now(array)  # one by one: temporaries of one matrix alone
            weights.append((name.removeprefix(prefix), array))
        own.load_weights(weights)
        own.eval()
        stream.evaluate_now(own.parameters(), mx.random.state)
        return own


def _dense(parts: Mapping[str, nn.Module], name: str) -> mx.array:
    """A tensor of the block in memory that has these modules, de-quantized where it is packed."""
    _, _, _, inside = name.split(".", 3)
    path, _, kind = inside.rpartition(".")
    module = parts[path]
    if kind == "weight" and "scales" in module:
        return modules.dense_weight(module)
    array: mx.array = module[kind]
    return array


def passed(
    teacher: Checkpoint,
    students: Sequence[Student],
    batches: Sequence[Batches],
    *,
    direct: bool = False,
) -> list[Running]:
    """Every student with its final states [(1, T, D)], from one pass over the teacher.

    batches: token ids [(1, T)] for each of them, in its own tokens. Memory: a block of the
    teacher's, one of a student's, hidden states of all.
    """
    source = Stream(teacher, direct=direct)
    running = []
    for student, own_batches in zip(students, batches, strict=True):
        own = StudentStream(student)
        running.append((own, own.embed(own_batches)))
    for turn in source.sweep([]):  # the students bring the windows
        for own, hidden in running:
            own.through(turn.number, turn.block, hidden)
    for own, hidden in running:
        own.norm(hidden)
    return running


def passes_cost(t: ModelSize, students: int, texts: int, length: int, limit: int) -> StageCost:
    """`students` of a teacher measured on the same texts, beside a reader.

    Each student has its own block, made of the teacher's, while this is in memory. All are taken
    for as large as the teacher. length: of the longest text. limit: bytes of memory.
    """
    some, peak_bytes = at_once(t, students, texts, length, limit)
    work = _forward(t, texts, min(length, TEXT_TOKENS)).repeated(students + 1)
    return replace(
        work,
        name=f"measure {students}",
        read_bytes=math.ceil(students / some) * t.nbytes,
        peak_bytes=peak_bytes,
    )


def at_once(t: ModelSize, most: int, texts: int, length: int, limit: int) -> tuple[int, int]:
    """(how many of `most` students, each with its reader, go through one pass within `limit` bytes,
    the bytes that they hold).
    """
    # one and its reader, a block, and its largest matrix, rounded
    one = _forward(t, texts, length).peak_bytes
    one += t.item * t.largest_block_params + ROUNDED_BYTES * block_matrix(t)
    states = 2 * texts * length * t.hidden_bytes
    room = headroom_bytes(limit, t.text_bytes + one)
    others = min(min(most, MOST) - 1, room // states)
    return 1 + others, one + others * states


def _forward(t: ModelSize, texts: int, length: int) -> StageCost:
    """A student in a pass, compared with its reader."""
    both = comparison_cost([t, t], texts, length)
    return replace(both, flops=both.flops / 2)
