"""Write a model's folder: weights tensor by tensor, the tokenizer, and the record of its pruning.

That record is `keep.json`.
"""

import io
import itertools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.models.architectures import arch, families, stored_form
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load, tokenizer_check
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.storage.safetensors import (
    InParts,
    Named,
    Specs,
    Tensor,
    spec_bytes,
    spec_of,
    write_arrays,
    write_tensors,
)
from mis_mlx.types import Checkpoint, KeptUnits, MisError

WHERE = ("_name_or_path", "name_or_path")  # keys of config.json, tokenizer_config.json
KEEP = "keep.json"
ROTATION = "rotation.npy"
Take = Callable[[str], Tensor]  # a model's tensor by its name
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def need_tokenizer(folder: Path) -> None:
    """MisError when the folder has no tokenizer that could go along."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise MisError(
            f"{folder} has no tokenizer: copy the tokenizer files of the model it was made from"
        )


def keep_files(keep: KeptUnits | None) -> dict[str, Any]:
    """The files that hold kept units, for `write_model`: keep.json, and perhaps rotation.npy.

    keep.json: {layers, kept: {"layer/space": indices}, why, report, rotated}. rotated: true where
    the residual stream was rotated; only then there is a rotation.npy, with the basis.
    """
    if keep is None:
        return {}
    kept = {f"{layer}/{space}": list(indices) for (layer, space), indices in keep.kept.items()}
    saved = {
        "layers": list(keep.layers),
        "kept": kept,
        "why": keep.why,
        "report": dict(keep.report),
    }
    if keep.basis is None:
        return {KEEP: saved}
    np.save(matrix := io.BytesIO(), np.asarray(keep.basis, np.float32), allow_pickle=False)
    return {KEEP: {**saved, "rotated": True}, ROTATION: matrix.getvalue()}


def read_keep(folder: Path) -> KeptUnits | None:
    """The `KeptUnits` beside a pruned model, None without them; MisError where they are damaged.

    The basis stays on disk until it is used.
    """
    path = folder / KEEP
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kept = {}
        for key, indices in saved["kept"].items():
            layer, space = key.split("/")[:2]
            kept[int(layer), space] = tuple(map(operator.index, indices))
        units = KeptUnits(
            layers=tuple(map(operator.index, saved["layers"])),
            kept=kept,
            why=str(saved["why"]),
            report=dict(saved["report"]),
        )
        channels = len(kept[-1, "hidden"]) if saved.get("rotated") else 0
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise MisError(
            f"{path} does not say which units were kept: prune the teacher again"
        ) from None
    if not channels:
        return units
    return replace(units, basis=_basis(folder / ROTATION, channels))


def _basis(path: Path, channels: int) -> np.ndarray:
    """The rotation (D, d) in a file, memory-mapped; d is the number of the model's channels."""
    try:
        basis = np.load(path, mmap_mode="r", allow_pickle=False)
        if basis.ndim != 2 or basis.shape[1] != channels or basis.dtype != np.float32:
            raise ValueError(
                f"it holds {basis.dtype} {list(basis.shape)}, but the model has {channels} channels"
            )
    except (OSError, EOFError, ValueError) as error:
        raise MisError(
            f"{path} is not this model's rotation ({str(error)[:120]}): prune the teacher again"
        ) from None
    return basis


