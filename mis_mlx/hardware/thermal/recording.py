"""Record looks at the thermometers before any judgement.

A recording is JSON lines: a header (which machine), then one `Raw` a line: new rules can be tried
on old recordings.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "mis_mlx thermal 1"

Rows = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Raw:
    """Everything one look gave, undecoded. Empty: this provider is absent or did not answer."""

    mono_s: float
    wall_s: float
    hid: Rows = ()  # (name, °C) as Apple's HID gives them; names repeat
    linux: Rows = ()  # ("psutil coretemp Package id 0", °C)
    smc: Mapping[str, str] = field(default_factory=dict)  # key -> "type:bytes in hex"
    missing: Mapping[str, str] = field(default_factory=dict)  # provider -> why it gave nothing
    pressure: int | None = None
    battery_percent: float | None = None
    plugged: bool | None = None
    # just booted, or woken from 90 min of sleep: everything has the air's temperature
    rested: bool = False


def to_json(raw: Raw) -> dict[str, Any]:
    """`raw` as strict JSON allows it: empty fields are left out, NaN and infinity become null."""
    empty = vars(Raw(math.nan, math.nan))
    out = {name: value for name, value in vars(raw).items() if value != empty[name]}
    for name in ("hid", "linux"):
        if name in out:
            out[name] = [[label, _finite(value)] for label, value in out[name]]
    return out


def _finite(value: float) -> float | None:
    """The number, or None for a NaN or an infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Header:
    """Where a recording comes from. `altitude_m` is where it was made, if that was known."""

    model: str | None = None
    chip: str | None = None
    build: str | None = None
    altitude_m: float | None = None


@contextmanager
def recorder(path: Path, header: Header) -> Iterator[Callable[[Raw], None]]:
    """Yield a function that adds a look to a new recording.

    The file is `FILE.part` until the recording ends; an interrupted one has all looks so far.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf8") as file:

        def write(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
            file.flush()

        write({"schema": SCHEMA, **vars(header)})
        try:
            yield lambda raw: write(to_json(raw))
        finally:
            os.fsync(file.fileno())
            part.replace(path)
