"""The command `thermal`, each part of it end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.hardware.thermal.recording import Replay as Recording
from mis_mlx.thermal import Doctor, Record, Replay, run
from mis_mlx.types import MisError

DATA = Path(__file__).parent / "data"


def test_replay(capsys):
    """One JSON line a change of mind; six tea breaks in virtual time."""
    summary = run(Replay(DATA / "halny.jsonl"))
    changes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [change["action"] for change in changes] == ["run", *["pause", "run"] * 6]
    assert (summary["tea_breaks"], summary["end"]) == (6, "run")


def test_a_foreign_file_is_one_sentence(tmp_path):
    """Exit code 1, file and line on stderr, no traceback."""
    command = [sys.executable, "-m", "mis_mlx.thermal", "replay", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 1
    assert "test_thermal.py line 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_on_a_recording(capsys):
    """The idle M1 Air: what it has, what is missing, and that AAIS has no T_env."""
    found = run(Doctor(thermal_replay=DATA / "m1-air-idle.jsonl", altitude_m=832.0))
    said = capsys.readouterr().out
    assert "die: 43.6 °C from replay IOHID PMU2 tdie1" in said
    assert "missing: air outside" in said
    assert "AAIS has no T_env" in said
    assert (found["t_env"], found["model"]) == ("none", "MacBookAir10,1")
    json.dumps(found, allow_nan=False)


def test_doctor_tells_given_from_measured(capsys):
    """By hand is 'given'; from the recording's sensors it is 'measured', with σ and source."""
    assert (
        run(Doctor(thermal_replay=DATA / "m1-air-idle.jsonl", temperature_c=21.0))["t_env"]
        == "given"
    )
    assert run(Doctor(thermal_replay=DATA / "halny.jsonl"))["t_env"] == "measured"
    assert "AAIS has a measured T_env: 8.0 ± 2.5 °C (replay SMC TVA0)" in capsys.readouterr().out
    assert run(Doctor(thermal_replay=DATA / "halny.jsonl", temperature_c=8.0))["t_env"] == "given"


def test_doctor_on_this_machine(capsys):
    """Whatever this machine is, every value is either shown with a source or missing with a
    reason.
    """
    found = run(Doctor(altitude_m=832.0))
    reading = found["reading"]
    for name in ("die_c", "battery_c", "ambient_c", "pressure_level", "power_w", "altitude_m"):
        assert (reading[name] is None) == (name in found["reasons"])
        assert (reading[name] is None) == (name not in reading["sources"])
    assert "a reading takes" in capsys.readouterr().out


def test_record_and_replay_of_it(tmp_path):
    """What `record` writes, `replay` reads, also where no thermometer answers."""
    path = tmp_path / "here.jsonl"
    result = run(Record(path, seconds=0.1, every_s=0.02, altitude_m=832.0))
    recording = Recording(path, VirtualClock())
    assert recording.count == result["looks"] >= 2
    assert recording.header.altitude_m == 832.0
    assert run(Replay(path))["tea_breaks"] == 0


def test_record_refuses_before_it_starts(tmp_path):
    """A file that exists is kept; a pace of 0 is a sentence."""
    path = tmp_path / "mine.jsonl"
    path.write_text("precious")
    with pytest.raises(MisError, match="mine.jsonl exists already: choose another name"):
        run(Record(path, seconds=0.1))
    assert path.read_text() == "precious"
    with pytest.raises(MisError, match="--every-s"):
        run(Record(tmp_path / "new.jsonl", every_s=0.0))
    with pytest.raises(MisError, match="--step-s"):
        run(Replay(DATA / "halny.jsonl", step_s=0.0))
