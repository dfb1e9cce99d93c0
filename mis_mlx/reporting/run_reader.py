"""What a run folder tells: every file may be missing, torn, or of another version.

Nothing in here is safe as HTML. Logs are thinned line by line: a million lines take the memory of a
thousand, and no spike is lost.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mis_mlx.storage import run_folder
from mis_mlx.types import MisError

STEPS = ("number", "loss", "tokens", "seconds", "peak_bytes")
KEEPS = ("pruned/keep.json", "distilled/keep.json", "model/keep.json")  # the first that is there
MAPPINGS = run_folder.CONFIG, run_folder.ORIGIN, run_folder.RESULT
LOST: dict[str, str] = yaml.safe_load(
    (Path(__file__).parent / "templates" / "lost.yaml").read_text("utf-8")
)
MOST_POINTS = 2400  # that a series keeps: when it has more, its runs become twice as long
LINE_BYTES = 1 << 16  # a longer line is no record of ours
MOST = 1000  # pauses that are kept one by one
BACKWARDS_S = 1.0  # a wall clock that jumps back further was set, or is another machine's

Point = tuple[float, float]
Record = Mapping[str, Any]  # of a log or a settings file
Pause = tuple[float, float, str]  # start, end, cause


@dataclass
class Series:
    """Values at places that never fall; of many, the extremes of each run of neighbours.

    All runs are equally long.
    """

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
            thinned = []
            for start in range(0, len(self._kept), 4):
                thinned += _extremes(self._kept[start : start + 4])
            self._kept = thinned
            self._width *= 2

    def points(self) -> list[Point]:
        """The kept values by place: all while there are few, later each run's extremes.

        The last value is always among them.
        """
        points = {*self._kept, *_extremes(self._run)}
        points.update(self._run[-1:])
        return sorted(points)


def _extremes(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest, in their order."""
    by_height = sorted(points, key=lambda point: point[1])
    ends = {*by_height[:1], *by_height[-1:]}
    return sorted(ends)


@dataclass
class History:
    """One log. Places in it are seconds since 1970, as the records have them, never falling."""

    series: dict[str, Series]
    lines: int = 0
    torn: int = 0  # lines that are no record
    first_s: float | None = None
    last_s: float = -math.inf
    pauses: list[Pause] = field(default_factory=list)  # of "pause" lines


def history_of(path: Path, names: Sequence[str]) -> History:
    """The numbers of these names, and "tokens_per_s", in a log, if there is one.

    A step done twice is in it twice.
    """
    history = History({name: Series() for name in (*names, "tokens_per_s")})
    behind = 0.0  # seconds by which the wall clock was set back
    pausing = False  # whether the last record is of a pause
    for record in run_folder.parsed(path, LINE_BYTES):
        history.lines += 1
        wall_s = finite(record.get("wall_s")) if record else None
        if not record or wall_s is None:
            history.torn += 1
            continue
        if wall_s + behind < history.last_s - BACKWARDS_S:
            behind = history.last_s - wall_s
        now = max(wall_s + behind, history.last_s)
        history.last_s = now
        if history.first_s is None:
            history.first_s = now
        for name, value in _values(record, names).items():
            history.series[name].add(now, value)
        room = pausing or len(history.pauses) < MOST
        paused = record.get("action") == "pause" and room
        if pausing:
            start, _, cause = history.pauses[-1]
            history.pauses[-1] = (start, now, cause)
        elif paused:
            cause = str(record.get("cause", ""))[:80]
            history.pauses.append((now, now, cause))
        pausing = paused
    return history


def _values(record: Record, names: Sequence[str]) -> dict[str, float]:
    """The numbers of these names in a record, as far as it has them; and "tokens_per_s"."""
    values = {}
    for name in names:
        value = finite(record.get(name))
        if value is not None:
            values[name] = value
    if values.get("seconds") and "tokens" in values:
        values["tokens_per_s"] = values["tokens"] / values["seconds"]
    return values


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        if math.isfinite(value):
            return float(value)
    return None


