"""Recordings: written whole, strict JSON, read back as they were."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mis_mlx.hardware.thermal.recording import Header, Raw, recorder, to_json
from tests.hardware.recorded import Replay

FULL = Raw(
    mono_s=3.5,
    wall_s=1e9,
    hid=(("PMU tdie1", 42.900001525878906), ("", -9202.86), ("gas gauge battery", 32.5)),
    smc={"TCMz": "flt :33b36b42"},
    linux=(("psutil coretemp", 51.0),),
    pressure=0,
    battery_percent=80.0,
    plugged=False,
    rested=True,
    missing={"SMC": "gone"},
)


def test_recorder_leaves_nothing_half_made(tmp_path: Path) -> None:
    """Under its name only when done; interrupted, it has all looks so far, to the last bit."""
    path = tmp_path / "a.jsonl"
    with (
        pytest.raises(KeyboardInterrupt),
        recorder(path, Header(model="Mac", altitude_m=832.0)) as add,
    ):
        add(FULL)
        assert not path.exists()
        raise KeyboardInterrupt
    replay = Replay(path)
    assert replay.header == Header(model="Mac", altitude_m=832.0)
    assert replay.look() == replace(FULL, mono_s=0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_record_is_strict_json() -> None:
    """NaN becomes null; what a look did not give is left out."""
    odd = to_json(Raw(0.0, 0.0, hid=(("x", math.nan),)))
    assert json.loads(json.dumps(odd, allow_nan=False)) == {
        "mono_s": 0.0,
        "wall_s": 0.0,
        "hid": [["x", None]],
    }
