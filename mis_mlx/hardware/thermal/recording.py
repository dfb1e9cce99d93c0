"""Record looks at the thermometers before any judgement; check and replay them in virtual time.

A recording is JSON lines: a header (which machine), then one `Raw` a line: new rules can be tried
on old recordings.
"""

import json
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mis_mlx.data import rows
from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.types import MisError

SCHEMA = "mis_mlx thermal 1"
AFTER_THE_END_S = 1.0

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


def _field(name: str, value: Any) -> Any:
    """A field of `Raw`, from a record. Raises ValueError when it is none."""
    if name in ("plugged", "rested"):
        return value is True
    if name in ("hid", "linux"):
        try:
            return tuple(_row(label, number) for label, number in value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is not a list of [name, value]") from None
    if name in ("smc", "missing"):
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise ValueError(f"{name} is not an object of texts")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _row(label: Any, number: Any) -> tuple[str, float]:
    """A thermometer's name and value; null stands for NaN."""
    if number is None:
        return str(label), math.nan
    return str(label), float(number)


def from_json(record: Any) -> Raw:
    """The inverse of `to_json`. Raises ValueError, which says why, when `record` is none."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    given = {"mono_s": None, "wall_s": None, **record}
    known = [name for name in Raw.__dataclass_fields__ if name in given]
    return Raw(**{name: _field(name, given[name]) for name in known})


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


class Replay:
    """A recording, checked as a whole at first, as a source of looks.

    Each look gives a record not seen before: the newest that is due by `clock`, else the next one,
    for which the clock is moved on; so a run's speed does not change what it sees, and a wait costs
    nothing. After the last record its values stay, one second a look.
    """

    def __init__(self, path: Path, clock: VirtualClock):
        self.clock = clock
        lines = _lines(path)
        self.header = next(lines)
        self.count = sum(1 for _ in lines)
        if not self.count:
            raise MisError(
                f"{path} has a header and no record after line 1: record again for longer"
            )
        self._records = _lines(path)
        next(self._records)  # the header
        self._last: Raw = next(self._records)
        self._next: Raw | None = self._last
        self._offset_s = clock.monotonic() - self._last.mono_s
        clock.wall_s = self._last.wall_s
        self.ended = False  # whether the last record has been given
        self.close = self._records.close

    def look(self) -> Raw:
        """The next record, its `mono_s` counted by the replay's clock."""
        fresh = None
        while self._next is not None and (fresh is None or self._wait_s(self._next) <= 0):
            fresh = self._next
            self._next = next(self._records, None)
        if fresh is None:
            self.clock.sleep(AFTER_THE_END_S)
        else:
            self.clock.sleep(self._wait_s(fresh))
            self._last = fresh
        self.ended = self._next is None
        return replace(self._last, mono_s=self.clock.monotonic())

    def _wait_s(self, raw: Raw) -> float:
        """Seconds until a record is due."""
        return raw.mono_s + self._offset_s - self.clock.monotonic()


def _lines(path: Path) -> Generator[Any, None, None]:
    """Yield the header, then the records one by one: days need no memory.

    MisError names the line that is wrong, or whose time comes too early.
    """
    lines = rows.parsed(path)
    last_s = -math.inf
    _, header, _ = next(lines, (1, None, None))
    yield _header(path, header)
    for number, record, unread in lines:
        try:
            if unread:
                raise ValueError(unread)
            raw = from_json(record)
        except ValueError as error:
            why = f"{path} line {number} is not a record ({error})"
            raise MisError(f"{why}: record again, or delete from that line on") from None
        if raw.mono_s < last_s:
            why = f"{path} line {number}: the time {raw.mono_s} s comes after {last_s} s"
            raise MisError(f"{why}, so this is more than one recording: put each in its own file")
        last_s = raw.mono_s
        yield raw


def _header(path: Path, header: Any) -> Header:
    """The header from the record of line 1. MisError when it is none."""
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        why = (
            f'{path} line 1 does not say "schema": "{SCHEMA}", so it is not a recording of '
            f"this program"
        )
        raise MisError(f"{why}: make one with `python -m mis_mlx.thermal record`")
    altitude = header.get("altitude_m")
    if altitude is not None and not isinstance(altitude, int | float):
        raise MisError(f"{path} line 1: altitude_m is {altitude!r}, not a number: fix or delete it")
    texts = {name: header.get(name) for name in ("model", "chip", "build")}
    known = {name: str(text) for name, text in texts.items() if text is not None}
    return Header(**known, altitude_m=altitude)
