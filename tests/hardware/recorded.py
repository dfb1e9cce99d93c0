"""A clock that only waiting moves, and recordings of thermometers, read in its time.

A recording is what `thermal --out` writes: `plug_in` puts one in the place of this machine's
thermometers. tests/data/halny.jsonl is a simulation: the warm wind falls on an Air, 8 to 33 °C in
150 s, then come six spells of hard work.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.hardware.clock import Clock
from mis_mlx.hardware.thermal import thermal_monitor
from mis_mlx.hardware.thermal.recording import SCHEMA, Header, Raw

AFTER_THE_END_S = 1.0


class VirtualClock(Clock):
    """A clock that only `sleep` moves, for tests: `sleep` returns at once.

    Uptime is the machine's.
    """

    def __init__(self) -> None:
        self._awake = 0.0
        self.wall_s = 0.0  # may be set, as NTP or a user sets it; nobody slept

    def monotonic(self) -> float:
        """Virtual seconds awake."""
        return self._awake

    def wall(self) -> float:
        """Virtual seconds since 1970."""
        return self.wall_s

    def sleep(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self._awake += max(seconds, 0.0)
        self.wall_s += max(seconds, 0.0)


class LidClock(VirtualClock):
    """A virtual clock of a machine whose lid can be closed."""

    def __init__(self) -> None:
        super().__init__()
        self._asleep = 0.0

    def suspend(self, seconds: float) -> None:
        """Close the lid for `seconds`: the wall clock goes on, `monotonic` does not."""
        self._asleep += seconds
        self.wall_s += seconds

    def uptime(self) -> float:
        return 1e6 + self._awake + self._asleep  # booted long ago

    def asleep(self) -> float:
        return self._asleep


class Replay:
    """A recording as a source of looks.

    Each look gives a record not seen before: the newest that is due by `clock`, else the next one,
    for which the clock is moved on; so a run's speed does not change what it sees, and a wait costs
    nothing. After the last record its values stay, one second a look.
    """

    sampled = False
    apple = None
    virtual = True

    def __init__(self, path: Path):
        self.clock = VirtualClock()
        header, *records = map(json.loads, path.read_text("utf8").splitlines())
        assert header["schema"] == SCHEMA
        known = Header.__dataclass_fields__
        self.header = Header(**{name: header[name] for name in known if name in header})
        self._records = [_raw(record) for record in records]
        self._next = 0
        self._offset_s = -self._records[0].mono_s
        self.clock.wall_s = self._records[0].wall_s

    @property
    def ended(self) -> bool:
        """Whether the last record has been given."""
        return self._next == len(self._records)

    def look(self) -> Raw:
        """The next record, its `mono_s` counted by the replay's clock."""
        if self.ended:
            self.clock.sleep(AFTER_THE_END_S)
        else:
            self._next += 1
            while not self.ended and self._wait_s(self._records[self._next]) <= 0:
                self._next += 1
            self.clock.sleep(self._wait_s(self._records[self._next - 1]))
        return replace(self._records[self._next - 1], mono_s=self.clock.monotonic())

    def _wait_s(self, raw: Raw) -> float:
        """Seconds until a record is due."""
        return raw.mono_s + self._offset_s - self.clock.monotonic()

    def close(self) -> None:
        """Nothing is open."""


def _raw(record: dict[str, Any]) -> Raw:
    """A line of a recording."""
    for name in ("hid", "linux"):
        rows = record.get(name, [])
        record[name] = tuple((label, math.nan if c is None else float(c)) for label, c in rows)
    return Raw(**record)


def plug_in(patch: pytest.MonkeyPatch, path: Path) -> None:
    """From now on a monitor reads the recording at `path` from its beginning."""
    patch.setattr(thermal_monitor, "Live", lambda *_: Replay(path))


def smc_float(value: float) -> str:
    """A `flt ` key as a recording holds it."""
    return "flt :" + struct.pack("<f", value).hex()
