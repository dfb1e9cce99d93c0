"""Write a GGUF file with one slab of rows in memory: its head from the `gguf` package, its tensors appended.

Knows neither models nor where the rows come from.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mis_mlx.storage.files import Files

if TYPE_CHECKING:
    import numpy as np

ALIGNMENT = 32  # bytes, GGUF's default: where every tensor begins
Spec = tuple[str, tuple[int, ...]]  # ggml's type such as "Q4_1", shape (out, in)


def spec_bytes(spec: Spec) -> int:
    """Bytes of a tensor. ValueError when its rows cannot be cut into the type's blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[spec[0]]]
    if spec[1][-1] % weights:
        raise ValueError(f"rows of {spec[1][-1]} weights, which {spec[0]}'s block of {weights} does not divide")
    return math.prod(spec[1]) // weights * nbytes


def padded_bytes(specs: Mapping[str, Spec]) -> int:
    """Bytes of all tensors in the file, padding included."""
    return sum(spec_bytes(spec) + -spec_bytes(spec) % ALIGNMENT for spec in specs.values())


def head(writer: Any, specs: Mapping[str, Spec]) -> bytes:
    """Everything in front of the first tensor: the facts given to the `GGUFWriter` so far, the table of tensors.

    The writer gets a buffer in place of its file, so that every byte goes through `Files`.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
    from gguf.gguf_writer import WriterState

    for name, (kind, shape) in specs.items():
        type_ = GGMLQuantizationType[kind]
        rows = quant_shape_to_byte_shape(shape, type_)
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), spec_bytes((kind, shape)), raw_dtype=type_)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue() + bytes(-buffer.tell() % ALIGNMENT)


def write(
    path: Path, head: bytes, specs: Mapping[str, Spec], rows: Iterable[Iterator[np.ndarray]], files: Files
) -> None:
    """Write the new file `path`; `rows` gives, for each tensor of `specs` in turn, its bytes slab by slab.

    ValueError when a tensor has other than its due bytes. Use it inside `checkpoint.commit_folder`.
    """
    files.write(path, head)
    for (name, spec), slabs in zip(specs.items(), rows, strict=True):
        count = 0
        for slab in slabs:
            files.extend(path, slab.data.cast("B"))
            count += slab.nbytes
        if count != spec_bytes(spec):
            raise ValueError(f"{name}: {count} bytes came, {spec_bytes(spec)} were due")
        files.extend(path, bytes(-count % ALIGNMENT))
