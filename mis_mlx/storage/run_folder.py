"""The run folder: its name, its config.yaml, and the check that a resumed run is the same run."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mis_mlx import __version__
from mis_mlx.storage.files import Files, as_mis_error
from mis_mlx.types import Checkpoint, MisError

CONFIG = "config.yaml"
ORIGIN = "origin.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
PLAN = "plan.json"  # how the run trains: decided once, when it begins
NOT_STORED = ("out", "resume", "dry_run", "config")  # settings that say where and when, not what
PHASES = "phases.jsonl"  # what each start planned, then what each phase took
ANSWERS = "answers.jsonl"  # the models' answers to held-out prompts
LATER = "second turn"  # kind of those prompts that say little without the turns before
SAMPLES = "samples.jsonl"  # what each model writes after the same words
# Source and licence of the data of an alignment, beside the run and its model.
DATA = "data.json"
SAMPLE_BYTES = 4096  # of every tensor, for the teacher's fingerprint
# What a crash can leave in a folder before the run's config.yaml is written. It is no run.
_UNBORN = re.compile(rf"\.lock|{ORIGIN}|{PLAN}|\.tmp-.*")


def create(
    out: str | None,
    name: str,
    settings: Mapping[str, Any],
    origin: Mapping[str, str],
    plan: Mapping[str, Any],
    files: Files,
) -> Path:
    """A new run folder, `out` or the next free runs/NAME-001, with settings, origin and plan.

    settings: for config.yaml, which `-c` reads too. origin: what it was made from. plan: how it
    trains. MisError when `out` holds a run already.
    """
    folder = _next_free(name) if out is None else Path(out)
    if out is not None and folder.exists() and not _is_unborn(folder):
        raise MisError(
            f"{folder} is not empty: add --resume to continue the run in it, or choose another "
            f"--out"
        )
    with as_mis_error(folder.parent, "the run folder"):
        files.make_folder(folder)
    for file, value in ((ORIGIN, origin), (PLAN, plan)):
        files.replace_text(folder / file, json.dumps(dict(value), indent=2))
    # Last: a folder with config.yaml is a run that can be resumed.
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    files.replace_text(folder / CONFIG, text)
    return folder


def _next_free(name: str) -> Path:
    """The first of runs/NAME-001, runs/NAME-002 ... that does not exist."""
    number = 1
    while True:
        folder = Path("runs") / f"{name}-{number:03d}"
        if not folder.exists():
            return folder
        number += 1


def _is_unborn(folder: Path) -> bool:
    """Whether it holds nothing, or only what a crash before the run began can have left."""
    return folder.is_dir() and all(_UNBORN.fullmatch(path.name) for path in folder.iterdir())


def find(out: str | None, under: Path = Path("runs")) -> Path:
    """The run to continue: `out`, or the newest unfinished one directly under `under`."""
    if out is not None:
        if not (Path(out) / CONFIG).is_file():
            raise MisError(f"{out} holds no run to continue: start one there without --resume")
        return Path(out)
    folders = [path.parent for path in under.glob(f"*/{CONFIG}")]
    unfinished = [folder for folder in folders if not (folder / RESULT).exists()]
    if not unfinished:
        raise MisError(
            f"There is no unfinished run under {under}/: start one without --resume, or name it "
            f"with --out"
        )
    return max(unfinished, key=lambda folder: (folder / CONFIG).stat().st_mtime)


def stored_settings(folder: Path, file: str = CONFIG) -> dict[str, Any]:
    """The settings in a run's config.yaml, or the values in another `file` of the run.

    MisError if it is missing or damaged.
    """
    path = folder / file
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise MisError(f"{path} is missing or damaged: start a new run")
    return values


def merged(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    stored: Mapping[str, Any],
    free: frozenset[str],
) -> dict[str, Any]:
    """Settings of a resumed run: the stored ones, and those `given` now that are `free`.

    given: what the command that resumes says. defaults: of all settings; a run has them where
    `stored` says nothing. free: flags that may differ, because they do not change the weights.
    MisError names a flag that asks for something else.
    """
    unknown = sorted(set(stored) - set(defaults))
    if unknown:
        why = f"The run's {CONFIG} has {unknown[0]}, which this command does not know"
        raise MisError(f"{why}: resume it with the command that began it, or start a new run")
    result = dict(defaults)
    for name, value in stored.items():
        result[name] = tuple(value) if isinstance(value, list) else value  # YAML has lists
    for name, value in given.items():
        before = result[name]
        if name not in free and value != before:
            flag = f"--{name.replace('_', '-')}"
            why = f"The settings differ: {flag} is {value}, but the run has {before}"
            raise MisError(f"{why}: leave the flag out to continue, or start a new run")
        result[name] = value
    return result


def origin(teacher: Checkpoint, data: str) -> dict[str, str]:
    """What a resumed run must share: the data's and the teacher's fingerprints, and versions.

    The teacher's is of its config, its table of tensors, and 4 KiB from the middle of every tensor.
    """
    table = sorted((name, t.dtype, t.shape, t.nbytes) for name, t in teacher.tensors.items())
    described = json.dumps([dict(teacher.config), table], sort_keys=True)
    digest = hashlib.sha256(described.encode())
    for _, tensor in sorted(teacher.tensors.items()):
        middle = max(0, tensor.nbytes // 2 - SAMPLE_BYTES // 2)
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + middle)
            digest.update(file.read(min(SAMPLE_BYTES, tensor.nbytes)))
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")}
    return {"teacher": digest.hexdigest(), "data": data, "mis_mlx": __version__, **versions}


def same_origin(folder: Path, origin: Mapping[str, str]) -> list[str]:
    """MisError for another teacher or other data than the run began with.

    Returns sentences about everything else that changed.
    """
    before = stored_settings(folder, ORIGIN)
    for name in ("teacher", "data"):
        if before.get(name) != origin[name]:
            then = str(before.get(name))[:12]
            why = f"The {name} changed since {folder} began ({then} is now {origin[name][:12]})"
            raise MisError(f"{why}: start a new run")
    notes = []
    for name, now in origin.items():
        if before.get(name, now) != now:
            notes.append(
                f"{name} was {before[name]}, is now {now}: the result may differ in the last bits"
            )
    return notes


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl by step number. Torn lines are skipped; a step's last one counts."""
    logged = [record for record in records(folder / METRICS) if "number" in record]
    by_number = {record["number"]: record for record in logged}
    return [by_number[number] for number in sorted(by_number)]


def records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log that `Files.append` wrote, one a line; torn lines are skipped."""
    return [record for record in parsed(path) if record is not None]


def parsed(path: Path, most_bytes: int = -1) -> Iterator[dict[str, Any] | None]:
    """The JSON object of each line of a log; None for a line that is torn or holds no object.

    A line longer than `most_bytes` is torn, too; -1: no line is.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        while line := file.readline(most_bytes):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield record if isinstance(record, dict) else None
