"""What a run folder tells, as far as it goes: every file may be missing, torn, or of another version.

Nothing in here is to be trusted as HTML. Logs are thinned line by line: a million take no more memory than a thousand,
and no spike is lost."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mis_mlx.storage import run_folder
from mis_mlx.types import MisError

STEPS = ("number", "loss", "tokens", "seconds", "peak_bytes")
AIR = ("die_c", "ambient_c")
KEEPS = ("pruned/keep.json", "distilled/keep.json", "model/keep.json")  # the first that is there
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


def history_of(path: Path, names: Sequence[str]) -> History:
    """The numbers of these names, and "tokens_per_s", in a log, if there is one; a step done twice is in it twice."""
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


class RunRecord(NamedTuple):
    """A run; `result` is empty until its end. Where there was nothing to read, `missing` has a sentence."""

    folder: Path
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    result: Mapping[str, Any]
    keep: Mapping[str, Any]
    begun: Mapping[str, Any]  # what the first start planned
    phases: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    table: str
    steps: History
    air: History
    missing: Sequence[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def began_s(self) -> float:
        """Seconds since 1970 at which time begins on pictures."""
        first = (_number(self.begun.get("wall_s")), self.steps.first_s, self.air.first_s)
        return min((s for s in first if s is not None), default=0.0)


@dataclass
class _Files:
    """The files of a run folder, and a sentence for each that is missing or damaged; `what` is lost with it."""

    folder: Path
    missing: list[str] = field(default_factory=list)

    def text(self, name: str, what: str) -> str:
        with suppress(OSError):
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        self.missing.append(f"{name} is missing: {what}")
        return ""

    def mapping(self, name: str, what: str) -> Mapping[str, Any]:
        before, text = len(self.missing), self.text(name, what)
        with suppress(ValueError, RecursionError, yaml.YAMLError):
            value = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
            if isinstance(value, dict):
                return {str(k): v for k, v in value.items()}
        if len(self.missing) == before:
            self.missing.append(f"{name} is damaged: {what}")
        return {}

    def records(self, name: str, what: str) -> list[dict[str, Any]]:
        if not (self.folder / name).is_file():
            self.missing.append(f"{name} is missing: {what}")
        return run_folder.records(self.folder / name)

    def history(self, name: str, names: Sequence[str], what: str) -> History:
        history = history_of(self.folder / name, names)
        if not history.lines:
            self.missing.append(f"{name} is missing: {what}")
        elif history.torn:
            lines = f"{history.torn} of {history.lines} lines that are no records"
            self.missing.append(f"{name} has {lines}; passed over")
        return history


def read(folder: Path) -> RunRecord:
    """Everything that is there. MisError when nothing of a run is."""
    files = _Files(folder)
    keep = next((name for name in KEEPS if (folder / name).is_file()), KEEPS[0])
    phases = files.records(run_folder.PHASES, "the plan, and what each phase took")
    record = RunRecord(
        folder=folder,
        config=files.mapping(run_folder.CONFIG, "the settings"),
        origin=files.mapping(run_folder.ORIGIN, "versions and hashes"),
        result=files.mapping(run_folder.RESULT, "the result; the run has not come to its end"),
        keep=files.mapping(keep, "who was kept"),
        begun=next((r for r in phases if isinstance(r.get("planned"), list)), {}),
        phases=[r for r in phases if isinstance(r.get("phase"), str)],
        samples=[r for r in files.records(run_folder.SAMPLES, "texts of the models") if "text" in r],
        table=files.text("table.md", "the recovery table"),
        steps=files.history(run_folder.METRICS, STEPS, "the steps"),
        air=files.history("thermal.jsonl", AIR, "temperatures; no thermometer was read"),
        missing=files.missing,
    )
    if not (record.config or record.origin or record.result or record.keep or phases or record.steps.lines):
        raise MisError(f"{folder} holds nothing of a run: give a run folder, such as runs/NAME-001")
    return record
