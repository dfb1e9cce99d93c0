"""What a machine's thermometers say, in sentences: what it offers, what is missing, whether AAIS has a T_env."""

import time
from dataclasses import asdict
from typing import Any

from mis_mlx.hardware.thermal.ambient import t_env_kind
from mis_mlx.hardware.thermal.thermal_monitor import Live, Monitor
from mis_mlx.types import Reading

SHOWN = {
    "die_c": ("die", "°C"),
    "battery_c": ("battery", "°C"),
    "ambient_c": ("air outside", "°C"),
    "pressure_level": ("thermal pressure", ""),
    "power_w": ("power", "W"),
    "battery_percent": ("charge", "%"),
    "plugged": ("plugged in", ""),
    "altitude_m": ("height", "m above sea level"),
}


def examined(monitor: Monitor) -> tuple[list[str], dict[str, Any]]:
    """(the findings, a sentence each; the same as JSON allows it) of one look."""
    began = time.perf_counter()
    reading = monitor.look()
    look_s = time.perf_counter() - began
    header, kind = monitor.source.header, t_env_kind(reading)
    what = "recording from" if monitor.replayed else "this machine:"
    lines = [f"{what} {header.model or 'unknown model'}, {header.chip or 'unknown chip'}, {header.build or '?'}"]
    if isinstance(monitor.source, Live):
        lines.append(f"one look takes {1000 * look_s:.0f} ms; a look a second needs no root")
        if monitor.source.apple is not None:
            lines += [f"missing: {name}: {why}" for name, why in monitor.source.apple.refused.items()]
    for name, (label, _) in SHOWN.items():
        if getattr(reading, name) is None:
            lines.append(f"missing: {label}: {monitor.reasons.get(name, 'not measured')}")
        else:
            lines.append(f"{label}: {_text(name, reading)} from {reading.sources[name]}")
    line = "AAIS has no T_env: it is plain importance here; give --temperature-c or let the machine rest 90 min"
    if kind != "none":
        line = f"AAIS has a {kind} T_env: {_text('ambient_c', reading)} ({reading.sources['ambient_c']})"
    lines.append(line if reading.altitude_m is not None else f"{line}; it has no altitude: give --altitude-m")
    return lines, {
        "model": header.model,
        "chip": header.chip,
        "build": header.build,
        "look_ms": round(1000 * look_s, 1),
        "t_env": kind,
        "reading": asdict(reading),
        "reasons": dict(monitor.reasons),
    }


def _text(name: str, reading: Reading) -> str:
    """One value of SHOWN for people, with its unit."""
    value = getattr(reading, name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    shown = f"{value:.1f}" if isinstance(value, float) else str(value)
    if name == "ambient_c":
        shown += f" ± {reading.ambient_sigma_c:.1f}"
    return f"{shown} {SHOWN[name][1]}".strip()
