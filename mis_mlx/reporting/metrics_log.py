"""A run's logs for pictures, read line by line and thinned: a million lines take no more memory than a thousand.

Of neighbouring values the lowest and the highest stay, so no spike is lost. Does not know what is drawn, nor what
the numbers mean; a line that is torn, or of another version, is counted and passed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_mlx.storage import run_folder

MOST_POINTS = 2400  # that a series keeps: when it has more, its runs become twice as long
LINE_BYTES = 1 << 16  # what is longer is no record of ours
MOST = 1000  # pauses that are kept one by one
BACKWARDS_S = 1.0  # a wall clock that jumps back further was set, or is another machine's

Point = tuple[float, float]


@dataclass
class Series:
    """Values at places that never fall; of many, the extremes of runs of neighbours, all runs equally long."""

    count: int = 0
    _kept: list[Point] = field(default_factory=list)
    _run: list[Point] = field(default_factory=list)  # of neighbours, not yet full
    _width: int = 2  # values in a run, of which two are kept

    def add(self, x: float, y: float) -> None:
        """The next value."""
        self.count += 1
        self._run.append((x, y))
        if len(self._run) > self._width:
            *full, last = self._run
            self._kept += _extremes(full)
            self._run = [last]
        if len(self._kept) > MOST_POINTS:
            pairs = (self._kept[at : at + 4] for at in range(0, len(self._kept), 4))
            self._kept = [point for pair in pairs for point in _extremes(pair)]
            self._width *= 2

    def points(self) -> list[Point]:
        """What is left, by place: every value while there are few, later the extremes of each run, and the last one."""
        return sorted({*self._kept, *_extremes(self._run), *self._run[-1:]})


def _extremes(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest, in their order."""
    by_height = sorted(points, key=lambda point: point[1])
    return sorted({*by_height[:1], *by_height[-1:]})


@dataclass
class History:
    """One log. Places in it are seconds since 1970, as the records have them, never falling."""

    series: dict[str, Series]
    lines: int = 0
    torn: int = 0  # lines that are no record
    first_s: float | None = None
    last_s: float = -math.inf
    pauses: list[tuple[float, float, str]] = field(default_factory=list)  # (start, end, cause) of "pause" lines


def read(path: Path, names: Sequence[str]) -> History:
    """The numbers of these names, and "tokens_per_s", in a log of JSON lines; empty when it is missing. A step that a
    resumed run did twice is in it twice: it took its time twice."""
    history = History({name: Series() for name in (*names, "tokens_per_s")})
    behind, pausing = 0.0, False  # of the wall clock, since it was set back; whether the last record is of a pause
    for record in run_folder.parsed(path, LINE_BYTES):
        history.lines += 1
        wall_s = None if record is None else _number(record.get("wall_s"))
        if record is None or wall_s is None:
            history.torn += 1
            continue
        if wall_s + behind < history.last_s - BACKWARDS_S:
            behind = history.last_s - wall_s
        now = history.last_s = max(wall_s + behind, history.last_s)
        history.first_s = now if history.first_s is None else history.first_s
        values = {name: value for name in names if (value := _number(record.get(name))) is not None}
        if values.get("seconds") and "tokens" in values:
            values["tokens_per_s"] = values["tokens"] / values["seconds"]
        for name, value in values.items():
            history.series[name].add(now, value)
        paused = record.get("action") == "pause" and (pausing or len(history.pauses) < MOST)
        if pausing:
            start, _, cause = history.pauses[-1]
            history.pauses[-1] = (start, now, cause)
        elif paused:
            history.pauses.append((now, now, str(record.get("cause", ""))[:80]))
        pausing = paused
    return history


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