class RunRecord(NamedTuple):
    """A run; `result` is empty until its end.

    Where there was nothing to read, `missing` has a sentence.
    """

    name: str  # of its folder
    began_s: float  # since 1970, at which time begins on pictures
    config: Record
    origin: Record
    result: Record
    keep: Record
    begun: Record  # what the first start planned
    phases: Sequence[Record]
    samples: Sequence[Record]
    # to held-out prompts, prompt by prompt; none where nobody was asked
    answers: Sequence[Record]
    table: str
    steps: History
    air: History
    missing: Sequence[str]
    folder: Path

    def took(self) -> dict[str, float]:
        """Seconds of each phase; one that was stopped and resumed has more than one record."""
        seconds: dict[str, list[float]] = {}
        for record in self.phases:
            seconds.setdefault(record["phase"], []).append(record["seconds"])
        return {phase: sum(parts) for phase, parts in seconds.items()}


def _held(read: Callable[..., Any], *where: Any) -> Any:
    """What a file holds; None where it is not there, cannot be read, or holds something else."""
    with suppress(OSError, MisError):
        return read(*where)
    return None


def _without_answers(folder: Path, result: Record) -> list[str]:
    """A sentence where a run's result says that answers were judged, and their file has none."""
    path = folder / run_folder.ANSWERS
    if not finite(result.get("answers_prompts")) or _answers(folder):
        return []
    state = "missing"
    if path.is_file():
        state = "damaged"
    name = path.name
    return [f"{name} is {state}: {LOST[name]}"]


def _answers(folder: Path) -> list[dict[str, Any]]:
    records = run_folder.records(folder / run_folder.ANSWERS)
    return [record for record in records if "text" in record]


def _missing(folder: Path, files: Record) -> list[str]:
    """A sentence for each file that is missing, damaged or torn. files: {name: what it holds}."""
    missing = []
    for name, held in files.items():
        log = held if isinstance(held, History) else None
        lost = LOST[Path(name).name]
        if not (folder / name).is_file() or (log and not log.lines):
            missing.append(f"{name} is missing: {lost}")
        elif held is None:
            missing.append(f"{name} is damaged: {lost}")
        elif log and log.torn:
            missing.append(
                f"{name} has {log.torn} of {log.lines} lines that are not records; they are skipped"
            )
    return missing


def read(folder: Path) -> RunRecord:
    """Everything that is there. MisError when nothing of a run is."""
    keeps = (name for name in KEEPS if (folder / name).is_file())
    keep = next(keeps, KEEPS[0])
    phases = run_folder.records(folder / run_folder.PHASES)
    mappings = {}
    for name in (*MAPPINGS, keep):
        mappings[name] = _held(run_folder.stored_settings, folder, name)
    samples = run_folder.records(folder / run_folder.SAMPLES)
    table = _held((folder / "table.md").read_text, "utf-8", "replace")
    steps = history_of(folder / run_folder.METRICS, STEPS)
    air = history_of(folder / "thermal.jsonl", ("die_c", "ambient_c"))
    files = {
        run_folder.PHASES: phases,
        **mappings,
        run_folder.SAMPLES: samples,
        "table.md": table,
        run_folder.METRICS: steps,
        "thermal.jsonl": air,
    }
    config, origin, result, kept = (mapping or {} for mapping in mappings.values())
    missing = _missing(folder, files) + _without_answers(folder, result)
    if not (phases or any(mappings.values()) or steps.lines):
        raise MisError(f"{folder} is not a run folder: give one, such as runs/NAME-001")
    starts_of_run = (record for record in phases if isinstance(record.get("planned"), list))
    begun: Record = next(starts_of_run, {})
    starts = (finite(begun.get("wall_s")), steps.first_s, air.first_s)
    return RunRecord(
        name=folder.resolve().name,
        began_s=min((start for start in starts if start is not None), default=0.0),
        config=config,
        origin=origin,
        result=result,
        keep=kept,
        begun=begun,
        phases=[record for record in phases if isinstance(record.get("phase"), str)],
        samples=[record for record in samples if "text" in record],
        answers=_answers(folder),
        table=table or "",
        steps=steps,
        air=air,
        missing=missing,
        folder=folder,
    )
