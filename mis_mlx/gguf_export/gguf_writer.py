"""Write a GGUF file with one slab of rows in memory: its head from the `gguf` package, its tensors appended."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from mis_mlx.gguf_export.tensors import Part
from mis_mlx.storage.files import Files

ALIGNMENT = 32  # bytes, GGUF's default: where every tensor begins


def padded_bytes(parts: Iterable[Part]) -> int:
    """Bytes of all tensors in the file, padding included."""
    return sum(part.nbytes + -part.nbytes % ALIGNMENT for part in parts)


def head(writer: Any, parts: Iterable[Part]) -> bytes:
    """Everything in front of the first tensor: the facts given to the `GGUFWriter` so far, the table of tensors.
    The writer gets a buffer in place of its file, so that every byte goes through `Files`."""
    for part in parts:
        type_ = gguf.GGMLQuantizationType[part.kind]
        writer.add_tensor_info(part.name, part.byte_shape, np.dtype(np.uint8), part.nbytes, raw_dtype=type_)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue() + bytes(-buffer.tell() % ALIGNMENT)


def write(path: Path, head: bytes, parts: Sequence[Part], rows: Iterable[Iterator[np.ndarray]], files: Files) -> None:
    """Write the new file `path`; `rows` gives, for each part in turn, its bytes slab by slab.
    ValueError when a tensor has other than its due bytes. Use it inside `checkpoint.commit_folder`."""
    files.write(path, head)
    for part, slabs in zip(parts, rows, strict=True):
        count = 0
        for slab in slabs:
            files.extend(path, slab.data.cast("B"))
            count += slab.nbytes
        if count != part.nbytes:
            raise ValueError(f"{part.name}: {count} bytes came, {part.nbytes} were due")
        files.extend(path, bytes(-count % ALIGNMENT))
