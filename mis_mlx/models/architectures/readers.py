"""Which matrices of a block read an axis that can shrink, by the kind of the block."""

from collections.abc import Iterator, Mapping
from typing import Any

READERS = {  # axis: (part of a block, the matrices in it that read the axis)
    "ffn": ("mlp", ("down_proj",)),
    "heads": ("self_attn", ("o_proj",)),
    "norm1": ("self_attn", ("q_proj", "k_proj", "v_proj", "qkv_proj")),
    "norm2": ("mlp", ("gate_proj", "up_proj", "gate_up_proj")),
}
# the same of blocks with a short convolution in place of attention, and with a delta rule
CONVOLUTION_READERS = {
    "channels": ("conv", ("out_proj",)),
    "norm1": ("conv", ("in_proj",)),
}
DELTA_READERS = {
    "values": ("linear_attn", ("out_proj",)),
    "norm1": ("linear_attn", ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
}

WRITERS = ("o_proj", "out_proj", "down_proj")  # matrices that write into the stream


def readers_of(axis: str) -> tuple[str, ...]:
    """The names of all matrices that read an axis, in blocks of every kind."""
    names: tuple[str, ...] = ()
    for own, (_, matrices) in _all_readers():
        if own == axis:
            names += matrices
    return names


def _all_readers() -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    for table in (READERS, CONVOLUTION_READERS, DELTA_READERS):
        yield from table.items()


def readers(block: Mapping[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """{axis: (part of the block, its matrices that read the axis)}.

    All matrices of an axis have the same input. A mixture of experts has the axes of attention
    alone.
    """
    present = {}
    for axis, (part, names) in _all_readers():
        matrices = [name for name in names if name in block.get(part, ())]
        if matrices:
            present[axis] = (part, matrices)
    return present
