"""Show what temperatures can be measured here, or record them."""

from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.hardware.clock import Clock
from mis_mlx.hardware.thermal import recording
from mis_mlx.hardware.thermal.run_monitor import AirFlags
from mis_mlx.hardware.thermal.thermal_monitor import PERIOD_S, Live, Monitor, examined
from mis_mlx.reporting import html
from mis_mlx.storage.files import need_place
from mis_mlx.types import MisError, Seconds, duration


@dataclass(frozen=True)
class Settings(AirFlags):
    """Shows what this machine can measure, what is missing, and where AAIS gets its T_env."""

    out: str | None = None
    """new file for raw readings (JSON lines), one a second until Ctrl-C, to send with a report"""
    seconds: Seconds | None = None
    """length of these readings"""


def run(settings: Settings) -> dict[str, Any]:
    """The command; returns its findings, as JSON allows them."""
    s = settings
    cli.check_ranges(s)
    if s.out:
        return record(Path(s.out), s)
    if s.seconds is not None:
        raise MisError(f"--seconds {s.seconds:g} needs a file for readings: give --out, too")
    with Monitor(given_ambient_c=s.temperature_c, altitude_m=s.altitude_m) as monitor:
        facts = examined(monitor)
        print(html.document("sensors.md", {**facts, "monitor": monitor}))
    return facts


def record(file: Path, s: Settings) -> dict[str, Any]:
    """Write a recording until Ctrl-C; every line is complete whenever it ends."""
    need_place("--out", file, "new")
    clock = Clock()
    source = Live(clock)
    header = replace(source.header, altitude_m=s.altitude_m)
    start_s = clock.monotonic()
    looks = 0
    with (
        closing(source),
        recording.recorder(file, header) as add,
        suppress(KeyboardInterrupt),
    ):
        while s.seconds is None or clock.monotonic() - start_s <= s.seconds:
            add(source.look())
            looks += 1
            # Counted from the start, so that the time of a look does not add up.
            clock.sleep(start_s + looks * PERIOD_S - clock.monotonic())
    seconds = clock.monotonic() - start_s
    cli.say(f"{file}: {looks} readings in {duration(seconds)}")
    return {"file": str(file), "looks": looks, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    cli.main(Settings, run)
