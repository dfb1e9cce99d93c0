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
from mis_mlx.storage.checkpoint import MANIFEST, STEP
from mis_mlx.types import MisError

FILE_BYTES = 64 * 2**20  # a small file of ours never comes near
STEPS = ("number", "loss", "tokens", "seconds", "peak_bytes")
AIR = ("die_c", "ambient_c")
KEPT_IN = ("pruned", "distilled", "model")  # folders that have keep.json, the first that does


@dataclass(frozen=True)
class Story:
    """A run. Mappings are empty, and `missing` has a sentence, where there was nothing to read."""

    folder: Path
    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    result: Mapping[str, Any]
    keep: Mapping[str, Any]
    model: Mapping[str, Any]  # config.json of the result
    sensitivity: Mapping[str, Any]  # {"nats": {matrix: {bits: a token}}}
    begun: Mapping[str, Any]  # what the first start planned
    phases: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    table: str
    steps: metrics_log.History
    air: metrics_log.History
    checkpoint: Mapping[str, Any]
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
        first = [_seconds(self.begun), self.steps.first_s, self.air.first_s]
        return min((s for s in first if s is not None), default=0.0)


def read(folder: Path) -> Story:
    """Everything that is there. MisError when nothing of a run is."""
    missing: list[str] = []
    config = _mapping(folder / run_folder.CONFIG, missing, "the settings")
    origin = _mapping(folder / run_folder.ORIGIN, missing, "versions and hashes")
    result = _mapping(folder / run_folder.RESULT, missing, "the result; the run has not come to its end")
    keep_at = next((folder / n / "keep.json" for n in KEPT_IN if (folder / n / "keep.json").is_file()), None)
    keep = _mapping(keep_at or folder / "pruned" / "keep.json", missing, "who was kept")
    model = _mapping(folder / "model" / "config.json", missing, "the model that came out")
    sensitivity = _mapping(
        folder / "model" / "sensitivity.json",
        missing,
        "what each matrix costs in fewer bits, measured where they are mixed",
    )
    begun, phases = _phases(folder / run_folder.PHASES, missing)
    samples = [r for r in _lines(folder / run_folder.SAMPLES, missing, "texts of the models") if "text" in r]
    table = _text(folder / "table.md")
    if table is None:
        missing.append("table.md is missing: the recovery table")
    steps = _history(folder / run_folder.METRICS, STEPS, missing, "the steps", {"tokens_per_s": ("tokens", "seconds")})
    air = _history(folder / "thermal.jsonl", AIR, missing, "temperatures; no thermometer was read")
    if not (config or origin or result or keep or phases or steps.lines):
        raise MisError(f"{folder} holds nothing of a run: give a run folder, such as runs/NAME-001")
    return Story(
        folder, config, origin, result, keep, model, sensitivity, begun, phases, samples, table or "", steps, air,
        _checkpoint(folder / "steps"), missing,
    )  # fmt: skip


def _seconds(record: Mapping[str, Any]) -> float | None:
    value = record.get("wall_s")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(path: Path) -> str | None:
    try:
        if path.stat().st_size > FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _mapping(path: Path, missing: list[str], what: str) -> Mapping[str, Any]:
    name = "/".join(path.parts[-2:]) if path.parent.name in KEPT_IN else path.name
    if (text := _text(path)) is None:
        missing.append(f"{name} is missing: {what}")
        return {}
    try:
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        missing.append(f"{name} is damaged: {what}")
        return {}
    return {str(k): v for k, v in value.items()}


def _lines(path: Path, missing: list[str], what: str) -> list[dict[str, Any]]:
    if not path.is_file() or path.stat().st_size > FILE_BYTES:
        missing.append(f"{path.name} is missing: {what}")
        return []
    return run_folder.records(path)


def _phases(path: Path, missing: list[str]) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    records = _lines(path, missing, "the plan, and what each phase took")
    planned = [r for r in records if isinstance(r.get("planned"), list)]
    return (planned[0] if planned else {}), [r for r in records if isinstance(r.get("phase"), str)]


def _history(
    path: Path, names: Sequence[str], missing: list[str], what: str, ratios: Mapping[str, tuple[str, str]] | None = None
) -> metrics_log.History:
    found = metrics_log.read(path, names, ratios)
    if not found.lines:
        missing.append(f"{path.name} is missing: {what}")
    elif found.torn:
        missing.append(f"{path.name} has {found.torn} of {found.lines} lines that are no records; passed over")
    return found


def _checkpoint(steps: Path) -> Mapping[str, Any]:
    """The newest checkpoint's manifest: its step and hash."""
    found = sorted(p for p in steps.glob("step-*") if STEP.fullmatch(p.name)) if steps.is_dir() else []
    return _mapping(found[-1] / MANIFEST, [], "") if found else {}
