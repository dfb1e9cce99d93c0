"""What a run folder tells, as far as it goes: every file may be missing, torn, or of another version.

Knows files and plain values. Does not know what becomes of them; nothing in here is to be trusted as HTML. Logs are
read line by line and thinned: a million lines take no more memory than a thousand, and no spike is lost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class RunRecord:
    """A run. Mappings are empty, and `missing` has a sentence, where there was nothing to read."""

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
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.result)

    @property
    def began_s(self) -> float:
        """Seconds since 1970 at which time begins on pictures."""
        wall_s = self.begun.get("wall_s")
        first = [wall_s if isinstance(wall_s, int | float) else None, self.steps.first_s, self.air.first_s]
        return float(min((s for s in first if s is not None), default=0.0))


def read(folder: Path) -> RunRecord:
    """Everything that is there. MisError when nothing of a run is."""
    missing: list[str] = []
    keep = next((name for name in KEEPS if (folder / name).is_file()), KEEPS[0])
    files = {
        "config": (run_folder.CONFIG, "the settings"),
        "origin": (run_folder.ORIGIN, "versions and hashes"),
        "result": (run_folder.RESULT, "the result; the run has not come to its end"),
        "keep": (keep, "who was kept"),
    }
    mappings = {field: _mapping(folder, name, missing, what) for field, (name, what) in files.items()}
    phases = _records(folder / run_folder.PHASES, missing, "the plan, and what each phase took")
    samples = _records(folder / run_folder.SAMPLES, missing, "texts of the models")
    steps = _history(folder / run_folder.METRICS, STEPS, missing, "the steps")
    air = _history(folder / "thermal.jsonl", AIR, missing, "temperatures; no thermometer was read")
    if not (any(mappings[name] for name in ("config", "origin", "result", "keep")) or phases or steps.lines):
        raise MisError(f"{folder} holds nothing of a run: give a run folder, such as runs/NAME-001")
    return RunRecord(
        folder=folder,
        **mappings,
        begun=next((r for r in phases if isinstance(r.get("planned"), list)), {}),
        phases=[r for r in phases if isinstance(r.get("phase"), str)],
        samples=[r for r in samples if "text" in r],
        table=_text(folder / "table.md", missing, "the recovery table"),
        steps=steps,
        air=air,
        missing=missing,
    )


def _text(path: Path, missing: list[str], what: str, name: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        missing.append(f"{name or path.name} is missing: {what}")
        return ""


def _mapping(folder: Path, name: str, missing: list[str], what: str) -> Mapping[str, Any]:
    before = len(missing)
    text = _text(folder / name, missing, what, name)
    try:
        value = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    if len(missing) == before:
        missing.append(f"{name} is damaged: {what}")
    return {}


def _records(path: Path, missing: list[str], what: str) -> list[dict[str, Any]]:
    if not path.is_file():
        missing.append(f"{path.name} is missing: {what}")
    return run_folder.records(path)


def _history(path: Path, names: Sequence[str], missing: list[str], what: str) -> History:
    history = history_of(path, names)
    if not history.lines:
        missing.append(f"{path.name} is missing: {what}")
    elif history.torn:
        missing.append(f"{path.name} has {history.torn} of {history.lines} lines that are no records; passed over")
    return history
