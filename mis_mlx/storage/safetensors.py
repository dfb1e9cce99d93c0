"""A model's safetensors files: the index of a folder, lazy reading, and writing with bounded
memory.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mis_mlx.storage.files import Files
from mis_mlx.storage.header_check import DTYPES, MAX_HEADER_BYTES, Refused, check, json_object
from mis_mlx.types import GIB, MisError, TensorAt, grouped

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl")
INDEX = "model.safetensors.index.json"

Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors spells it, shape
Specs = Mapping[str, Spec]  # by name


class InParts(NamedTuple):
    """A tensor too large to be whole in memory: some of its rows at a time, in order."""

    spec: Spec
    parts: Iterable[mx.array]


Tensor = mx.array | InParts
Named = Iterable[tuple[str, Tensor]]  # (name, tensor)


def index(folder: Path) -> dict[str, TensorAt]:
    """Every tensor of a model folder: model.safetensors, or the shards that the index file lists.

    MisError when a file is missing, fails `check` or lies outside the folder (a Hugging Face cache
    is as good), when index and shards disagree, and when there is an unlisted model*.safetensors,
    which mlx-lm would load too.
    """
    if not folder.is_dir():
        raise MisError(
            f"There is no model folder {folder}: check the path, or download the model first"
        )
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        files = sorted(set(weight_map.values()))
    elif (folder / "model.safetensors").is_symlink() or (folder / "model.safetensors").exists():
        weight_map = None
        files = ["model.safetensors"]
    else:
        raise MisError(_no_weights(folder))
    if stray := sorted({p.name for p in folder.glob("model*.safetensors")} - set(files)):
        raise MisError(
            f"{folder} holds {', '.join(stray)} which no index lists: move it out, mlx-lm would "
            f"load it"
        )
    tensors: dict[str, TensorAt] = {}
    for name in files:
        inside(folder, name)
        in_file, _ = check(folder / name)
        if twice := tensors.keys() & in_file.keys():
            other = tensors[min(twice)].file.name
            raise MisError(
                f"{folder} has the tensor {min(twice)} in both {other} and {name}; download it "
                f"again"
            )
        tensors |= in_file
    if weight_map is not None:
        where = {name: at.file.name for name, at in tensors.items()}
        if wrong := {name for name, _ in where.items() ^ weight_map.items()}:
            raise MisError(
                f"{folder}: {INDEX} and the shards disagree about {min(wrong)}; download it again"
            )
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    """The index file's {tensor name: file name}, every file name a bare one."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
            raise Refused("it is not a regular file of sane size")
        weight_map = json_object(path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Refused("it has no weight_map")
        for name in weight_map.values():
            if (
                not isinstance(name, str)
                or not name.endswith(".safetensors")
                or set(name) & set("/\\\0")
            ):
                raise Refused(f"it points outside the model folder ({str(name)[:60]!r})")
    except (Refused, OSError) as error:
        raise MisError(
            f"{path} is not a usable index: {str(error)[:120]}; download it again"
        ) from None
    return weight_map


def inside(folder: Path, name: str) -> None:
    """Refuse a missing file, and a link that leads out of the folder to other than a Hugging Face
    cache.
    """
    real = (folder / name).resolve()
    if not real.exists():
        raise MisError(f"{folder / name} is missing: download the model again")
    cached = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if real.parent != folder.resolve() and not cached:
        raise MisError(
            f"{folder / name} is a link out of the model folder, to {real}: put the file itself "
            f"there"
        )


def _no_weights(folder: Path) -> str:
    """The sentence for a folder without model.safetensors: what is there instead, and what to
    do.
    """
    names = sorted(p.name for p in folder.iterdir())
    if gguf := [n for n in names if n.endswith(".gguf")]:
        return (
            f"{folder} holds {gguf[0]}: GGUF is not read here, use the safetensors model it "
            f"was "
            f"made from"
        )
    if unsafe := [n for n in names if n.endswith(UNSAFE)]:
        return (
            f"{folder} holds {unsafe[0]}, an unsafe format that can run code: get the "
            f"safetensors version"
        )
    if other := [n for n in names if n.endswith(".safetensors")]:
        return (
            f"{folder} holds {other[0]} but neither model.safetensors nor {INDEX}: add the "
            f"missing one"
        )
    return f"{folder} holds no model.safetensors: check the path, or download the model first"


def lazy(tensors: Mapping[str, TensorAt], names: Iterable[str]) -> dict[str, mx.array]:
    """The named tensors as arrays that MLX will read when they are evaluated.

    Each file is checked again. Until the arrays are evaluated it must not be written over (MLX
    would read the new bytes without a word); replacing it by rename or deleting it is harmless. If
    an evaluation fails, drop every array: a second evaluation returns garbage without an error.
    """
    arrays: dict[str, mx.array] = {}
    for path, wanted in files_of(tensors, names).items():
        unchanged(path, tensors, wanted)
        content: Any = mx.load(str(path))
        for name in wanted:
            at = tensors[name]
            stored, whole = at.stored or (name, at)
            arrays[name] = content[stored]
            if at.shape != whole.shape:  # rows of it; or one of those that are stacked in it
                first = (at.offset - whole.offset) * whole.shape[0] // max(whole.nbytes, 1)
                part = (
                    slice(first, first + at.shape[0])
                    if len(at.shape) == len(whole.shape)
                    else first
                )
                arrays[name] = arrays[name][part]
        del content  # an array, once evaluated, stays in memory as long as a dict that holds it
    return arrays


def files_of(tensors: Mapping[str, TensorAt], names: Iterable[str]) -> dict[Path, list[str]]:
    """The files that hold the named tensors, and their names. MisError for one that is not
    there.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name not in tensors:
            raise MisError(
                f"The model has no tensor {name}: it is incomplete or of another architecture"
            )
        by_file.setdefault(tensors[name].file, []).append(name)
    return by_file


def unchanged(path: Path, tensors: Mapping[str, TensorAt], names: Iterable[str]) -> None:
    """Check a file again: MisError when one of the named tensors no longer lies where `tensors`
    says.
    """
    now, _ = check(path)
    due = [tensors[name].stored or (name, tensors[name]) for name in names]
    if changed := [name for name, at in due if now.get(name) != at]:
        raise MisError(f"{path} changed since it was checked (tensor {changed[0]}); start again")


def write_tensors(
    folder: Path, specs: Specs, tensors: Named, files: Files, shards: Sequence[Specs] | None = None
) -> None:
    """Write a model's tensors into `folder`, as `specs` foretell them, one in memory at a time. Use
    it inside `checkpoint.commit_folder`. shards: the same specs in parts; more than one make an
    index file. Default: `cut`.
    """
    shards = shards or cut(specs)
    coming = iter(tensors)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    by_file = (
        dict(zip(names, shards, strict=True)) if len(shards) > 1 else {"model.safetensors": specs}
    )
    for name, part in by_file.items():
        _write_file(folder / name, part, coming, files)
    if more := next(coming, None):
        raise ValueError(f"{folder}: {more[0]} came, nothing was due")
    if len(shards) > 1:
        metadata = {"total_size": sum(map(spec_bytes, specs.values()))}
        # packed: elements are no parameters
        if not any(dtype == "U32" for dtype, _ in specs.values()):
            metadata["total_parameters"] = sum(math.prod(shape) for _, shape in specs.values())
        where = {name: file for file, part in by_file.items() for name in part}
        content = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
        files.write(folder / INDEX, json.dumps(content, indent=2).encode())
        files.fsync(folder / INDEX)


def write_arrays(path: Path, arrays: Mapping[str, mx.array], files: Files) -> dict[str, Any]:
    """Write one safetensors file and fsync it: {"bytes": its size, "sha256": in hex}."""
    return _write_file(
        path, {name: spec_of(array) for name, array in arrays.items()}, iter(arrays.items()), files
    )


def _write_file(
    path: Path, specs: Specs, coming: Iterator[tuple[str, Tensor]], files: Files
) -> dict[str, Any]:
    """Write the file front to back of the next that come. ValueError where one is not what is due,
    or missing.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin = end
        end = end + spec_bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    sha256 = hashlib.sha256(head)
    files.write(path, head)
    for due in specs.items():
        name, tensor = next(coming, ("nothing", mx.array(0)))
        if (got := (name, spec_of(tensor))) != due:
            raise ValueError(f"{path.name}: {got} came, {due} was due")
        written = 0
        for array in tensor.parts if isinstance(tensor, InParts) else [tensor]:
            if array.size:
                data = _bytes_of(array)
                sha256.update(data)
                files.extend(path, data)
                written += len(data)
                del data
            del array
            mx.clear_cache()  # goes back to the system before the next is made
        del tensor
        if written != spec_bytes(due[1]):
            raise ValueError(
                f"{path.name}: {name} came with {written} bytes, {spec_bytes(due[1])} were due"
            )
    files.fsync(path)  # shard by shard, so that unwritten pages do not pile up in memory
    return {"bytes": len(head) + end, "sha256": sha256.hexdigest()}


def _bytes_of(array: mx.array) -> memoryview:
    """Its bytes, evaluated; numpy has no bfloat16. Bytes along the last axis only: flattened, 2 GiB
    and more would not fit into one dimension.
    """
    whole: Any = mx.contiguous(array.reshape(1) if array.ndim == 0 else array).view(mx.uint8)
    return memoryview(whole).cast("B")


def spec_of(array: Tensor) -> Spec:
    """The tensor's dtype as safetensors spells it, and its shape."""
    if isinstance(array, InParts):
        return array.spec
    for name, (attribute, _) in DTYPES.items():
        if array.dtype == getattr(mx, attribute):
            return name, tuple(array.shape)
    raise ValueError(f"safetensors has no name for {array.dtype}")


def spec_bytes(spec: Spec) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return math.prod(spec[1]) * DTYPES[spec[0]][1]


def cut(specs: Specs, shard_bytes: int = 5 * GIB) -> list[dict[str, Spec]]:
    """Consecutive tensors, as many as fit `shard_bytes`; a bigger one is alone."""
    return [
        dict(group)
        for group in grouped(specs.items(), lambda item: spec_bytes(item[1]), shard_bytes)
    ] or [{}]
