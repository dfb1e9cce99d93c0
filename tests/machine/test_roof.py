"""The roof: measured really, kept with the device and threads it is of, and what it bounds, by pencil."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mis_mlx.machine import about, rates, roof
from mis_mlx.machine.roof import Roof

AT = Roof("d", "t", 10e9, 100e9, "given")


def test_the_longer_of_two() -> None:
    """1 GB at 10 GB/s takes 0.1 s, 20 GFLOP at 100 take 0.2 s; they overlap."""
    assert AT.seconds(1e9, 20e9) == pytest.approx(0.2)
    assert AT.seconds(1e9, 5e9) == pytest.approx(0.1)
    assert (AT.bound(1e9, 20e9), AT.bound(1e9, 5e9)) == ("arithmetic", "memory bandwidth")


def test_measured_here_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive rates; the file gives the same back, and nothing on another device, of other threads, or broken."""
    monkeypatch.setattr(roof, "SAMPLE_BYTES", 2**20)
    found = roof.measure()
    assert found.memory_bytes_per_s > 1e8 and found.flops_per_s > 1e8
    path = tmp_path / "roof.json"
    assert roof.load(path) is None
    path.write_text(rates.to_json(found))
    assert roof.load(path) == found
    for field in ("device", "threads"):
        path.write_text(json.dumps({**json.loads(rates.to_json(found)), field: "another"}))
        assert roof.load(path) is None
    path.write_text("{")
    assert roof.load(path) is None


def test_about_names_no_machine() -> None:
    """Chip, memory, system and versions; no host name."""
    import platform

    said = about.about()
    assert said["memory_gib"] > 0 and said["mlx"] and said["chip"]
    assert platform.node() not in json.dumps(said)
    assert 1 <= said["cores_used"] <= said["cores"]
