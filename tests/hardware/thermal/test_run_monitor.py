"""The weather of a run: its log, where T_env came from, tea breaks in virtual time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mis_mlx import sft
from mis_mlx.hardware.thermal.governor import Mode
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags, ThermalMonitor
from mis_mlx.runs.run_loop import open_model
from mis_mlx.types import MisError, Reading, Step
from tests.hardware.recorded import VirtualClock, plug_in

HALNY = Path(__file__).parents[2] / "data" / "halny.jsonl"


def step(number: int) -> Step:
    """A step of one second."""
    facts: dict[str, Any] = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    return Step(number=number, tokens=10, seconds=1.0, peak_bytes=0, **facts)


def test_the_spread_of_the_air_is_that_of_the_last_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Air that warms from 8 to 33 °C has a spread; before any reading, and by hand, it has none."""
    with ThermalMonitor(ThermalFlags(temperature_c=8.0, altitude_m=832.0)) as thermal_monitor:
        thermal_monitor.reading()
        account = thermal_monitor.account()
        told = (account["t_env_c"], account["t_env_source"], account["altitude_source"])
        assert told == (8.0, "given", "given")
        assert thermal_monitor.air(look=False).spread_c == 0.0
    plug_in(monkeypatch, HALNY)
    with ThermalMonitor(ThermalFlags()) as thermal_monitor:
        assert thermal_monitor.air(look=False).spread_c == 0.0
        air = [thermal_monitor.reading().ambient_c for _ in range(16)]
        mean = sum(air) / 16
        std = (sum((t - mean) ** 2 for t in air) / 16) ** 0.5
        assert (air[0], air[-1]) == (8.0, 33.0)
        assert thermal_monitor.air(look=False).spread_c == pytest.approx(std)
        assert thermal_monitor.account()["t_env_source"] == "SMC TVA0"


def test_tea_breaks_are_counted_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hot spells pause the run in virtual time; both logs share a clock."""
    log = tmp_path / "thermal.jsonl"
    plug_in(monkeypatch, HALNY)
    with ThermalMonitor(ThermalFlags(governor="steady"), log) as thermal_monitor:
        for number in range(1, 200):
            actions = [decision.action for decision in thermal_monitor.after(step(number))]
            assert actions[-1] == "run"
        assert thermal_monitor.breaks.count == 6
        assert thermal_monitor.breaks.seconds > 60
        assert thermal_monitor.account()["tea_reasons"] == {"hot": 6}
        now = thermal_monitor.now()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["action"] for line in lines} == {"run", "pause"}
    assert all(line["reason"] for line in lines if line["action"] == "pause")
    assert lines[-1]["time_s"] <= now["time_s"]


@pytest.mark.parametrize("mode", ["steady", "cool", "observe"])
@pytest.mark.parametrize("plugged", [False, True])
def test_a_run_that_would_wait_for_the_plug_does_not_begin(
    mode: Mode, plugged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On battery, `steady` asks for another flag before a model is looked for; `cool` and
    `observe` go on, and so does a --dry-run.
    """
    charge = SimpleNamespace(percent=55.0, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: charge, raising=False)
    model = str(tmp_path / "nowhere")
    settings = sft.Settings(governor=mode, model=model, out=str(tmp_path / "run"))
    waits = not plugged and mode == "steady"
    want = (
        f"^on battery, 55 %: --governor {mode} pauses .* use --governor cool"
        if waits
        else "nowhere"
    )
    with pytest.raises(MisError, match=want):
        open_model(settings, model)
    with pytest.raises(MisError, match="nowhere"):
        open_model(replace(settings, dry_run=True), model)
    assert not (tmp_path / "run").exists()


class Unplugged:
    """A thermometer of a laptop that is plugged in after some looks."""

    def __init__(self, looks: int):
        self.clock = VirtualClock()
        self.looks = looks

    def reading(self) -> Reading:
        """One look."""
        self.looks -= 1
        return Reading(
            self.clock.monotonic(), die_c=50.0, battery_percent=60.0, plugged=self.looks < 0
        )


def test_a_pause_is_said_when_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line a pause, with the flag that ends it; none of a mode that does not pause."""
    for mode, lines in (("steady", 1), ("observe", 0), ("cool", 0)):
        monkeypatch.setenv("MIS_MLX_GOVERNOR", mode)
        thermal_monitor = ThermalMonitor(ThermalFlags())
        air = Unplugged(40)
        for name, value in {"clock": air.clock, "reading": air.reading, "apple": True}.items():
            monkeypatch.setattr(thermal_monitor, name, value)
        actions = [d.action for d in thermal_monitor.after(step(7))]
        said = capsys.readouterr().err.splitlines()
        assert actions[-1] == "run"
        assert len(said) == lines
        assert (actions.count("pause") > 10) == (mode == "steady")
        assert all(
            line.startswith("tea break after step 7: on battery: plug in")
            and "--governor cool" in line
            for line in said
        )


def test_the_governor_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIS_MLX_GOVERNOR is the default, the flag wins, else steady; no mode is a sentence."""
    assert ThermalFlags().governor == "observe"  # tests/conftest.py
    monkeypatch.setenv("MIS_MLX_GOVERNOR", "cool")
    assert (ThermalFlags().governor, ThermalFlags(governor="steady").governor) == ("cool", "steady")
    monkeypatch.delenv("MIS_MLX_GOVERNOR")
    assert ThermalFlags().governor == "steady"
    monkeypatch.setenv("MIS_MLX_GOVERNOR", "hot")
    with pytest.raises(MisError, match="MIS_MLX_GOVERNOR is not one of observe, steady, cool"):
        ThermalFlags()