def public(settings: Any) -> Any:
    """The JSON value without what transformers notes of where a model was: a private path."""
    if isinstance(settings, list):
        return [public(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {key: public(value) for key, value in settings.items() if key not in WHERE}


def public_bytes(path: Path) -> bytes:
    """A file of a model as others may see it: JSON settings through `public`, all else as it is."""
    content = path.read_bytes()
    if not path.name.endswith("config.json"):
        return content
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):  # whoever reads it says so
        return content
    told = public(settings)
    return content if told == settings else json.dumps(told, indent=2).encode()


def published(
    config: Mapping[str, Any], specs: Specs, tensors: Named
) -> tuple[dict[str, Any], Specs, Named]:
    """A model in the form of its family's files: config, shapes and tensors.

    The arguments are those of `write_folder`.
    """
    architecture = families.family(config)
    stored_specs = {}
    for name, (kind, shape) in specs.items():
        stored_shape = stored_form.stored_shape(name, shape)
        stored_specs[architecture.stored_name(name)] = (kind, stored_shape)
    stored = (
        (architecture.stored_name(name), stored_form.stored_tensor(name, tensor))
        for name, tensor in tensors
    )
    return architecture.stored_config(), stored_specs, stored


def write_folder(
    config: Mapping[str, Any],
    specs: Specs,
    tensors: Named,
    *,
    source: Path,
    out: Path,
    extra: Mapping[str, Any] | None = None,
    shards: Sequence[Specs] | None = None,
) -> None:
    """Commit the new folder `out`: weights, config.json, the tokenizer files of `source`.

    tensors: as `specs` say, in their order. extra: more files by name: bytes as they are, all else
    as JSON. shards: as of `write_tensors`; such a folder is for us alone.
    """
    if shards is None:
        config, specs, tensors = published(config, specs, tensors)
    nbytes = sum(map(spec_bytes, specs.values()))
    with protocol.commit_folder(out, nbytes) as folder:
        write_tensors(folder, specs, tensors, shards=shards)
        DISK.write(folder / "config.json", json.dumps(public(dict(config)), indent=2).encode())
        for name, value in (extra or {}).items():
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            DISK.make_folder((folder / name).parent)
            DISK.write(folder / name, content)
        for path in list(tokenizer_check.present(source)):  # judges all before one is copied
            copy = folder / path.relative_to(source)
            DISK.make_folder(copy.parent)
            DISK.write(copy, public_bytes(path))


def dense(checkpoint: Checkpoint, name: str) -> Tensor:
    """A checkpoint's tensor for `write_model`: `load.dense`.

    A table with a row for each token comes in parts.
    """
    if name in load.TABLES:
        return table(checkpoint, name)
    return load.dense(checkpoint, name)


def table(checkpoint: Checkpoint, name: str) -> InParts:
    """One of `load.TABLES` in float32, some rows at a time."""
    shape = arch.tensors_of(checkpoint.config)[name]
    return InParts(("F32", shape), load.dense_parts(checkpoint, name))


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in another type; lazy, part by part where it comes in parts."""
    mlx_dtype = precision.DTYPES[dtype]
    if isinstance(tensor, mx.array):
        return tensor.astype(mlx_dtype)
    return tensor.mapped(
        lambda part: part.astype(mlx_dtype),
        columns=tensor.spec[1][1],
        dtype=SAFETENSORS_NAMES[dtype],
    )


def write_model(
    config: Mapping[str, Any],
    take: Take,
    source: Path,
    out: Path,
    *,
    dtype: str,
    extra: Mapping[str, Any] | None = None,
    file_per_block: bool = False,
) -> None:
    """`write_folder` of the dense model that `take(name)` gives tensor by tensor, cast to `dtype`.

    A tensor in parts goes to disk part by part. file_per_block: one shard for each block, its
    experts not stacked: such a folder is for us alone.
    """

    def type_of(name: str) -> str:
        return "float32" if family(config).always_float32(name) else dtype

    stacked = families.family(config).stacked and not file_per_block
    shapes = arch.tensors_of(config, stacked=stacked)
    specs = {}
    for name, shape in shapes.items():
        specs[name] = (SAFETENSORS_NAMES[type_of(name)], shape)

    def tensor(name: str) -> Tensor:
        own_type = type_of(name)
        taken = [_cast(take(part), own_type) for part in family(config).one_by_one(name)]
        arrays = [part for part in taken if isinstance(part, mx.array)]
        if len(arrays) > 1:
            return mx.stack(arrays)
        return taken[0]

    tensors = ((name, tensor(name)) for name in cli.show_progress("tensor", specs))
    shards = None
    if file_per_block:
        groups = itertools.groupby(specs.items(), lambda item: arch.block_of(item[0]))
        shards = [dict(group) for _, group in groups]
    write_folder(config, specs, tensors, source=source, out=out, extra=extra, shards=shards)


def by_block(source: Checkpoint, folder: Path, dtype: str = "float32") -> Checkpoint:
    """A student to train in parts: an ordinary folder of `dtype` with one file for each block.

    Made of `source` if it is not there yet, then opened; it computes in the same type. A block's
    file is replaced as a whole, so the folder is a model at any moment. Memory: the largest tensor.
    """
    if not folder.exists():
        config = {
            key: value for key, value in source.config.items() if not key.startswith("quantization")
        }
        config["torch_dtype"] = dtype
        write_model(
            config,
            partial(dense, source),
            source.path,
            folder,
            dtype=dtype,
            extra=keep_files(read_keep(source.path)),
            file_per_block=True,
        )
    return load.open_checkpoint(folder, source.precision)


def replace_block(parts: Checkpoint, i: int, weights: Mapping[str, mx.array]) -> None:
    """Replace the weights of block i, durably, by others of the same shapes and type.

    weights: by name without `model.layers.N.`.
    """
    prefix = f"model.layers.{i}."
    old = {name: t for name, t in parts.tensors.items() if name.startswith(prefix)}
    path = next(iter(old.values())).file
    if {name for name, t in parts.tensors.items() if t.file == path} != set(old):
        raise ValueError(f"{path} holds more than block {i}")
    new = {}
    for name in sorted(old, key=lambda name: old[name].offset):
        new[name] = weights[name.removeprefix(prefix)]
        if spec_of(new[name]) != (old[name].dtype, old[name].shape):
            raise ValueError(f"{path}: the new block {i} has other shapes or is of another type")
    nbytes = sum(t.nbytes for t in old.values())
    with (
        as_mis_error(path.parent, f"block {i} of the student", nbytes),
        DISK.replacing(path) as temp,
    ):
        write_arrays(temp, new)
