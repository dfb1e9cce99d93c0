"""One look at the thermometers before any judgement, and recordings of looks: write, check, play back in virtual time.

A recording is JSON lines: a header that says which machine it is from, then one `Raw` a line. Knows
nothing of which value to believe, so that a mended rule can be tried on an old recording.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.types import MisError

SCHEMA = "mis_mlx thermal 1"
LONGEST_LINE = 1 << 20  # characters: a foreign file without line ends must not fill the memory
AFTER_THE_END_S = 1.0

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


@dataclass(frozen=True)
class Header:
    """Where a recording comes from. `altitude_m` is where it was made, if that was known."""

    model: str | None = None
    chip: str | None = None
    build: str | None = None
    altitude_m: float | None = None


class Recorder:
    """Writes a recording under `FILE.part` and gives it its name when done. Refuses to overwrite."""

    def __init__(self, path: Path, header: Header):
        if path.exists():
            raise MisError(f"{path} exists already and a recording is never overwritten: give another name")
        if not path.parent.is_dir():
            raise MisError(f"{path.parent} is not a folder, so {path.name} cannot go there: make it first")
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._header = header
        self._file: TextIO | None = None

    def __enter__(self) -> Recorder:
        self._file = self._part.open("w", encoding="utf8")
        self._line({"schema": SCHEMA, **vars(self._header)})
        return self

    def add(self, raw: Raw) -> None:
        """One more line; it is on its way to the disk when this returns."""
        self._line(to_json(raw))

    def _line(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "use it in a with statement"
        self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """All lines are whole, so an interrupted recording is a recording too."""
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)


class Replay:
    """A recording as a source of looks. The whole file is checked before the first look.

    Each look gives a record not seen before: the newest that is due by `clock`, else the next one, for
    which the clock is moved on. So a run's speed does not change what it sees, and a wait costs nothing.
    After the last record its values stay, one second a look.
    """

    def __init__(self, path: Path, clock: VirtualClock):
        self.path = path
        self.clock = clock
        self.header, self.count = _check(path)
        self._records = _records(path)
        self._next: Raw | None = next(self._records)
        self._first_s = self._next.mono_s if self._next else 0.0
        self._start_s = clock.monotonic()
        self._last: Raw | None = None
        clock.set_wall(self._next.wall_s if self._next else 0.0)

    @property
    def ended(self) -> bool:
        """Whether the last record has been given."""
        return self._next is None

    def look(self) -> Raw:
        """The next record, its `mono_s` counted by the replay's clock."""
        fresh = None
        while self._next is not None and (fresh is None or self._at(self._next) <= self.clock.monotonic()):
            fresh, self._next = self._next, next(self._records, None)
        if fresh is None:
            self.clock.sleep(AFTER_THE_END_S)
            fresh = self._last
        else:
            self.clock.sleep(self._at(fresh) - self.clock.monotonic())
        assert fresh is not None, "_check saw a record"
        self._last = fresh
        return Raw(**{**vars(fresh), "mono_s": self.clock.monotonic()})

    def _at(self, raw: Raw) -> float:
        return self._start_s + raw.mono_s - self._first_s

    def close(self) -> None:
        """Close the file."""
        self._records.close()


def _check(path: Path) -> tuple[Header, int]:
    """Header and number of records; every line is read once. Raises MisError with the line number."""
    last_s, count = -math.inf, 0
    for number, raw in enumerate(_records(path), start=2):
        if raw.mono_s < last_s:
            raise MisError(
                f"{path} line {number}: the time {raw.mono_s} s comes after {last_s} s, so this is more than "
                "one recording: give each a file of its own"
            )
        last_s, count = raw.mono_s, count + 1
    if not count:
        raise MisError(f"{path} has a header and no record after line 1: record again for longer")
    with path.open(encoding="utf8", errors="replace") as file:
        return _header(path, file), count


def _header(path: Path, file: TextIO) -> Header:
    foreign = MisError(
        f'{path} line 1 does not say "schema": "{SCHEMA}", so it is no recording of this program: make one '
        "with `python -m mis_mlx.thermal record`"
    )
    try:
        header = json.loads(file.readline(LONGEST_LINE))
    except (ValueError, RecursionError):
        raise foreign from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise foreign
    altitude = header.get("altitude_m")
    if altitude is not None and not isinstance(altitude, int | float):
        raise MisError(f"{path} line 1: altitude_m is {altitude!r}, not a number: mend or delete it")
    texts = {name: header.get(name) for name in ("model", "chip", "build")}
    return Header(**{k: v if v is None else str(v) for k, v in texts.items()}, altitude_m=altitude)


def _records(path: Path) -> Generator[Raw, None, None]:
    """The records one by one, so that days of recording need no memory."""
    try:
        file = path.open(encoding="utf8", errors="replace")
    except OSError as error:
        raise MisError(f"{path} cannot be read ({error.strerror}): give the file of a recording") from None
    with file:
        number = 1
        try:
            _header(path, file)
            while line := file.readline(LONGEST_LINE):
                number += 1
                if not line.endswith("\n"):
                    raise ValueError("the line is cut off or too long")
                yield from_json(json.loads(line))
        except (ValueError, RecursionError) as error:  # json's errors are ValueErrors too
            what = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise MisError(
                f"{path} line {number} is not a record ({what}): record again, or delete from that line on"
            ) from None
