"""The command `thermal`, each part of it end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mis_mlx.thermal import Settings, run
from mis_mlx.types import MisError
from tests.hardware.recorded import plug_in

DATA = Path(__file__).parent / "data"


def test_doctor_on_a_recording(capsys, monkeypatch):
    """The idle M1 Air: what it has, what is missing, and that AAIS has no T_env."""
    plug_in(monkeypatch, DATA / "m1-air-idle.jsonl")
    found = run(Settings(altitude_m=832.0))
    said = capsys.readouterr().out
    assert "die: 43.6 °C from IOHID PMU2 tdie1" in said
    assert "missing: air outside" in said
    assert "AAIS has no T_env" in said
    assert (found["t_env"], found["model"]) == ("none", "MacBookAir10,1")
    json.dumps(found, allow_nan=False)


def test_doctor_tells_given_from_measured(capsys, monkeypatch):
    """By hand is 'given'; from sensors it is 'measured', with σ and source."""
    plug_in(monkeypatch, DATA / "m1-air-idle.jsonl")
    assert run(Settings(temperature_c=21.0))["t_env"] == "given"
    plug_in(monkeypatch, DATA / "halny.jsonl")
    assert run(Settings())["t_env"] == "measured"
    assert "AAIS has a measured T_env: 8.0 ± 2.5 °C (SMC TVA0)" in capsys.readouterr().out
    assert run(Settings(temperature_c=8.0))["t_env"] == "given"


def test_doctor_on_this_machine(capsys):
    """Whatever this machine is, every value is either shown with a source or missing with a
    reason.
    """
    found = run(Settings(altitude_m=832.0))
    reading = found["reading"]
    for name in ("die_c", "battery_c", "ambient_c", "pressure_level", "power_w", "altitude_m"):
        assert (reading[name] is None) == (name in found["reasons"])
        assert (reading[name] is None) == (name not in reading["sources"])
    assert "a reading takes" in capsys.readouterr().out


def test_record(tmp_path):
    """Every look is there, also where no thermometer answers."""
    path = tmp_path / "here.jsonl"
    result = run(Settings(out=str(path), seconds=0.1, altitude_m=832.0))
    header, *looks = map(json.loads, path.read_text().splitlines())
    assert len(looks) == result["looks"] == 1
    assert header["altitude_m"] == 832.0
    with pytest.raises(MisError, match="--out"):
        run(Settings(seconds=0.1))
