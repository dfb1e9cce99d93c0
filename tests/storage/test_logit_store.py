"""The logit store: what comes back, what is refused. `tests/faults` stops it at any operation."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.storage import logit_store
from mis_mlx.storage.logit_store import Spec, Targets
from mis_mlx.types import MisError
from tests.faults.broken import breaking
from tests.storage.test_checkpoint import flip, names

FROM: dict[str, Any] = {"data": "d", "seed": 0, "top": 0}
SAMPLED = Spec(count=6, vocab=512, windows=10, length=5, part_windows=3, teacher="t" * 64, **FROM)
FILES = [*(f"part-0000{number}.safetensors" for number in range(4)), "targets.json"]


def made(spec: Spec, window: int) -> dict[str, np.ndarray]:
    """Targets of one window, a function of its number."""
    random = np.random.default_rng([window, spec.seed])
    drawn = random.integers(0, spec.vocab, (spec.length, spec.count)) // 7
    parts = [np.unique(row, return_counts=True) for row in drawn]
    ids, counts = (np.concatenate(p) for p in zip(*parts, strict=True))
    return {
        "sizes": np.array([len(i) for i, _ in parts]),
        "ids": ids,
        "shares": counts / spec.count,
    }


def fill(folder: Path, spec: Spec = SAMPLED) -> Targets:
    """The whole store, or what is missing of it."""
    store = logit_store.create(folder, spec)
    for window in store.missing():
        store.put(window, made(spec, window))
    return store


def opened(folder: Path) -> Targets:
    """A store to read, as it lies on disk, finished or not."""
    return Targets(folder, *logit_store._manifest(folder))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sampled_targets_come_back(tmp_path: Path) -> None:
    """Ids and counts / N of every position, in any order of windows; filled up with 0."""
    fill(tmp_path / "t")
    ids, weights = opened(tmp_path / "t").windows([9, 0, 4, 0])
    assert ids.shape == weights.shape == (4, 5, weights.shape[2])
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    for row, window in enumerate([9, 0, 4, 0]):
        want = made(SAMPLED, window)
        full = weights[row] > 0
        assert np.array_equal(full.sum(axis=1), want["sizes"])
        assert (np.diff(full.astype(int)) <= 0).all()
        assert np.array_equal(ids[row][full], want["ids"])
        np.testing.assert_allclose(weights[row][full], want["shares"], rtol=1e-7)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("vocab", "count"), [(2**16, 255), (2**16 + 1, 255), (150_000, 300)])
def test_types_are_as_narrow_as_they_can_be(tmp_path: Path, vocab: int, count: int) -> None:
    """Ids up to the last of the vocabulary and counts up to N come back; bytes a token by pencil.

    One token a position: its size, its id and its share are 1 + 2 + 4 bytes, up to 2 + 4 + 4.
    """
    spec = Spec(count=count, vocab=vocab, windows=1, length=4000, teacher="t", **FROM)
    store = logit_store.create(tmp_path, spec)
    store.put(0, {"sizes": np.ones(4000), "ids": np.full(4000, vocab - 1), "shares": np.ones(4000)})
    ids, weights = store.windows([0])
    assert (ids == vocab - 1).all()
    assert (weights == 1).all()
    small = 1 if count < 256 else 2
    wide = 2 if vocab <= 2**16 else 4
    # the header is 300 bytes
    assert store.bytes_per_token == pytest.approx(small + wide + 4, abs=0.1)


def test_a_finished_store_is_not_written_again(tmp_path: Path) -> None:
    """Opened a second time: nothing is missing, no operation but the sweep touches it."""
    fill(tmp_path / "t")
    with breaking(1, errno.EIO):  # its first operation would fail
        again = fill(tmp_path / "t")
    assert again.missing() == []
    assert again.notes == []


def test_other_targets_are_refused_and_untouched(tmp_path: Path) -> None:
    """Of another N or teacher: one sentence with both; the folder stays as it was. Impossible N: no
    folder is made.
    """
    fill(tmp_path / "t")
    before = bytes_of(tmp_path / "t")
    others = {
        "count": (5, r"count \(6, not 5\)"),
        "teacher": ("x" * 64, r"teacher \(tttttttttttt, not xxxxxxxxxxxx\)"),
    }
    for name, (value, what) in others.items():
        with pytest.raises(MisError, match=f"another {what}: delete it, or choose another folder"):
            logit_store.create(tmp_path / "t", replace(SAMPLED, **{name: value}))
    for count in (0, 2**16):
        with pytest.raises(MisError, match="choose 1 to"):
            logit_store.create(tmp_path / "new", replace(SAMPLED, count=count))
    assert bytes_of(tmp_path / "t") == before
    assert names(tmp_path) == ["t"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "cut": lambda path: os.truncate(path, 100),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": lambda path: path.unlink(),
    "of another store": lambda path: path.write_bytes(
        path.with_name("part-00000.safetensors").read_bytes()
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_part_is_refused_by_readers_and_made_again_by_writers(
    tmp_path: Path, case: str
) -> None:
    """The reader names it; the writer redoes it alone, says so, and the bytes are those it had."""
    fill(tmp_path)
    before = bytes_of(tmp_path)
    DAMAGE[case](tmp_path / "part-00001.safetensors")
    with pytest.raises(
        MisError, match=r"part-00001.safetensors is damaged: write the targets again"
    ):
        opened(tmp_path).windows([4])
    store = logit_store.create(tmp_path, SAMPLED)
    assert store.missing() == [3, 4, 5]
    assert store.notes == ["part-00001.safetensors of the targets is damaged: it is made again"]
    fill(tmp_path)
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["", "[]", '{"parts": 3}', '{"kind": "sampled", "parts": {}}', "\xff"]
)
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, text: str) -> None:
    """Never a traceback, and nothing is deleted."""
    fill(tmp_path)
    (tmp_path / "targets.json").write_bytes(text.encode("latin-1"))
    for use in (lambda: opened(tmp_path), lambda: logit_store.create(tmp_path, SAMPLED)):
        with pytest.raises(MisError, match="is damaged: delete"):
            use()
    assert names(tmp_path) == FILES


def test_reading_holds_a_few_parts(tmp_path: Path) -> None:
    """40 parts of 26 KB, all windows read one by one: never more than 6 parts' bytes are alive at
    once.

    Four are kept, one is being read, and one is for what is handed out and Python's own.
    """
    spec = Spec(count=50, vocab=512, windows=320, length=250, part_windows=8, teacher="t", **FROM)
    store = logit_store.create(tmp_path, spec)
    ids = np.tile(np.arange(4), 250)
    window = {"sizes": np.full(250, 4), "ids": ids, "shares": np.full(1000, 0.25)}
    for number in range(320):
        store.put(number, window)
    reader = opened(tmp_path)
    part = store.parts[0]["bytes"]
    tracemalloc.start()
    try:
        for number in range(320):
            reader.windows([number])
        assert tracemalloc.get_traced_memory()[1] < 6 * part < 40 * part
    finally:
        tracemalloc.stop()
