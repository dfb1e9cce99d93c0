"""Record and replay temperatures, or check what can be measured."""

import json
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from mis_mlx import cli
from mis_mlx.hardware.clock import Clock
from mis_mlx.hardware.thermal import ambient, recording, run_monitor
from mis_mlx.hardware.thermal.governor import Mode, governor_for
from mis_mlx.hardware.thermal.thermal_monitor import Live, Monitor, examined
from mis_mlx.reporting import html
from mis_mlx.storage.files import need_place
from mis_mlx.types import Celsius, Metres, Positive, Seconds, duration


@dataclass(frozen=True)
class Record:
    """Write raw readings to FILE (JSON lines) until Ctrl-C; other commands replay them with
    --thermal-replay FILE.
    """

    file: tyro.conf.Positional[Path]
    seconds: Seconds | None = None
    """Stop after this many seconds."""
    every_s: Positive = 1.0
    """Seconds between readings."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml; goes into the recording."""


@dataclass(frozen=True)
class Replay:
    """Show what the governor would have done with the recording FILE, one JSON line per change."""

    file: tyro.conf.Positional[Path]
    mode: Mode = "steady"
    """The governor's mode."""
    step_s: Positive = 1.0
    """Seconds per step of the simulated training."""


@dataclass(frozen=True)
class Doctor:
    """Show what this machine can measure, what is missing, and where AAIS gets its T_env."""

    thermal_replay: Path | None = None
    """Check this recording instead."""
    temperature_c: Celsius | None = None
    """Air temperature from your own thermometer, in °C."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml."""


def run(settings: Record | Replay | Doctor) -> dict[str, Any]:
    """Run the chosen command; returns its findings, as JSON allows them."""
    cli.check_ranges(settings)
    if isinstance(settings, Record):
        return record(settings)
    if isinstance(settings, Replay):
        return replay_decisions(settings)
    with Monitor(
        replay=settings.thermal_replay,
        given_ambient_c=settings.temperature_c,
        altitude_m=settings.altitude_m,
    ) as monitor:
        facts = examined(monitor)
        print(html.document("sensors.md", {**facts, "monitor": monitor}))
    return facts


def record(settings: Record) -> dict[str, Any]:
    """Write a recording until Ctrl-C; every line is complete whenever it ends."""
    need_place("FILE", settings.file, "new")
    clock = Clock()
    source = Live(clock)
    altitude_m, _ = ambient.find_altitude(settings.altitude_m, recording.Header())
    header = replace(source.header, altitude_m=altitude_m)
    start_s = clock.monotonic()
    looks = 0
    with (
        closing(source),
        recording.recorder(settings.file, header) as add,
        suppress(KeyboardInterrupt),
    ):
        while settings.seconds is None or clock.monotonic() - start_s <= settings.seconds:
            add(source.look())
            looks += 1
            # Counted from the start, so that the time of a look does not add up.
            next_s = start_s + looks * settings.every_s
            clock.sleep(next_s - clock.monotonic())
    seconds = clock.monotonic() - start_s
    cli.say(f"{settings.file}: {looks} readings in {duration(seconds)}")
    return {"file": str(settings.file), "looks": looks, "seconds": round(seconds, 1)}


def replay_decisions(settings: Replay) -> dict[str, Any]:
    """Feed a recording to the governor in virtual time; returns its tea breaks."""
    breaks = run_monitor.PauseCounter()
    steps = 0
    action = ""
    with Monitor(replay=settings.file) as monitor:
        governor = governor_for(settings.mode, monitor.reading(), monitor.reasons, apple=False)
        if governor.blind:
            why = monitor.reasons["die_c"]
            cli.say(f"no die temperature in the first reading ({why}): only power is governed")
        while not monitor.source.ended and action != "stop":
            monitor.clock.sleep(settings.step_s)
            steps += 1
            for decision in run_monitor.after_step(monitor, governor, breaks, settings.step_s):
                if decision.action != action:
                    reading = monitor.last()
                    seen = {
                        name: getattr(reading, name) for name in ("time_s", "die_c", "ambient_c")
                    }
                    line = {**seen, **asdict(decision)}
                    print(json.dumps(line, ensure_ascii=False, allow_nan=False))
                action = decision.action
        seconds = monitor.clock.monotonic()
    return {
        "file": str(settings.file),
        "seconds": round(seconds, 1),
        "steps": steps,
        "end": action,
        **breaks.as_json(),
    }


if __name__ == "__main__":
    cli.main(Record | Replay | Doctor, run)
