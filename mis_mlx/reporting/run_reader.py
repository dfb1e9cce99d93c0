"""What a run folder tells, as far as it goes: every file may be missing, torn, or of another version.

Knows files and plain values. Does not know what becomes of them; nothing in here is to be trusted as HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mis_mlx.reporting import metrics_log
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError

STEPS = ("number", "loss", "tokens", "seconds", "peak_bytes")
AIR = ("die_c", "ambient_c")
KEEPS = ("pruned/keep.json", "distilled/keep.json", "model/keep.json")  # the first that is there


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
    steps: metrics_log.History
    air: metrics_log.History
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


def _history(path: Path, names: Sequence[str], missing: list[str], what: str) -> metrics_log.History:
    history = metrics_log.read(path, names)
    if not history.lines:
        missing.append(f"{path.name} is missing: {what}")
    elif history.torn:
        missing.append(f"{path.name} has {history.torn} of {history.lines} lines that are no records; passed over")
    return history
