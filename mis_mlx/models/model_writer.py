"""Write a model's folder: weights tensor by tensor, its tokenizer, and what says how it was pruned
(`keep.json`).
"""

import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.models import arch, experts, families, load, policy, tokenizer_check
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import Files, reported
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

KEEP = "keep.json"
ROTATION = "rotation.npy"
Take = Callable[[str], Tensor]  # a model's tensor by its name
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def need_tokenizer(folder: Path) -> None:
    """MisError when the folder has no tokenizer that could go along."""
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise MisError(
            f"{folder} has no tokenizer: copy the tokenizer files of the model it was made from"
        )


def keep_files(keep: KeptUnits | None) -> dict[str, Any]:
    """The files that hold kept units, for `write_model`: keep.json, and rotation.npy where the
    stream was rotated.

    keep.json: {layers, kept: {"layer/space": indices}, why, report, rotated: true where there is a
    basis}.
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
    """The `KeptUnits` beside a pruned model, None without them. The basis stays on disk until it is
    used.
    """
    path = folder / KEEP
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    kept = {(int(k.split("/")[0]), k.split("/")[1]): tuple(v) for k, v in saved["kept"].items()}
    basis = _basis(folder / ROTATION, len(kept[-1, "hidden"])) if saved.get("rotated") else None
    return KeptUnits(tuple(saved["layers"]), kept, saved["why"], saved["report"], basis)


def _basis(path: Path, channels: int) -> np.ndarray:
    try:
        basis = np.load(path, mmap_mode="r", allow_pickle=False)
        if basis.ndim != 2 or basis.shape[1] != channels or basis.dtype != np.float32:
            raise ValueError(
                f"it holds {basis.dtype} {list(basis.shape)}, the model has {channels} channels"
            )
    except (OSError, EOFError, ValueError) as error:
        raise MisError(
            f"{path} is not this model's rotation ({str(error)[:120]}): prune the teacher again"
        ) from None
    return basis


def write_folder(
    config: Mapping[str, Any],
    specs: Specs,
    tensors: Named,
    source: Path,
    out: Path,
    files: Files,
    extra: Mapping[str, Any] | None = None,
    shards: Sequence[Specs] | None = None,
) -> None:
    """Commit the new folder `out`: `tensors` as `specs` foretell them, config.json, the tokenizer
    files of `source`.

    extra: more files by name: bytes as they are, all else as JSON. shards: as of `write_tensors`.
    """
    with protocol.commit_folder(out, files, sum(map(spec_bytes, specs.values()))) as folder:
        write_tensors(folder, specs, tensors, files, shards)
        files.write(folder / "config.json", json.dumps(dict(config), indent=2).encode())
        for name, value in (extra or {}).items():
            files.write(
                folder / name, value if isinstance(value, bytes) else json.dumps(value).encode()
            )
        for path in list(tokenizer_check.present(source)):  # judges all before one is copied
            files.write(folder / path.name, path.read_bytes())


def dense(checkpoint: Checkpoint, name: str) -> Tensor:
    """A checkpoint's tensor for `write_model`: `load.dense`, the table of per-layer inputs in
    parts.
    """
    if name != f"{arch.PER_LAYER}weight":
        return load.dense(checkpoint, name)
    shape = arch.tensors_of(checkpoint.config)[name]
    return InParts(("F32", shape), load.dense_parts(checkpoint, name, "float32"))


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    kind = policy.DTYPES[dtype]
    if isinstance(tensor, mx.array):
        return tensor.astype(kind)
    return InParts(
        (SAFETENSORS_NAMES[dtype], tensor.spec[1]), (part.astype(kind) for part in tensor.parts)
    )


def write_model(
    config: Mapping[str, Any],
    take: Take,
    source: Path,
    out: Path,
    dtype: str,
    files: Files,
    extra: Mapping[str, Any] | None = None,
    file_per_block: bool = False,
) -> None:
    """`write_folder` of the dense model that `take(name)` gives tensor by tensor, cast to `dtype`.
    What it gives in parts goes to disk part by part.
    """
    # parts are for us alone
    shapes = arch.tensors_of(config, families.family(config).stacked and not file_per_block)
    specs = {name: (SAFETENSORS_NAMES[dtype], dims) for name, dims in shapes.items()}

    def whole(name: str) -> Tensor:
        taken = [_cast(take(one), dtype) for one in experts.one_by_one(name, config)]
        parts = [one for one in taken if isinstance(one, mx.array)]
        return mx.stack(parts) if len(parts) > 1 else taken[0]

    tensors = ((name, whole(name)) for name in cli.counted("tensor", specs, len(specs)))
    by_block = itertools.groupby(specs.items(), lambda item: arch.block_of(item[0]))
    shards = [dict(group) for _, group in by_block] if file_per_block else None
    write_folder(config, specs, tensors, source, out, files, extra, shards)


def by_block(source: Checkpoint, folder: Path, files: Files, dtype: str = "float32") -> Checkpoint:
    """A student to train in parts: an ordinary folder of `dtype` with one file per block, replaced
    whole, so that it is a model at any moment. Opened; made of `source` first if it is not there.
    Memory: the largest tensor.
    """
    if not folder.exists():
        config = {k: v for k, v in source.config.items() if not k.startswith("quantization")}
        config["torch_dtype"] = dtype
        extra = keep_files(read_keep(source.path))
        write_model(config, partial(dense, source), source.path, folder, dtype, files, extra, True)
    return load.open_checkpoint(folder)


def replace_block(parts: Checkpoint, i: int, weights: Mapping[str, mx.array], files: Files) -> None:
    """Put new `weights` (names without `model.layers.N.`), of the same kind, in the place of block
    i's, durably.
    """
    prefix = f"model.layers.{i}."
    old = {name: t for name, t in parts.tensors.items() if name.startswith(prefix)}
    path = next(iter(old.values())).file
    new = {
        name: weights[name.removeprefix(prefix)]
        for name in sorted(old, key=lambda n: old[n].offset)
    }
    if {n for n, t in parts.tensors.items() if t.file == path} != set(old):
        raise ValueError(f"{path} holds more than block {i}")
    if any(spec_of(array) != (old[name].dtype, old[name].shape) for name, array in new.items()):
        raise ValueError(f"{path}: the new block {i} has other shapes or is of another type")
    nbytes = sum(t.nbytes for t in old.values())
    with reported(path.parent, f"block {i} of the student", nbytes), files.replacing(path) as temp:
        write_arrays(temp, new, files)
