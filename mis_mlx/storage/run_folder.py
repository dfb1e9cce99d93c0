"""The run folder: its name, its settings, and the check that a resumed run is the same run."""

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
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.types import Checkpoint, MisError

ASKED = "asked.yaml"  # the settings that were said; the first file of a run
CONFIG = "config.yaml"  # all settings, once they are decided
ORIGIN = "origin.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
PLAN = "plan.json"  # how the run trains: decided once, when it begins
NOT_STORED = ("out", "resume", "dry_run", "config")  # settings that say where and when, not what
PHASES = "phases.jsonl"  # what each start planned, then what each phase took
ANSWERS = "answers.jsonl"  # the models' answers to held-out prompts
LATER = "second turn"  # kind of those prompts that say little without the turns before
# Source and license of the data of an alignment, beside the run and its model.
DATA = "data.json"
TAKEN = "taken.json"  # seconds, memory and tea breaks so far
SEARCH = "search"  # the folder, in a run's, of the search for its sizes
SAMPLE_BYTES = 4096  # of every tensor, for the teacher's fingerprint
# In origin.json, each with its words: what trains and is trained on, the text that judges, the
# model that is rounded, a student that was given, and the user's file of rewards.
WORDS = {
    "teacher": "teacher",
    "data": "data",
    "held_out": "held-out text",
    "model": "model",
    "student": "student",
    "rewards": "file of reward functions",
}
SAME = ("teacher", "data")  # a run goes on with these alone
# What a crash can leave in a folder before its run has begun, and the Finder in any. It is no run.
_UNBORN = re.compile(rf"\.DS_Store|\.lock|{ORIGIN}|{TAKEN}|\.tmp-.*")
# What the folder of a run holds before any work was done in it.
_BARE = re.compile(rf"\.DS_Store|\.lock|{ASKED}|{PLAN}|{CONFIG}|{TAKEN}|\.tmp-.*")
# The same, and a search: origin.json is still to be written.
_UNMADE = re.compile(rf"{_BARE.pattern}|{SEARCH}")


def make(out: str | None, name: str) -> Path:
    """The empty folder of a new run: `out`, or the next free runs/NAME-001.

    Two processes never get the same runs/NAME-001. MisError when `out` holds a run already.
    """
    if out is not None:
        folder = Path(out)
        _refuse_taken(folder)
        with as_mis_error(folder.parent, "the run folder"):
            DISK.make_folder(folder)
        return folder
    first = Path("runs") / name
    with as_mis_error(first.parent, "the run folder"):
        DISK.make_folder(first.parent)
        number = 1
        while True:
            folder = first.with_name(f"{first.name}-{number:03d}")
            with suppress(FileExistsError):
                DISK.mkdir(folder)
                DISK.fsync(folder.parent)
                return folder
            number += 1


def _refuse_taken(folder: Path) -> None:
    """MisError where a folder holds more than what a crash before its run began can have left."""
    if folder.exists() and not (folder.is_dir() and _holds_only(folder, _UNBORN)):
        raise MisError(
            f"{folder} is not empty: add --resume to continue the run in it, or choose another "
            f"--out"
        )


def _holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    return all(names.fullmatch(path.name) for path in folder.iterdir())


def begin(folder: Path, asked: Mapping[str, Any]) -> None:
    """Make a folder, which this process has locked, that of a run, which can be resumed.

    asked: the settings that were said; the rest is to be decided. MisError when it holds a run.
    """
    _refuse_taken(folder)
    DISK.replace_text(folder / ASKED, _as_yaml(asked))


