"""The gate against hand-made bad files; `tests/faults/test_liars.py` lies at random."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import lazy
from mis_mlx.types import MisError, TensorAt

GOOD = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def made(header: dict[str, Any] | str | bytes, data: int = 24) -> bytes:
    """A file of this header and `data` bytes of zeros."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + bytes(data)


def one(
    dtype: Any = "F32", shape: Any = (2, 3), span: Any = (0, 24), name: str = "w"
) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": span}}


def two(*spans: tuple[int, int]) -> dict[str, Any]:
    return {
        f"t{i}": {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
        for i, (a, b) in enumerate(spans)
    }


TEXT = json.dumps(GOOD["w"])
WHOLE = made(GOOD)
BAD = {
    "empty": b"",
    "seven bytes": WHOLE[:7],
    "eight bytes": WHOLE[:8],
    "cut in the header": WHOLE[:40],
    "cut in the data": WHOLE[:-1],
    "no data": WHOLE[:-24],
    "junk at the end": WHOLE + b"x",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + WHOLE[8:],
    "header of 2^64-1 bytes": struct.pack("<Q", 2**64 - 1) + WHOLE[8:],
    "header longer than allowed": struct.pack("<Q", 100_000_001) + WHOLE[8:],
    "empty header": made(b"", 0),
    "space before the header": made(" " + json.dumps(GOOD)),
    "list": made("[1]", 0),
    "text after the JSON": made(json.dumps(GOOD) + "{}"),
    "not UTF-8": made(b'{"\xff": 1}'),
    "half a surrogate pair": made('{"\\ud800": ' + TEXT + "}"),
    "nested too deeply": made('{"a":' * 100_000, 0),
    "NaN": made('{"w": NaN}'),
    "same name, same bytes": made('{"w": ' + TEXT + ', "w": ' + TEXT + "}"),
    "same key inside": made(
        '{"w": {"dtype": "F32", "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
    ),
    "metadata not text": made({"__metadata__": {"a": 1}, **GOOD}),
    "metadata a list": made({"__metadata__": [], **GOOD}),
    "entry not an object": made({"w": 3}),
    "entry without shape": made({"w": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "unknown dtype": made(one("F7")),
    "F64, which MLX does not read": made(one("F64", [3])),
    "dtype a list": made(one(["F32"])),
    "dimension -1, span wraps": made(one(shape=[-1], span=[0, 2**64 - 4]), 1 << 20),
    "dimensions -2 -2": made(one(shape=[-2, -2], span=[0, 16]), 16),
    "65536 four times wraps to 0": made(one(shape=[65536] * 4, span=[0, 0]), 0),
    "dimension 2^32+2": made(one(shape=[2**32 + 2], span=[0, 8]), 8),
    "dimension 2.5": made(one(shape=[2.5], span=[0, 8]), 8),
    "dimension true": made(one(shape=[True], span=[0, 4]), 4),
    "rank 9": made(one(shape=[1] * 9, span=[0, 4]), 4),
    "shape a number": made(one(shape=6)),
    "shape of 10^5000": made(
        '{"w": {"dtype": "U8", "shape": [1' + "0" * 5000 + '], "data_offsets": [0, 0]}}', 0
    ),
    "offsets reversed": made(one(span=[24, 0])),
    "three offsets": made(one(span=[0, 24, 24])),
    "offsets negative": made(one(span=[-24, 0])),
    "offsets wrap": made(one(span=[2**64 - 24, 2**64])),
    "offsets as text": made(one(span=["0", "24"])),
    "shape and span differ": made(one(span=[0, 23]), 23),
    "hole": made(two((0, 8), (16, 24))),
    "hole at the start": made(two((8, 24))),
    "overlap": made(two((0, 16), (8, 24))),
    "bomb: 2000 tensors on the same bytes": made({f"t{i}": one()["w"] for i in range(2000)}),
    "name of 513 letters": made(one(name="n" * 513)),
    "NUL in the name": made(one(name="a\0b")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name_before_mlx_sees_them(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that begins with the file; `lazy` refuses too, without one mx.load."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(MisError) as caught:
        check(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    loaded: list[str] = []
    monkeypatch.setattr(mx, "load", loaded.append)
    with pytest.raises(MisError):
        lazy({"w": TensorAt(file=path, dtype="F32", shape=(2, 3), offset=8, nbytes=24)}, ["w"])
    assert loaded == []


def test_what_is_not_a_regular_file_is_refused_and_never_hangs(tmp_path: Path) -> None:
    """A pipe (open() would wait for ever), a device, a folder, a dangling link, nothing at all."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "device", "folder", "dangling", "missing"):
        with pytest.raises(MisError, match=r"not a regular file|cannot be read"):
            check(tmp_path / name)


def test_a_good_file_is_described_to_the_byte(tmp_path: Path) -> None:
    """Offsets count from the start of the file: the bytes there are the tensor's. Cut short, both
    numbers are said.
    """
    path = tmp_path / "model.safetensors"
    text = json.dumps({"__metadata__": {"format": "mlx"}, **GOOD})
    path.write_bytes(made(text, 0) + bytes(range(24)))
    tensors, metadata = check(path)
    assert tensors == {
        "w": TensorAt(file=path, dtype="F32", shape=(2, 3), offset=8 + len(text), nbytes=24)
    }
    assert metadata == {"format": "mlx"}
    assert path.read_bytes()[tensors["w"].offset :][:24] == bytes(range(24))
    os.truncate(path, len(text) + 22)
    with pytest.raises(MisError, match=f"incomplete, {len(text) + 22} of {len(text) + 32} bytes"):
        check(path)
