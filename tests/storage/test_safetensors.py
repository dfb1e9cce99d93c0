"""Model folders, lazy reading and the streaming writer, against MLX and the reference package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from mis_mlx.storage.safetensors import (
    INDEX,
    index,
    lazy,
    spec_of,
    split_into_shards,
    write_arrays,
    write_tensors,
)
from mis_mlx.types import MisError


def arrays() -> dict[str, mx.array]:
    """Every dtype and every layout in memory that a model or an optimizer may hand over."""
    x = mx.arange(24, dtype=mx.float32).reshape(4, 6) / 7
    return {
        "three.bools": mx.array([True, False, True]),  # 3 bytes: what follows is not aligned
        "plain": x,
        "transposed": x.T,
        "rows": x[1:3],
        "columns": x[:, 2:4],
        "reversed": x[::-1],
        "broadcast": mx.broadcast_to(x[0], (5, 6)),
        "bf16": x.astype(mx.bfloat16).T,
        "f16": x.astype(mx.float16),
        "packed": mx.array([1, 2**32 - 1], dtype=mx.uint32),
        "u64": mx.array([2**62 + 1], dtype=mx.uint64),
        "i8": mx.array([-128, 127], dtype=mx.int8),
        "empty": mx.zeros((0, 3)),
        "step": mx.array(7, dtype=mx.int64),
        "scalar.bf16": mx.array(1.5, dtype=mx.bfloat16),
    }


def write_model(folder: Path, content: dict[str, mx.array], shard_bytes: int = 2**30) -> None:
    folder.mkdir()
    specs = {n: spec_of(a) for n, a in content.items()}
    write_tensors(
        folder,
        specs,
        tensors=content.items(),
        shards=split_into_shards(specs, shard_bytes),
    )


def assert_same(found: dict[str, Any], want: dict[str, mx.array]) -> None:
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert mx.array_equal(found[name], array).item(), name


@pytest.mark.parametrize("shard_bytes", [2**30, 100, 1])
def test_what_is_written_is_read_back_equal(tmp_path: Path, shard_bytes: int) -> None:
    """Bit for bit, in one file or several; by `lazy`, by mx.load and by the reference."""
    want = arrays()
    write_model(tmp_path / "m", want, shard_bytes)
    tensors = index(tmp_path / "m")
    assert_same(lazy(tensors, tensors), want)
    direct: dict[str, mx.array] = {}
    for path in sorted((tmp_path / "m").glob("*.safetensors")):
        loaded: Any = mx.load(str(path))
        direct.update(loaded)
        with safe_open(path, framework="numpy") as reference:
            assert reference.metadata() == {"format": "mlx"}
            for name in reference.keys():  # noqa: SIM118 - no mapping, it only has keys()
                assert tuple(reference.get_slice(name).get_shape()) == want[name].shape
                if want[name].dtype != mx.bfloat16:
                    assert reference.get_tensor(name).tolist() == want[name].tolist()
    assert_same(direct, want)


def test_shards_are_named_cut_and_counted(tmp_path: Path) -> None:
    """Two tensors fit a shard, a big one is alone; the index adds up, names sorted."""
    content = {"z": mx.zeros(4), "a": mx.zeros(4), "big": mx.zeros(100), "last": mx.zeros(1)}
    write_model(tmp_path / "m", content, shard_bytes=32)
    one, two, three = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    written = json.loads((tmp_path / "m" / INDEX).read_text())
    assert written["metadata"] == {"total_size": 436, "total_parameters": 109}
    assert list(written["weight_map"].items()) == [
        ("a", one),
        ("big", two),
        ("last", three),
        ("z", one),
    ]
    # A uint32 holds several weights: rather no number of parameters than a wrong one.
    write_model(
        tmp_path / "q", {"a": mx.zeros(4, dtype=mx.uint32), "b": mx.zeros(4)}, shard_bytes=16
    )
    assert json.loads((tmp_path / "q" / INDEX).read_text())["metadata"] == {"total_size": 32}


def test_a_model_is_written_with_a_few_tensors_in_memory(tmp_path: Path) -> None:
    """Sixteen of 4 MiB, made as they are due: never more than three of them are alive."""
    specs = {f"t{i}": ("BF16", (2048, 1024)) for i in range(16)}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    made = ((name, mx.full((2048, 1024), i, dtype=mx.bfloat16)) for i, name in enumerate(specs))
    write_tensors(tmp_path, specs, tensors=made, shards=split_into_shards(specs, 10 * 2**20))
    assert mx.get_peak_memory() - before <= 3 * 4 * 2**20
    assert sum(at.nbytes for at in index(tmp_path).values()) == 64 * 2**20


def test_lazy_takes_only_what_was_asked_for(tmp_path: Path) -> None:
    """Two of fifteen; a name that is not there is a sentence."""
    write_model(tmp_path / "m", arrays(), 100)
    tensors = index(tmp_path / "m")
    assert list(lazy(tensors, ["plain", "step"])) == ["plain", "step"]
    with pytest.raises(MisError, match="no tensor lm_head"):
        lazy(tensors, ["lm_head"])


def test_lazy_notices_that_a_file_changed_since_the_index(tmp_path: Path) -> None:
    """Another tensor under the same name is refused; the arrays of before keep their values."""
    write_model(tmp_path / "m", {"w": mx.zeros(4)})
    tensors = index(tmp_path / "m")
    before = lazy(tensors, ["w"])["w"]
    write_arrays(tmp_path / "other", {"w": mx.ones(5)})
    os.replace(tmp_path / "other", tmp_path / "m" / "model.safetensors")
    with pytest.raises(MisError, match="changed since it was checked"):
        lazy(tensors, ["w"])
    assert before.tolist() == [0.0] * 4


def test_links_into_a_hugging_face_cache_pass(tmp_path: Path) -> None:
    """The layout of the cache: snapshots/<revision>/model.safetensors -> ../../blobs/<hash>."""
    cache = tmp_path / "models--someone--small"
    (cache / "blobs").mkdir(parents=True)
    write_arrays(cache / "blobs" / "abc", {"w": mx.ones(3)})
    snapshot = cache / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    tensors = index(snapshot)
    assert lazy(tensors, ["w"])["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "weights.npz", "model.gguf", "weights.safetensors", "README.md"]
)
def test_folders_without_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    """Unsafe and foreign formats by their names; the files are not opened. So is no folder."""
    (tmp_path / name).write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(MisError):
        index(tmp_path)
    with pytest.raises(MisError, match="nowhere"):
        index(tmp_path / "nowhere")
