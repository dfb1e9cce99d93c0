"""The run folder: its name, its config.yaml, what a resumed run must share with the one it
continues.
"""

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
from mis_mlx.storage.files import Files, reported
from mis_mlx.types import Checkpoint, MisError

CONFIG = "config.yaml"
ORIGIN = "origin.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
PLAN = "plan.json"  # how the run trains: decided once, when it begins
NOT_STORED = ("out", "resume", "dry_run", "config")  # settings that say where and when, not what
PHASES = "phases.jsonl"  # what each start planned, then what each phase took
ANSWERS = "answers.jsonl"  # what the models answered to held-out prompts
SAMPLES = "samples.jsonl"  # what each model writes after the same words
# of an alignment, beside the run and its model: source and licence of what was learned
DATA = "data.json"
SAMPLE_BYTES = 4096


def create(
    out: str | None,
    name: str,
    settings: Mapping[str, Any],
    origin: Mapping[str, str],
    plan: Mapping[str, Any],
    files: Files,
) -> Path:
    """A new run folder (`out`, or the next free runs/NAME-001) with its settings, for `-c` too,
    what it was made from, and how it trains. MisError when `out` holds a run already.
    """
    if out is None:
        number = 1
        while (folder := Path("runs") / f"{name}-{number:03d}").exists():
            number += 1
    else:
        folder = Path(out)
        # What a crash before a run's config.yaml was written can have left is no run.
        unborn = re.compile(rf"\.lock|{ORIGIN}|{PLAN}|\.tmp-.*")
        if folder.exists() and not (
            folder.is_dir() and all(unborn.fullmatch(p.name) for p in folder.iterdir())
        ):
            raise MisError(
                f"{folder} is not empty: add --resume to continue the run in it, or choose another "
                f"--out"
            )
    with reported(folder.parent, "the run folder"):
        files.make_folder(folder)
    for file, value in ((ORIGIN, origin), (PLAN, plan)):
        files.replace_text(folder / file, json.dumps(dict(value), indent=2))
    # Last: a folder with config.yaml is a run that can be resumed.
    files.replace_text(
        folder / CONFIG, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    )
    return folder


def find(out: str | None, under: Path = Path("runs")) -> Path:
    """The run to continue: `out`, or the newest unfinished one right under `under`."""
    if out is not None:
        if not (Path(out) / CONFIG).is_file():
            raise MisError(f"{out} holds no run to continue: start one there without --resume")
        return Path(out)
    unfinished = [p.parent for p in under.glob(f"*/{CONFIG}") if not (p.parent / RESULT).exists()]
    if not unfinished:
        raise MisError(
            f"There is no unfinished run under {under}/: start one without --resume, or name it "
            f"with --out"
        )
    return max(unfinished, key=lambda p: (p / CONFIG).stat().st_mtime)


def stored_settings(folder: Path, file: str = CONFIG) -> dict[str, Any]:
    """The settings in a run's config.yaml, or what another `file` of it has. MisError where that
    does not read.
    """
    path = folder / file
    try:
        values = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(
            path.read_text(encoding="utf-8")
        )
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
    """Settings of a resumed run: the stored ones. MisError names a flag that asks for something
    else; one at its default asks for nothing, and `free` ones, which do not change the weights, may
    differ.
    """
    if strange := sorted(set(stored) - set(given)):
        why = f"The run's {CONFIG} has {strange[0]}, which this command does not know"
        raise MisError(f"{why}: resume it with the one that began it, or start a new run")
    result = dict(given)
    for name, value in given.items():
        if name not in stored or (name in free and value != defaults[name]):
            continue
        before = tuple(stored[name]) if isinstance(value, tuple) else stored[name]  # YAML has lists
        if value not in (before, defaults[name]):
            why = (
                f"The settings differ: --{name.replace('_', '-')} is {value}, the run has "
                f"{stored[name]}"
            )
            raise MisError(f"{why}: leave the flag out to continue, or start a new run")
        result[name] = before
    return result


def origin(teacher: Checkpoint, data: str) -> dict[str, str]:
    """What a resumed run must share: the data's fingerprint, the versions, and the teacher's: its
    config, its table of tensors, and 4 KiB from the middle of every tensor.
    """
    table = sorted((n, t.dtype, t.shape, t.nbytes) for n, t in teacher.tensors.items())
    digest = hashlib.sha256(json.dumps([dict(teacher.config), table], sort_keys=True).encode())
    for _, tensor in sorted(teacher.tensors.items()):
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + max(0, tensor.nbytes // 2 - SAMPLE_BYTES // 2))
            digest.update(file.read(min(SAMPLE_BYTES, tensor.nbytes)))
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")}
    return {"teacher": digest.hexdigest(), "data": data, "mis_mlx": __version__, **versions}


def same_origin(folder: Path, origin: Mapping[str, str]) -> list[str]:
    """MisError for another teacher or other data than the run began with; returned is what else
    changed, in words.
    """
    before = stored_settings(folder, ORIGIN)
    for name in ("teacher", "data"):
        if before.get(name) != origin[name]:
            why = (
                f"The {name} changed since {folder} began ({str(before.get(name))[:12]} is now "
                f"{origin[name][:12]})"
            )
            raise MisError(f"{why}: start a new run")
    changed = [(k, v) for k, v in origin.items() if before.get(k, v) != v]
    return [
        f"{k} was {before[k]}, is now {v}: the end may differ in the last bits" for k, v in changed
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl by step number. A torn line is passed over; of a repeated step the
    last counts.
    """
    by_number = {r["number"]: r for r in records(folder / METRICS) if "number" in r}
    return [by_number[number] for number in sorted(by_number)]


def records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log that `Files.append` wrote, line by line; a torn line is passed
    over.
    """
    return [record for record in parsed(path) if record is not None]


def parsed(path: Path, most_bytes: int = -1) -> Iterator[dict[str, Any] | None]:
    """Of each line of a log its JSON object, None where it is torn, none, or longer than
    `most_bytes`.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        while line := file.readline(most_bytes):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield record if isinstance(record, dict) else None
