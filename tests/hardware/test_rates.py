"""Rates: measured really, believed for the same device."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from mis_mlx.hardware import rates
from mis_mlx.types import MisError

MIB = 2**20


@pytest.fixture(autouse=True)
def in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is measured, in less time."""
    quickest = rates.quickest
    monkeypatch.setattr(rates, "quickest", lambda work, seconds: quickest(work, 0.05))
    monkeypatch.setattr(rates, "MEMORY_SAMPLE_BYTES", MIB)


@pytest.mark.parametrize("nbytes", [64 * MIB, MIB])
def test_a_file_is_written_read_and_removed(tmp_path: Path, nbytes: int) -> None:
    """Two plausible rates (a floppy to ten times the best SSD), nothing left behind."""
    read, written = rates.disk_bytes(tmp_path, nbytes)
    assert 1e5 < read < 1e11
    assert 1e5 < written < 1e11
    assert not list(tmp_path.iterdir())


def test_a_failed_measurement_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stops answering while it is read: the error passes on, the file is gone."""

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rates.block_reader.Reader, "begin", broken)
    with pytest.raises(OSError, match="Input/output"):
        rates.disk_bytes(tmp_path, MIB)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both numbers; nothing is written where hardly anything is free."""
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:4], 10, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(
        MisError, match="free, but a measurement needs 4.00|free, but a measurement needs 128 MiB"
    ):
        rates.disk_bytes(tmp_path, 512 * MIB)


def test_all_rates_and_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back equal; a model on a CPU is slower than products by a known factor."""
    monkeypatch.setattr(rates, "matmul_flops", lambda: rates.ELEMENTWISE * 1e9)
    found = rates.measure(tmp_path, MIB)
    assert found.source.startswith("measured 20")
    assert not found.gpu
    assert found.hot == 1.0
    assert found.forward_flops_per_s == found.training_flops_per_s == pytest.approx(1e9)
    assert found.memory_bytes_per_s > 1e8
    assert 0 < rates.wait_seconds(10) < 1
    assert 0 < rates.launch_seconds(10) < 1
    path = tmp_path / "rates.json"
    assert rates.load(path) is None
    path.write_text(rates.to_json(found))
    assert rates.load(path) == found
    assert str(found).endswith(f"({found.source})")
    assert "GB/s read" in str(found)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"device": "CPU"}', "null"])
def test_a_file_that_is_not_ours(tmp_path: Path, text: str) -> None:
    """Anything but whole rates of this device counts as no rates."""
    path = tmp_path / "rates.json"
    path.write_text(text)
    assert rates.load(path) is None
    path.write_text(rates.to_json(replace(rates.M1_AIR)))
    assert rates.load(path) is None


def test_without_a_measurement_it_says_so() -> None:
    """Products are measured even then; the rest is called assumed."""
    here = rates.assumed()
    assert "assumed" in here.source
    assert here.device == rates.device_name()
    assert "CPU" in here.device
    assert here.forward_flops_per_s > 1e7
    assert here.read_bytes_per_s == 1e9


def test_a_sample_is_not_cached_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F_NOCACHE before the first byte: macOS would read cached pages back whoever asks."""
    asked = list[tuple[int, int]]()

    def fcntl(fd: int, what: int, *_: int) -> int:
        asked.append((what, os.fstat(fd).st_size))
        return 0

    monkeypatch.setattr(rates.sys, "platform", "darwin")
    monkeypatch.setattr(rates.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(rates.fcntl, "F_FULLFSYNC", 51, raising=False)
    rates._write(tmp_path / "file", bytes(MIB), 3)
    assert asked == [(rates.block_reader.F_NOCACHE, 0), (51, 3 * MIB)]


def test_about_names_no_machine() -> None:
    """Chip, memory, system and versions; no host name."""
    said = rates.about()
    assert said["memory_gib"] > 0
    assert said["mlx"]
    assert said["chip"]
    assert platform.node() not in json.dumps(said)
    assert 1 <= said["cores_used"] <= said["cores"]
