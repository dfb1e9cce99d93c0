"""Record temperatures, or check what can be measured."""

from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from mis_mlx import cli
from mis_mlx.hardware.clock import Clock
from mis_mlx.hardware.thermal import ambient, recording
from mis_mlx.hardware.thermal.thermal_monitor import Live, Monitor, examined
from mis_mlx.reporting import html
from mis_mlx.storage.files import need_place
from mis_mlx.types import Celsius, Metres, Positive, Seconds, duration


@dataclass(frozen=True)
class Record:
    """Write raw readings to FILE (JSON lines) until Ctrl-C, to look at or to send with a report."""

    file: tyro.conf.Positional[Path]
    seconds: Seconds | None = None
    """Stop after this many seconds."""
    every_s: Positive = 1.0
    """Seconds between readings."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml; goes into the recording."""


@dataclass(frozen=True)
class Doctor:
    """Show what this machine can measure, what is missing, and where AAIS gets its T_env."""

    temperature_c: Celsius | None = None
    """Air temperature from your own thermometer, in °C."""
    altitude_m: Metres | None = None
    """Metres above sea level, if not in ~/.config/mis_mlx.toml."""


def run(settings: Record | Doctor) -> dict[str, Any]:
    """Run the chosen command; returns its findings, as JSON allows them."""
    cli.check_ranges(settings)
    if isinstance(settings, Record):
        return record(settings)
    with Monitor(
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
    altitude_m, _ = ambient.find_altitude(settings.altitude_m)
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


if __name__ == "__main__":
    cli.main(Record | Doctor, run)
