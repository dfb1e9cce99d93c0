"""Recordings: written whole, read back as they were, refused with a line number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.hardware.thermal.recording import (
    SCHEMA,
    Header,
    Raw,
    Replay,
    from_json,
    recorder,
    to_json,
)
from mis_mlx.types import MisError

DATA = Path(__file__).parents[2] / "data"
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


def replay_of(path: Path) -> tuple[Replay, VirtualClock]:
    clock = VirtualClock()
    return Replay(path, clock), clock


def recording(path: Path, times: list[float]) -> Path:
    with recorder(path, Header()) as add:
        for time_s in times:
            add(Raw(time_s, time_s + 1e9, hid=(("PMU tdie1", 40.0 + time_s),)))
    return path


def test_json_and_back_is_the_same_to_the_bit():
    """Doubles, big integers, False and 0 survive; NaN comes back as NaN through strict JSON."""
    assert from_json(json.loads(json.dumps(to_json(FULL), allow_nan=False))) == FULL
    assert from_json(to_json(Raw(0.0, 0.0))) == Raw(0.0, 0.0)
    odd = from_json(
        json.loads(json.dumps(to_json(Raw(0, 0, hid=(("x", math.nan),))), allow_nan=False))
    )
    assert math.isnan(odd.hid[0][1])


def test_recorder_leaves_nothing_half_made(tmp_path):
    """Under its name only when done; interrupted, it has all lines written so far."""
    path = tmp_path / "a.jsonl"
    with (
        pytest.raises(KeyboardInterrupt),
        recorder(path, Header(model="Mac", altitude_m=832.0)) as add,
    ):
        add(FULL)
        assert not path.exists()
        raise KeyboardInterrupt
    replay, _ = replay_of(path)
    assert (replay.count, replay.header) == (1, Header(model="Mac", altitude_m=832.0))
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_each_look_is_a_new_record_and_moves_the_clock(tmp_path):
    """Looks alone step through the records; a wait skips those that fell due, and takes the
    newest.
    """
    replay, clock = replay_of(recording(tmp_path / "a.jsonl", [100, 110, 120, 130, 140, 150]))
    assert [replay.look().hid[0][1] for _ in range(2)] == [140.0, 150.0]
    assert clock.monotonic() == 10.0
    clock.sleep(25.0)  # 35: the records of 20 and 30 are due
    assert replay.look().hid[0][1] == 170.0
    assert clock.monotonic() == 35.0
    assert [replay.look().mono_s for _ in range(2)] == [40.0, 50.0]
    assert replay.ended
    assert clock.wall() == 1e9 + 150


def test_after_the_end_the_last_values_stay_and_time_goes_on(tmp_path):
    """A recording shorter than the run does not freeze the clock."""
    replay, _ = replay_of(recording(tmp_path / "a.jsonl", [0]))
    looks = [replay.look() for _ in range(3)]
    assert [raw.mono_s for raw in looks] == [0.0, 1.0, 2.0]
    assert {raw.hid for raw in looks} == {(("PMU tdie1", 40.0),)}


HEAD = json.dumps({"schema": SCHEMA})
GOOD = '{"mono_s":1.0,"wall_s":2.0}'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "line 1 does not say"),
        (b"\x89PNG\r\n\x1a\n\x00", "line 1 does not say"),
        (b"[" * 100_000, "line 1 does not say"),
        (b'{"schema": "something else"}\n', "line 1 does not say"),
        (f"{HEAD}\n".encode(), "no record after line 1"),
        (f"{HEAD}\n{GOOD}\n{GOOD[:-5]}".encode(), "line 3 is not a record (not valid JSON"),
        (f"{HEAD}\n{GOOD}\nnonsense\n".encode(), "line 3 is not a record (not valid JSON"),
        (f"{HEAD}\n[1]\n".encode(), "line 2 is not a record (not a JSON object)"),
        (
            f'{HEAD}\n{{"mono_s":"x","wall_s":1}}\n'.encode(),
            "line 2 is not a record (mono_s is 'x'",
        ),
        (
            f'{HEAD}\n{{"mono_s":1e999,"wall_s":1}}\n'.encode(),
            "line 2 is not a record (mono_s is inf",
        ),
        (
            f'{HEAD}\n{{"mono_s":1,"wall_s":1,"hid":[3]}}\n'.encode(),
            "line 2 is not a record (hid is not",
        ),
        (
            f'{HEAD}\n{{"mono_s":1,"wall_s":1,"smc":3}}\n'.encode(),
            "line 2 is not a record (smc is not",
        ),
        (
            f'{HEAD}\n{GOOD}\n{{"mono_s":0.5,"wall_s":2}}\n'.encode(),
            "line 3: the time 0.5 s comes after 1.0",
        ),
        (b'{"schema": "%s", "altitude_m": "high"}\n' % SCHEMA.encode(), "altitude_m is 'high'"),
    ],
)
def test_foreign_and_truncated_files_are_refused_with_the_line(tmp_path, content, sentence):
    """One sentence: file, line, what to do; before any look."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(MisError) as refused:
        replay_of(path)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)
    with pytest.raises(MisError, match="cannot be read"):
        replay_of(tmp_path / "no.jsonl")
