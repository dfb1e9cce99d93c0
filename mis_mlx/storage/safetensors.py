"""A model's safetensors files: a folder's index, lazy reading, writing with bounded memory."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mis_mlx.storage.files import DISK
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

    def mapped(
        self, change: Callable[[mx.array], mx.array], *, columns: int, dtype: str = "F32"
    ) -> "InParts":
        """The matrix with all parts changed, which then have so many columns and this type.

        By `map`, which forgets a part before it asks for the next; a generator's variable does not.
        """
        rows = self.spec[1][0]
        return InParts((dtype, (rows, columns)), map(change, self.parts))


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
    single = folder / "model.safetensors"
    weight_map = None
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        files = sorted(set(weight_map.values()))
    elif single.is_symlink() or single.exists():
        files = [single.name]
    else:
        raise MisError(_no_weights(folder))
    present = {path.name for path in folder.glob("model*.safetensors")}
    stray = sorted(present - set(files))
    if stray:
        raise MisError(
            f"{folder} holds {', '.join(stray)} which no index lists: move it out, mlx-lm would "
            f"load it"
        )
    tensors = _in_files(folder, files)
    if weight_map is not None:
        file_of = {name: tensor.file.name for name, tensor in tensors.items()}
        wrong = {name for name, _ in file_of.items() ^ weight_map.items()}
        if wrong:
            raise MisError(
                f"{folder}: {INDEX} and the shards disagree about {min(wrong)}; download it again"
            )
    return tensors


def _in_files(folder: Path, files: Sequence[str]) -> dict[str, TensorAt]:
    """All tensors of some files of the folder. MisError when one tensor is in two of them."""
    tensors: dict[str, TensorAt] = {}
    for name in files:
        require_inside(folder, name)
        in_file, _ = check(folder / name)
        twice = tensors.keys() & in_file.keys()
        if twice:
            other = tensors[min(twice)].file.name
            raise MisError(
                f"{folder} has the tensor {min(twice)} in both {other} and {name}; download it "
                f"again"
            )
        tensors |= in_file
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


def require_inside(folder: Path, name: str) -> None:
    """Refuse a missing file, and a link out of the folder, except into a Hugging Face cache."""
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
    """The sentence for a folder without model.safetensors: what it holds, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    remedies = {
        (".gguf",): ": GGUF is not read here, use the safetensors model it was made from",
        UNSAFE: ", an unsafe format that can run code: get the safetensors version",
        (".safetensors",): f" but neither model.safetensors nor {INDEX}: add the missing one",
    }
    for endings, remedy in remedies.items():
        for name in names:
            if name.endswith(endings):
                return f"{folder} holds {name}{remedy}"
    return f"{folder} holds no model.safetensors: check the path, or download the model first"


def lazy(tensors: Mapping[str, TensorAt], names: Iterable[str]) -> dict[str, mx.array]:
    """The named tensors as arrays that MLX will read when they are evaluated.

    Each file is checked again. Until the arrays are evaluated it must not be written over (MLX
    would read the new bytes without a word); replacing it by rename or deleting it is harmless. If
    an evaluation fails, drop every array: a second evaluation returns garbage without an error.
    """
    arrays = {}
    for path, wanted in files_of(tensors, names).items():
        require_unchanged(path, tensors, wanted)
        content: Any = mx.load(str(path))
        for name in wanted:
            tensor = tensors[name]
            stored_name, stored = tensor.stored or (name, tensor)
            if tensor.shape == stored.shape:
                arrays[name] = content[stored_name]
            elif tensor.nbytes == stored.nbytes:
                arrays[name] = content[stored_name].reshape(tensor.shape)
            else:
                arrays[name] = content[stored_name][_rows_of(tensor, stored)]
        del content  # an array, once evaluated, stays in memory as long as a dict that holds it
    return arrays


def _rows_of(tensor: TensorAt, stored: TensorAt) -> slice | int:
    """Where the tensor is in the stored one: rows of it, or one of those that are stacked in it."""
    stored_bytes = max(stored.nbytes, 1)
    first = (tensor.offset - stored.offset) * stored.shape[0] // stored_bytes
    if len(tensor.shape) == len(stored.shape):
        return slice(first, first + tensor.shape[0])
    return first


