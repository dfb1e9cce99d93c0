"""Temperatures on Linux: psutil, else /sys/class/hwmon, else /sys/class/thermal.

Knows nothing of which value to believe. Nothing found (a virtual machine) is no rows, never 0.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from mis_mlx.hardware.thermal.recording import Rows

SYS = Path("/sys")


def read(root: Path = SYS) -> Rows:
    """`(name, °C)` of every thermometer of the first source that has any; `root` is a stand-in for /sys."""
    return (_psutil() if root == SYS else ()) or _hwmon(root) or _zones(root)


def _psutil() -> Rows:
    """psutil has the function only where the system does (not on macOS)."""
    ask = getattr(psutil, "sensors_temperatures", None)
    try:
        found = ask() if ask else {}
    except (OSError, ValueError):
        return ()
    return tuple(
        (f"psutil {chip} {part.label}".strip(), float(part.current)) for chip, parts in found.items() for part in parts
    )


def _hwmon(root: Path) -> Rows:
    rows = []
    for value_file in sorted(root.glob("class/hwmon/hwmon*/temp*_input")):
        milli = _text(value_file)
        chip = _text(value_file.parent / "name") or value_file.parent.name
        label = _text(value_file.with_name(value_file.name.replace("_input", "_label")))
        rows.append((f"hwmon {chip} {label or ''}".strip(), milli))
    return _in_degrees(rows)


def _zones(root: Path) -> Rows:
    zones = sorted(root.glob("class/thermal/thermal_zone*"))
    return _in_degrees([(f"thermal_zone {_text(zone / 'type') or zone.name}", _text(zone / "temp")) for zone in zones])


def _in_degrees(rows: list[tuple[str, str | None]]) -> Rows:
    """Thousandths of a degree to degrees; what does not read as a whole number is left out."""
    return tuple((name, int(milli) / 1000) for name, milli in rows if milli and milli.lstrip("-").isdigit())


def _text(file: Path) -> str | None:
    """What the file says; `None` when it is not there or answers EAGAIN or ENODATA, as sensors do."""
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
