"""Whatever the layout, the files' bytes arrive; what cannot be read is one sentence."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.storage import block_reader
from mis_mlx.storage.block_reader import GAP, PAGE, PIECE, Layout, Reader
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import write_arrays
from mis_mlx.types import MisError, TensorAt

BOTH = pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])


def written(path: Path, sizes: Mapping[str, int], seed: int = 0) -> dict[str, TensorAt]:
    """A file of random bytes: tensors of these sizes, in this order."""
    random = np.random.default_rng(seed)
    write_arrays(
        path,
        {n: mx.array(random.integers(0, 256, size, np.uint8)) for n, size in sizes.items()},
    )
    return check(path)[0]


def on_disk(t: TensorAt) -> bytes:
    return t.file.read_bytes()[t.offset : t.offset + t.nbytes]


def load(
    source: Reader, tensors: Mapping[str, TensorAt], into: memoryview | None = None
) -> dict[str, bytes]:
    """All tensors through one buffer that begins at a page, as a block of a model is read."""
    where = Layout(tensors)
    view = memoryview(mmap.mmap(-1, where.nbytes or PAGE)) if into is None else into
    wanted = [(file, begin, end, view[at:until]) for file, begin, end, at, until in where.extents]
    source.begin(wanted)()
    return {
        name: bytes(view[where.offsets[name] : where.offsets[name] + t.nbytes])
        for name, t in tensors.items()
    }


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_any_layout_gives_the_bytes_of_the_files(tmp_path: Path, seed: int, direct: bool) -> None:
    """Several files, some tensors left out, sizes from 0 to over a gap, at any remainder."""
    random = np.random.default_rng(seed)
    tensors: dict[str, TensorAt] = {}
    for f in range(random.integers(1, 4)):
        sizes = {
            f"{f}.{i}": int(random.choice([0, 1, 3, 4095, 4096, 5000, GAP - 1, GAP + 5000]))
            for i in range(9)
        }
        tensors |= written(tmp_path / f"{f}.safetensors", sizes, seed)
    chosen = random.permutation(sorted(tensors))[: random.integers(1, len(tensors) + 1)]
    some = {str(n): tensors[str(n)] for n in chosen}
    source = Reader(tensors, direct)
    assert load(source, some) == {name: on_disk(t) for name, t in some.items()}
    assert source.nbytes == sum(end - begin for _, begin, end, *_ in Layout(some).extents)


def test_neighbours_are_read_at_once_and_far_ones_apart() -> None:
    """A gap of 64 KiB is read along, one byte more is not; another file is another extent."""
    a = Path("a")
    b = Path("b")

    def at(file: Path, offset: int, nbytes: int) -> TensorAt:
        return TensorAt(file=file, dtype="U8", shape=(nbytes,), offset=offset, nbytes=nbytes)

    near = 4200 + GAP
    far = 4200 + 10 + GAP + GAP + 1
    found = Layout(
        {"x": at(a, 4100, 100), "z": at(a, far, 5000), "y": at(a, near, 10), "w": at(b, 7, 1)}
    )
    assert found.extents == [
        (a, 4096, near + 10, 0, 17 * PAGE),
        (a, far // PAGE * PAGE, far + 5000, 17 * PAGE, 19 * PAGE),
        (b, 0, 8, 19 * PAGE, 20 * PAGE),
    ]
    assert found.offsets == {
        "x": 4,
        "y": near - 4096,
        "z": 17 * PAGE + far % PAGE,
        "w": 19 * PAGE + 7,
    }
    assert found.nbytes == 20 * PAGE
    assert Layout({}).nbytes == 0


@BOTH
def test_what_is_longer_than_a_piece(tmp_path: Path, direct: bool) -> None:
    """Two pieces and a rest, at an odd offset."""
    tensors = written(tmp_path / "big.safetensors", {"head": 13, "big": 2 * PIECE + 12345})
    assert load(Reader(tensors, direct), tensors) == {
        name: on_disk(t) for name, t in tensors.items()
    }


def test_direct_reading_falls_back_where_the_file_system_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with EINVAL, as in memory, it reads through the page cache; others are errors."""
    tensors = written(tmp_path / "m.safetensors", {"a": 9000})
    opened = []
    real = os.open
    flag = 1 << 30
    source = Reader(tensors, direct=True)

    def refuse(path: Path, flags: int, *more: int) -> int:
        opened.append(bool(flags & flag))
        if flags & flag:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "O_DIRECT", flag, raising=False)
    monkeypatch.setattr(block_reader.os, "open", refuse)
    number = errno.EINVAL
    view = memoryview(mmap.mmap(-1, 4 * PAGE))
    source.begin([(tensors["a"].file, 0, 9000, view[: 3 * PAGE])])()
    assert opened == [True, False]
    number = errno.EIO
    with pytest.raises(MisError, match=r"m\.safetensors cannot be read \(.*\): check the disk"):
        source.begin([(tensors["a"].file, 0, 9000, view[: 3 * PAGE])])()


@BOTH
@pytest.mark.parametrize("change", ["touched", "replaced", "grown"])
def test_a_file_that_changed_is_refused(tmp_path: Path, change: str, direct: bool) -> None:
    """Written to, replaced by a rename, or longer: never two halves of different models; nor an
    older table of it.
    """
    path = tmp_path / "m.safetensors"
    tensors = written(path, {"a": 9000})
    source = Reader(tensors, direct)
    assert load(source, tensors)
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "grown":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        os.replace(shutil.copyfile(path, tmp_path / "new"), path)
    with pytest.raises(MisError, match=r"m\.safetensors changed while it was in use: start again"):
        load(source, tensors)
    path.unlink()
    written(path, {"b": 9000, "a": 9000})
    with pytest.raises(MisError, match="changed since it was checked"):
        Reader(tensors)


@BOTH
def test_a_file_that_ends_early_and_one_that_is_gone(tmp_path: Path, direct: bool) -> None:
    """How many bytes are missing is said; the good file beside it is read to the end first."""
    tensors = written(tmp_path / "m.safetensors", {"a": 9000}) | written(
        tmp_path / "n.safetensors", {"b": 9000}
    )
    source = Reader(tensors, direct)
    end = tensors["a"].offset + 9000
    view = memoryview(mmap.mmap(-1, 8 * PAGE))
    with pytest.raises(MisError, match=r"m\.safetensors ends 30 bytes early"):
        source.begin([(tensors["a"].file, 0, end + 30, view[: 3 * PAGE])])()
    (tmp_path / "m.safetensors").unlink()
    both = [
        (tensors[n].file, 0, end, view[k * 3 * PAGE : (k + 1) * 3 * PAGE])
        for k, n in enumerate(("a", "b"))
    ]
    with pytest.raises(MisError, match=r"m\.safetensors cannot be read \(No such file"):
        source.begin(both)()
    t = tensors["b"]
    assert bytes(view[3 * PAGE + t.offset : 3 * PAGE + t.offset + 9000]) == on_disk(t)