def files_of(tensors: Mapping[str, TensorAt], names: Iterable[str]) -> dict[Path, list[str]]:
    """The names by the file that holds them. MisError for a tensor that is not there."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name not in tensors:
            raise MisError(
                f"The model has no tensor {name}: it is incomplete or of another architecture"
            )
        by_file.setdefault(tensors[name].file, []).append(name)
    return by_file


def require_unchanged(path: Path, tensors: Mapping[str, TensorAt], names: Iterable[str]) -> None:
    """Check a file again: MisError when a named tensor no longer lies where `tensors` says."""
    now, _ = check(path)
    for name in names:
        stored_name, stored = tensors[name].stored or (name, tensors[name])
        if now.get(stored_name) != stored:
            raise MisError(
                f"{path} changed since it was checked (tensor {stored_name}); start again"
            )


def write_tensors(
    folder: Path,
    specs: Specs,
    tensors: Named,
    *,
    shards: Sequence[Specs] | None = None,
) -> None:
    """Write a model's tensors into `folder`, one in memory at a time.

    Use it inside `checkpoint.commit_folder`. tensors: as `specs` say, in their order; ValueError
    otherwise. shards: the same specs, divided into files; more than one make an index file.
    Default: `split_into_shards`.
    """
    shards = shards or split_into_shards(specs)
    coming = iter(tensors)
    by_file = {"model.safetensors": specs}
    if len(shards) > 1:
        by_file = {}
        for number, shard in enumerate(shards, 1):
            by_file[f"model-{number:05d}-of-{len(shards):05d}.safetensors"] = shard
    for name, part in by_file.items():
        _write_file(folder / name, part, coming)
    surplus = next(coming, None)
    if surplus:
        raise ValueError(f"{folder}: {surplus[0]} came, nothing was due")
    if len(shards) > 1:
        content = _index_content(specs, by_file)
        DISK.write(folder / INDEX, json.dumps(content, indent=2).encode())
        DISK.fsync(folder / INDEX)


def _index_content(specs: Specs, by_file: Mapping[str, Specs]) -> dict[str, Any]:
    """What an index file says. Parameters are not counted in a packed model (U32).

    There an element holds several of them.
    """
    metadata = {"total_size": sum(map(spec_bytes, specs.values()))}
    if not any(dtype == "U32" for dtype, _ in specs.values()):
        metadata["total_parameters"] = sum(math.prod(shape) for _, shape in specs.values())
    weight_map: dict[str, str] = {}
    for file, part in by_file.items():
        weight_map |= dict.fromkeys(part, file)
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def write_arrays(path: Path, arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    """Write one safetensors file and fsync it: {"bytes": its size, "sha256": in hex}."""
    specs = {name: spec_of(array) for name, array in arrays.items()}
    return _write_file(path, specs, iter(arrays.items()))


def _write_file(path: Path, specs: Specs, coming: Iterator[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write the file front to back from the next tensors that come.

    ValueError where one is missing, or is not the one that is due.
    """
    head, content_bytes = _head(specs)
    sha256 = hashlib.sha256(head)
    DISK.write(path, head)
    for due in specs.items():
        name, tensor = next(coming, ("nothing", mx.array(0)))
        came = (name, spec_of(tensor))
        if came != due:
            raise ValueError(f"{path.name}: {came} came, {due} was due")
        written = 0
        for array in tensor.parts if isinstance(tensor, InParts) else [tensor]:
            if array.size:
                data = _bytes_of(array)
                sha256.update(data)
                DISK.extend(path, data)
                written += len(data)
                del data
            del array
            mx.clear_cache()  # goes back to the system before the next is made
        del tensor
        if written != spec_bytes(due[1]):
            raise ValueError(
                f"{path.name}: {name} came with {written} bytes, {spec_bytes(due[1])} were due"
            )
    DISK.fsync(path)  # shard by shard, so that unwritten pages do not pile up in memory
    return {"bytes": len(head) + content_bytes, "sha256": sha256.hexdigest()}


def _head(specs: Specs) -> tuple[bytes, int]:
    """A file's first bytes, its header with the length before it; and the bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin = end
        end += spec_bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def _bytes_of(array: mx.array) -> memoryview:
    """Its bytes, evaluated; numpy has no bfloat16.

    Bytes are along the last axis only: flattened, 2 GiB and more would not fit into one dimension.
    """
    if array.ndim == 0:
        array = array.reshape(1)
    raw: Any = mx.contiguous(array).view(mx.uint8)
    return memoryview(raw).cast("B")


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


def split_into_shards(specs: Specs, shard_bytes: int = 5 * GIB) -> list[dict[str, Spec]]:
    """Consecutive tensors in shards of at most `shard_bytes`; a bigger tensor is alone."""
    groups = grouped(specs.items(), lambda item: spec_bytes(item[1]), shard_bytes)
    return [dict(group) for group in groups] or [{}]
