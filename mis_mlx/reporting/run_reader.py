"""What a run folder tells: every file may be missing, torn, or of another version.

Nothing in here is safe as HTML.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mis_mlx.storage import run_folder
from mis_mlx.types import MisError

SCALES = "tune.jsonl"  # the steps in which scales learn
THERMAL = "thermal.jsonl"
KEEPS = ("pruned/keep.json", "distilled/keep.json", "model/keep.json")  # the first that is there
MAPPINGS = run_folder.CONFIG, run_folder.ORIGIN, run_folder.RESULT
LOST: dict[str, str] = yaml.safe_load(
    (Path(__file__).parent / "templates" / "lost.yaml").read_text("utf-8")
)
# {phase: the file that it writes}: in a run that has no such phase, nobody misses the file.
WRITTEN_BY = {"prune": KEEPS[0], "distil": run_folder.METRICS, "distil scales": SCALES}

Point = tuple[float, float]
Record = Mapping[str, Any]  # of a log or a settings file


def points_of(records: Sequence[Record], x: str, y: str) -> list[Point]:
    """(x, y) of the records in which both are numbers, by x; the last one counts of several."""
    found = {}
    for record in records:
        place = finite(record.get(x))
        value = finite(record.get(y))
        if place is not None and value is not None:
            found[place] = value
    return sorted(found.items())


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
    config: Record
    origin: Record
    result: Record
    keep: Record
    asked: Record  # the settings that were said
    begun: Record  # what the first start planned
    phases: Sequence[Record]
    # to held-out prompts, prompt by prompt; none where nobody was asked
    answers: Sequence[Record]
    table: str
    steps: Sequence[Record]  # in which weights learn
    scales: Sequence[Record]  # in which scales learn
    air: Sequence[Record]
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


def _missing(folder: Path, files: Record, planned: set[str]) -> list[str]:
    """A sentence for each file that is missing, damaged or torn.

    files: {name: what it holds; of a log, its lines, None for a torn one}. planned: the run's
    phases; empty: not known.
    """
    unwritten = {name for phase, name in WRITTEN_BY.items() if planned and phase not in planned}
    missing = []
    for name, held in files.items():
        lost = LOST[Path(name).name]
        if not (folder / name).is_file() or held == []:
            if name not in unwritten:
                missing.append(f"{name} is missing: {lost}")
        elif held is None:
            missing.append(f"{name} is damaged: {lost}")
        elif isinstance(held, list) and None in held:
            missing.append(
                f"{name} has {held.count(None)} of {len(held)} lines that are not records; they "
                f"are skipped"
            )
    return missing


def read(folder: Path) -> RunRecord:
    """Everything that is there. MisError when nothing of a run is."""
    keeps = (name for name in KEEPS if (folder / name).is_file())
    keep = next(keeps, KEEPS[0])
    mappings = {}
    for name in (*MAPPINGS, keep):
        mappings[name] = _held(run_folder.stored_settings, folder, name)
    table = _held((folder / "table.md").read_text, "utf-8", "replace")
    logs = {}
    for name in (run_folder.PHASES, run_folder.METRICS, SCALES, THERMAL):
        logs[name] = list(run_folder.parsed(folder / name))
    records = {name: [line for line in log if line is not None] for name, log in logs.items()}
    phases = records[run_folder.PHASES]
    steps = records[run_folder.METRICS]
    config, origin, result, kept = (mapping or {} for mapping in mappings.values())
    if not (phases or any(mappings.values()) or steps):
        raise MisError(f"{folder} is not a run folder: give one, such as runs/NAME-001")
    starts_of_run = (record for record in phases if isinstance(record.get("planned"), list))
    begun: Record = next(starts_of_run, {})
    plans = [plan for plan in begun.get("planned", []) if isinstance(plan, dict)]
    planned = {str(plan.get("phase")) for plan in plans}
    missing = _missing(folder, {**logs, **mappings, "table.md": table}, planned)
    return RunRecord(
        name=folder.resolve().name,
        config=config,
        origin=origin,
        result=result,
        keep=kept,
        asked=_held(run_folder.stored_settings, folder, run_folder.ASKED) or {},
        begun=begun,
        phases=[record for record in phases if isinstance(record.get("phase"), str)],
        answers=_answers(folder),
        table=table or "",
        steps=steps,
        scales=records[SCALES],
        air=records[THERMAL],
        missing=missing + _without_answers(folder, result),
        folder=folder,
    )
