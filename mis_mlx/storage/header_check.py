"""The safetensors gate: judges a model file by its header alone, before MLX sees it.

MLX 0.32.4 believes a header: shape [-1] overwrites its heap, tensors that share bytes ask for any
amount of memory, a dimension of 2.5 silently becomes 2. The rules are those of the reference parser
(huggingface/safetensors, `SafeTensors::deserialize`), narrower where MLX is weaker.
"""

import json
import math
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any

from mis_mlx.types import MisError, TensorAt, gib

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
MAX_RANK = 8
MAX_DIM = 2**31 - 1  # MLX keeps a dimension in a C int
MAX_NAME = 512

# safetensors name -> (name in mlx.core, bytes per element). MLX reads the two 8-bit floats as raw
# bytes.
DTYPES = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "BOOL": ("bool_", 1),
    "U8": ("uint8", 1),
    "U16": ("uint16", 2),
    "U32": ("uint32", 4),
    "U64": ("uint64", 8),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "F8_E4M3": ("uint8", 1),
    "F8_E8M0": ("uint8", 1),
}


class Refused(Exception):
    """Why a file is refused. The catcher adds the file's name and the remedy."""


def check(path: Path) -> tuple[dict[str, TensorAt], dict[str, str]]:
    """Read and judge only the header: ({name: TensorAt}, metadata).

    No tensor byte is read, and MLX is not used. MisError unless it is a regular file in which every
    tensor has a known dtype and a sane shape of exactly the bytes its offsets give, and the tensors
    fill the file without hole, overlap or remainder. Values are not checked.
    """
    try:
        text, size = _read_header(path)
        tensors, metadata = _judged(path, text)
        end = 8 + len(text)
        in_file_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        for name, tensor in in_file_order:
            if tensor.offset != end:
                raise Refused(f"{name[:60]!r} overlaps another tensor or leaves a gap")
            end += tensor.nbytes
        if end > size:
            raise Refused(f"it is incomplete, {size} of {end} bytes ({gib(size)} of {gib(end)})")
        if end < size:
            raise Refused(f"it ends with {size - end} bytes that belong to no tensor")
    except Refused as why:
        raise MisError(f"{path} is not a usable model file: {why}; download it again") from None
    return tensors, metadata


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the size of the file."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise Refused("it is not a regular file")
            size = before.st_size
            if size < 8:
                raise Refused(f"it is only {size} bytes long, an incomplete download")
            nbytes = int.from_bytes(file.read(8), "little")
            if nbytes > MAX_HEADER_BYTES:
                raise Refused(
                    f"it claims a header of {nbytes} bytes, {MAX_HEADER_BYTES} are allowed"
                )
            if 8 + nbytes > size:
                raise Refused(
                    f"it claims a header of {nbytes} bytes but has only {size}, an incomplete "
                    f"download"
                )
            text = file.read(nbytes)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror})") from None
    if len(text) < nbytes or (after.st_size, after.st_mtime_ns) != (size, before.st_mtime_ns):
        raise Refused("it changed while it was read")
    if text[:1] != b"{":
        raise Refused("its header does not begin with {")
    return text, size


def _without_waiting(name: str, flags: int) -> int:
    """Opens as `open` does; a named pipe must not wait for a writer."""
    return os.open(name, flags | os.O_NONBLOCK)


def json_object(text: bytes) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Refused: a key that comes twice, half a surrogate pair, NaN, Infinity, anything that is no JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_constant)
    except RecursionError:
        raise Refused("it is not valid JSON: nested too deeply") from None
    except ValueError as error:  # of UTF-8 and of huge numbers too
        raise Refused(f"it is not valid JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise Refused("it is not a JSON object")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in pairs:
        # The reference parser takes the last of two that share their bytes; we take neither.
        if key in known:
            raise Refused(f"it names {key[:60]!r} twice")
        for text in (key, value):
            if isinstance(text, str):
                text.encode()  # half a surrogate pair is a ValueError here
        known[key] = value
    return known


def _no_constant(text: str) -> None:
    raise Refused(f"it holds {text}, which is not a number")


@lru_cache(1)  # of thousands of tensors read one by one, each asks for the same header
def _judged(path: Path, text: bytes) -> tuple[dict[str, TensorAt], dict[str, str]]:
    """The entries of a header, each judged alone, and its metadata. Do not change them."""
    header = json_object(text)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}  # mx.save_safetensors writes null for none
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        raise Refused("__metadata__ does not map text to text")
    if len(header) > MAX_TENSORS:
        raise Refused(f"it names {len(header)} tensors, but {MAX_TENSORS} are allowed")
    data_start = 8 + len(text)
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _judged_entry(path, name, entry, data_start)
    return tensors, metadata


def _judged_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorAt:
    """One entry of a header. data_start: where the tensors' bytes begin in the file."""
    short = repr(name[:60])
    if len(name) > MAX_NAME or "\0" in name:
        raise Refused(f"the tensor name {short} is too long or holds a NUL")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise Refused(f"{short} lacks dtype, shape or data_offsets")
    dtype = entry["dtype"]
    shape = entry["shape"]
    span = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(f"{short} has the type {str(dtype)[:20]!r}, which MLX does not read")
    if not _whole_numbers(shape, MAX_DIM) or len(shape) > MAX_RANK:
        raise Refused(f"{short} has an impossible shape")
    if not _whole_numbers(span, 2**63) or len(span) != 2 or span[0] > span[1]:
        raise Refused(f"{short} has impossible data_offsets")
    begin, end = span
    nbytes = math.prod(shape) * DTYPES[dtype][1]  # Python's integers do not wrap
    if nbytes != end - begin:
        raise Refused(
            f"{short} needs {nbytes} bytes by its shape, its data_offsets give {end - begin}"
        )
    return TensorAt(path, dtype, tuple(shape), offset=data_start + begin, nbytes=nbytes)


def _whole_numbers(value: Any, most: int) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x <= most for x in value)
