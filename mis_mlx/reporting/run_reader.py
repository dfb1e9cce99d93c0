"""What a run folder tells, as far as it goes: every file may be missing, torn, or of another
version.

Nothing in here is safe as HTML. Logs are thinned line by line: a million take a thousand's memory,
no spike is lost.
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
LINE_BYTES = 1 << 16  # what is longer is no record of ours
MOST = 1000  # pauses that are kept one by one
BACKWARDS_S = 1.0  # a wall clock that jumps back further was set, or is another machine's

Point = tuple[float, float]


@dataclass
class Series:
    """Values at places that never fall; of many, the extremes of runs of neighbours, all runs
    equally long.
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
            pairs = (self._kept[at : at + 4] for at in range(0, len(self._kept), 4))
            self._kept = [point for pair in pairs for point in _extremes(pair)]
            self._width *= 2

    def points(self) -> list[Point]:
        """What is left, by place: every value while there are few, later the extremes of each run,
        and the last one.
        """
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
    # (start, end, cause) of "pause" lines
    pauses: list[tuple[float, float, str]] = field(default_factory=list)


def history_of(path: Path, names: Sequence[str]) -> History:
    """The numbers of these names, and "tokens_per_s", in a log, if there is one; a step done twice
    is in it twice.
    """
    history = History({name: Series() for name in (*names, "tokens_per_s")})
    # of the wall clock, since it was set back; whether the last record is of a pause
    behind = 0.0
    pausing = False
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
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
    return None


class RunRecord(NamedTuple):
    """A run; `result` is empty until its end. Where there was nothing to read, `missing` has a
    sentence.
    """

    name: str  # of its folder
    began_s: float  # since 1970, at which time begins on pictures
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    result: Mapping[str, Any]
    keep: Mapping[str, Any]
    begun: Mapping[str, Any]  # what the first start planned
    phases: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    # to held-out prompts, prompt by prompt; none where nobody was asked
    answers: Sequence[Mapping[str, Any]]
    table: str
    steps: History
    air: History
    missing: Sequence[str]

    def took(self) -> dict[str, float]:
        """Seconds of each phase; one that was stopped and taken up again has more than one
        record.
        """
        return {
            of["phase"]: sum(p["seconds"] for p in self.phases if p["phase"] == of["phase"])
            for of in self.phases
        }


def _held(read: Callable[..., Any], *where: Any) -> Any:
    """What a file holds; None where it is not there, cannot be read, or holds something else."""
    with suppress(OSError, MisError):
        return read(*where)
    return None


def _without_answers(folder: Path, result: Any) -> list[str]:
    """A sentence where a run's result says that answers were judged, and their file has none of
    them.
    """
    path = folder / run_folder.ANSWERS
    judged = isinstance(result, Mapping) and _number(result.get("answers_prompts"))
    if not judged or _answers(folder):
        return []
    state = "damaged" if path.is_file() else "missing"
    return [f"{path.name} is {state}: {LOST[path.name]}"]


def _answers(folder: Path) -> list[dict[str, Any]]:
    return [
        record for record in run_folder.records(folder / run_folder.ANSWERS) if "text" in record
    ]


def read(folder: Path) -> RunRecord:
    """Everything that is there. MisError when nothing of a run is."""
    keep = next((name for name in KEEPS if (folder / name).is_file()), KEEPS[0])
    files: dict[str, Any] = {
        run_folder.PHASES: run_folder.records(folder / run_folder.PHASES),
        **{name: _held(run_folder.stored_settings, folder, name) for name in (*MAPPINGS, keep)},
        run_folder.SAMPLES: run_folder.records(folder / run_folder.SAMPLES),
        "table.md": _held((folder / "table.md").read_text, "utf-8", "replace"),
        run_folder.METRICS: history_of(folder / run_folder.METRICS, STEPS),
        "thermal.jsonl": history_of(folder / "thermal.jsonl", ("die_c", "ambient_c")),
    }
    missing = list[str]()
    for name, held in files.items():
        log = held if isinstance(held, History) else None
        what = LOST[Path(name).name]
        if not (folder / name).is_file() or (log and not log.lines):
            missing.append(f"{name} is missing: {what}")
        elif held is None:
            missing.append(f"{name} is damaged: {what}")
        elif log and log.torn:
            missing.append(
                f"{name} has {log.torn} of {log.lines} lines that are no records; passed over"
            )
    missing += _without_answers(folder, files[run_folder.RESULT])
    phases, *mappings, samples, table, steps, air = files.values()
    if not (phases or any(mappings) or steps.lines):
        raise MisError(f"{folder} holds nothing of a run: give a run folder, such as runs/NAME-001")
    begun: Mapping[str, Any] = next((r for r in phases if isinstance(r.get("planned"), list)), {})
    phases = [r for r in phases if isinstance(r.get("phase"), str)]
    samples = [r for r in samples if "text" in r]
    first = (_number(begun.get("wall_s")), steps.first_s, air.first_s)
    place = folder.resolve().name, min((s for s in first if s is not None), default=0.0)
    config, origin, result, kept = (m or {} for m in mappings)
    return RunRecord(
        *place,
        config=config,
        origin=origin,
        result=result,
        keep=kept,
        begun=begun,
        phases=phases,
        samples=samples,
        answers=_answers(folder),
        table=table or "",
        steps=steps,
        air=air,
        missing=missing,
    )