def decide(
    folder: Path,
    settings: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> None:
    """Write what a run is: settings for config.yaml, which `-c` reads, too, and how it trains."""
    _write_json(folder / PLAN, plan)
    DISK.replace_text(folder / CONFIG, _as_yaml(settings))  # last


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(dict(values), indent=2)
    DISK.replace_text(path, text)


def _as_yaml(settings: Mapping[str, Any]) -> str:
    """The settings that a run keeps."""
    kept = dict(settings)
    for name in NOT_STORED:
        kept.pop(name, None)
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def forget_bare(folder: Path) -> None:
    """Delete the folder of a new run that was refused before any work."""
    if folder.is_dir() and _holds_only(folder, _BARE):
        DISK.discard(folder)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: --resume continues it."""
    return is_decided(folder) or (folder / ASKED).is_file()


def is_decided(folder: Path) -> bool:
    """Whether all settings of a run are decided: a search for sizes, if there was one, is over."""
    return (folder / CONFIG).is_file()


def all_under(under: Path) -> list[Path]:
    """The runs directly in a folder."""
    return [folder for folder in under.glob("*") if is_run(folder)]


def began_s(folder: Path) -> float:
    """When a run's settings were written, in seconds since 1970. OSError where they are gone."""
    name = CONFIG if is_decided(folder) else ASKED
    return (folder / name).stat().st_mtime


def find(out: str | None, under: Path = Path("runs")) -> Path:
    """The run to continue: `out`, or the newest unfinished one directly under `under`."""
    if out is not None:
        if not is_run(Path(out)):
            raise MisError(f"{out} holds no run to continue: start one there without --resume")
        return Path(out)
    unfinished = []
    for folder in all_under(under):
        if not (folder / RESULT).exists():
            unfinished.append(folder)
    if not unfinished:
        raise MisError(
            f"There is no unfinished run under {under}/: start one without --resume, or name it "
            f"with --out"
        )
    return max(unfinished, key=began_s)


def asked_settings(folder: Path) -> dict[str, Any]:
    """The settings that were said when a run began."""
    return stored_settings(folder, ASKED)


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
    *,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings of a resumed run: the stored ones, and those `given` now that are `free`.

    given: what the command that resumes says. defaults: of all settings; a run has them where
    `stored` says nothing. free: flags that may differ, because they do not change the weights.
    asked: what the command said that began the run; it may be said again, whatever was decided
    then. MisError names a flag that asks for something else.
    """
    unknown = sorted(set(stored) - set(defaults))
    if unknown:
        why = f"The run's {CONFIG} has {unknown[0]}, which this command does not know"
        raise MisError(f"{why}: resume it with the command that began it, or start a new run")
    begun = _with_tuples(asked or {})
    result = {**defaults, **_with_tuples(stored)}
    for name, value in given.items():
        before = result[name]
        if name in free:
            result[name] = value
        elif value not in (before, begun.get(name, before)):
            flag = f"--{name.replace('_', '-')}"
            why = f"The settings differ: {flag} is {value}, but the run has {before}"
            raise MisError(f"{why}: leave the flag out to continue, or start a new run")
    return result


def _with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that YAML or JSON holds: these have lists."""
    values = dict(settings)
    for name, value in settings.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return values


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


def same_origin(
    folder: Path,
    origin: Mapping[str, str],
    same: tuple[str, ...] = SAME,
) -> list[str]:
    """Keep what a run was made from; of one that goes on, check it.

    MisError where one of `same` is another than the run began with. Returns sentences about
    everything else that changed.
    """
    if not (folder / ORIGIN).exists() and _holds_only(folder, _UNMADE):
        _write_json(folder / ORIGIN, origin)
        return []
    before = stored_settings(folder, ORIGIN)
    notes = []
    for name, now in origin.items():
        then = before.get(name)
        if then == now:
            continue
        if name in same:
            raise MisError(
                f"The {WORDS[name]} changed since {folder} began ({str(then)[:12]} is now "
                f"{now[:12]}): start a new run"
            )
        if name in WORDS:
            notes.append(f"the {WORDS[name]} changed: the figures are of what it is now")
        else:
            notes.append(f"{name} was {then}, is now {now}: the result may differ in the last bits")
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
