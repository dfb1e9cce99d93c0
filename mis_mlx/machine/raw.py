"""One look at the thermometers before any judgement: what a provider returns and a recording holds.

Knows nothing of which value to believe, so that a mended rule can be tried on an old recording.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Rows = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Raw:
    """Everything one look gave, undecoded. Empty = this provider is not there or did not answer."""

    mono_s: float
    wall_s: float
    hid: Rows = ()  # (name, °C) as Apple's HID gives them; names repeat
    linux: Rows = ()  # ("psutil coretemp Package id 0", °C)
    smc: Mapping[str, str] = field(default_factory=dict)  # key -> "type:bytes in hex"
    ioreg: Mapping[str, int] = field(default_factory=dict)  # AppleSmartBattery, as it came
    missing: Mapping[str, str] = field(default_factory=dict)  # provider -> why it gave nothing
    pressure: int | None = None
    battery_percent: float | None = None
    plugged: bool | None = None
    rested: bool = False  # just booted, or woken from 90 min of sleep: everything has the air's temperature


def to_json(raw: Raw) -> dict[str, Any]:
    """`raw` as strict JSON allows it: what is empty is left out, a NaN or infinity becomes null."""
    empty = vars(Raw(math.nan, math.nan))
    out = {name: value for name, value in vars(raw).items() if value != empty[name]}
    for name in ("hid", "linux"):
        if name in out:
            out[name] = [[label, value if math.isfinite(value) else None] for label, value in out[name]]
    return out


def from_json(record: Any) -> Raw:
    """The inverse of `to_json`. Raises ValueError with what is wrong when `record` is not such a record."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    pressure = record.get("pressure")
    return Raw(
        mono_s=_number(record, "mono_s"),
        wall_s=_number(record, "wall_s"),
        hid=_rows(record, "hid"),
        smc=_strings(record, "smc"),
        linux=_rows(record, "linux"),
        pressure=None if pressure is None else int(_number(record, "pressure")),
        ioreg={k: v for k, v in _object(record, "ioreg").items() if isinstance(v, int)},
        battery_percent=None if record.get("battery_percent") is None else _number(record, "battery_percent"),
        plugged=None if record.get("plugged") is None else record["plugged"] is True,
        rested=record.get("rested") is True,
        missing=_strings(record, "missing"),
    )


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _rows(record: dict[str, Any], name: str) -> Rows:
    rows = record.get(name, [])
    try:
        return tuple((str(label), math.nan if value is None else float(value)) for label, value in rows)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is not a list of [name, value]") from None


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value


def _strings(record: dict[str, Any], name: str) -> dict[str, str]:
    return {str(key): str(value) for key, value in _object(record, name).items()}
