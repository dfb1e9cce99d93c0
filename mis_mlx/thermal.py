"""Watch, record and replay temperatures, or ask the doctor what this machine can measure.

Does not know what the temperatures are used for, except that AAIS wants the air's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from mis_mlx import cli
from mis_mlx.hardware.clock import Clock
from mis_mlx.hardware.thermal import findings
from mis_mlx.hardware.thermal.ambient import find_altitude
from mis_mlx.hardware.thermal.governor import Decision, Mode, TeaBreaks, after_step, governor_for
from mis_mlx.hardware.thermal.recording import Header, Recorder
from mis_mlx.hardware.thermal.thermal_monitor import Live, Monitor, open_monitor
from mis_mlx.reporting import text
from mis_mlx.storage.files import need_place
from mis_mlx.types import Celsius, Metres, Positive, Reading, Seconds

SPARK_LOOKS = 60


@dataclass(frozen=True)
class Watch:
    """Live table of all temperatures; stop it with Ctrl-C."""

    seconds: Seconds | None = None
    """Stop after so many seconds."""
    thermal_replay: Path | None = None
    """Show this recording instead, without waiting."""
    temperature_c: Celsius | None = None
    """What your own thermometer says, °C."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml."""


@dataclass(frozen=True)
class Record:
    """Write raw readings to FILE (JSON lines) until Ctrl-C; any command takes it as --thermal-replay FILE."""

    file: tyro.conf.Positional[Path]
    seconds: Seconds | None = None
    """Stop after so many seconds."""
    every_s: Positive = 1.0
    """Seconds between looks."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml; goes into the recording."""


@dataclass(frozen=True)
class Replay:
    """Show what the governor would have done with the recording FILE, one JSON line a change of mind."""

    file: tyro.conf.Positional[Path]
    mode: Mode = "steady"
    """The governor's mode."""
    step_s: Positive = 1.0
    """Seconds a step of the imagined training takes."""


@dataclass(frozen=True)
class Doctor:
    """Say in plain words what this machine offers, what is missing, and whether AAIS has a measured T_env."""

    thermal_replay: Path | None = None
    """Examine this recording instead."""
    temperature_c: Celsius | None = None
    """What your own thermometer says, °C."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml."""


def run(settings: Watch | Record | Replay | Doctor) -> dict[str, Any]:
    """What the chosen command found, as JSON allows it."""
    cli.check_ranges(settings)
    if isinstance(settings, Watch):
        return watch(settings)
    if isinstance(settings, Record):
        return record(settings)
    if isinstance(settings, Replay):
        return replay_decisions(settings)
    with _open(settings) as monitor:
        lines, found = findings.examined(monitor)
    print("\n".join(lines))
    return found


def watch(settings: Watch) -> dict[str, Any]:
    """Show a table until time is up; returns the last reading."""
    from rich.console import Console
    from rich.live import Live as LiveTable

    clock = Clock()
    until_s = clock.monotonic() + settings.seconds if settings.seconds is not None else float("inf")
    with (
        _open(settings) as monitor,
        LiveTable(console=Console(stderr=True), auto_refresh=False, transient=False) as shown,
    ):
        reading = monitor.reading()
        try:
            while True:
                shown.update(_table(reading, monitor), refresh=True)
                if monitor.ended or clock.monotonic() >= until_s:
                    break
                if not monitor.replayed:
                    clock.sleep(1.0)
                reading = monitor.reading()
        except KeyboardInterrupt:
            pass  # the way to end a watch
        return {"reading": asdict(reading), "reasons": dict(monitor.reasons), "looks": len(monitor.history())}


def record(settings: Record) -> dict[str, Any]:
    """Write a recording; every line is whole whenever it ends."""
    need_place("FILE", settings.file, "new")
    clock = Clock()
    source = Live(clock)
    altitude_m, _ = find_altitude(settings.altitude_m, Header())
    start_s, looks = clock.monotonic(), 0
    try:
        with Recorder(settings.file, replace(source.header, altitude_m=altitude_m)) as recorder:
            try:
                while settings.seconds is None or clock.monotonic() - start_s <= settings.seconds:
                    recorder.add(source.look())
                    looks += 1
                    clock.sleep(start_s + looks * settings.every_s - clock.monotonic())
            except KeyboardInterrupt:
                pass  # the way to end a recording
    finally:
        source.close()
    return {"file": str(settings.file), "looks": looks, "seconds": round(clock.monotonic() - start_s, 1)}


def replay_decisions(settings: Replay) -> dict[str, Any]:
    """Feed a recording to the governor in virtual time; returns its tea breaks."""
    breaks, steps, action = TeaBreaks(), 0, ""
    with open_monitor(replay=settings.file) as monitor:
        governor = governor_for(settings.mode, monitor.reading(), monitor.reasons, apple=False)
        if governor.blind:
            cli.say(f"no die temperature in the first look ({monitor.reasons['die_c']}): only power is governed")
        while not monitor.ended and action != "stop":
            monitor.clock.sleep(settings.step_s)
            steps += 1
            for decision in after_step(monitor, governor, breaks, settings.step_s):
                if decision.action != action:
                    print(_decision_line(decision, monitor.history(0.0)[-1]))
                action = decision.action
        seconds = monitor.clock.monotonic()
    return {"file": str(settings.file), "seconds": round(seconds, 1), "steps": steps, "end": action, **breaks.as_json()}


def _open(settings: Watch | Doctor) -> Monitor:
    return open_monitor(
        replay=settings.thermal_replay, given_ambient_c=settings.temperature_c, altitude_m=settings.altitude_m
    )


def _table(reading: Reading, monitor: Monitor) -> Any:
    from rich.table import Table

    table = Table("", "now", "from", f"last {SPARK_LOOKS} looks")
    past = monitor.history()[-SPARK_LOOKS:]
    for name, (label, _) in findings.SHOWN.items():
        if getattr(reading, name) is None:
            table.add_row(label, "–", monitor.reasons.get(name, ""), "")
            continue
        line = text.sparkline([getattr(p, name) for p in past], 1.0) if name.endswith(("_c", "_w")) else ""
        table.add_row(label, findings.text(name, reading), reading.sources[name], line)
    return table


def _decision_line(decision: Decision, reading: Reading) -> str:
    seen = {"time_s": reading.time_s, "die_c": reading.die_c, "ambient_c": reading.ambient_c}
    return json.dumps({**seen, **asdict(decision)}, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    cli.main(Watch | Record | Replay | Doctor, run)
