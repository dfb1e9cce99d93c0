"""Runs, as folders and processes: listed, started one at a time, stopped, resumed.

What the page starts is written down under runs/.studio, so that a page that is opened later, by
another process, finds it.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mis_mlx.hardware import jobs
from mis_mlx.hardware.jobs import Started
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, as_mis_error, sweep
from mis_mlx.types import MisError, gib

RUNS = Path("runs")
BOOKS = RUNS / ".studio"  # logs and records of what the page started
HELD = re.compile(r"process (\d+) since")  # what storage/checkpoint.lock writes
TAIL_BYTES = 4096  # of a log, that are looked at
# states of a run
RUNNING = "running"
FINISHED = "finished"
STOPPED = "stopped"


@dataclass(frozen=True)
class Job:
    """A `distill` that the page started. flags: without those of a resumed run."""

    flags: tuple[str, ...]
    pid: int = 0
    created_s: float = 0.0
    began_s: float = 0.0  # since 1970

    @property
    def started(self) -> Started:
        """Its process."""
        return Started(self.pid, self.created_s)


@dataclass(frozen=True)
class Listed:
    """A run, by name. worker: the process that works on it now, whoever started that; None where
    there is none. job: None where the page has never started it.
    """

    name: str
    worker: Started | None
    state: str
    began_s: float
    job: Job | None
    model_bytes: int

    @property
    def folder(self) -> Path:
        """Where it works. It may not be there yet."""
        return RUNS / self.name

    @property
    def log(self) -> Path:
        """What its process says."""
        return BOOKS / f"{self.name}.log"


def listed() -> list[Listed]:
    """All runs right under runs/, and those that have no folder yet; the newest first."""
    names = set[str]()
    known = [folder.name for folder in run_folder.all_under(RUNS)]
    known += [path.stem for path in BOOKS.glob("*.json")]
    for name in known:
        shown = name.isprintable() and not name.startswith(".")
        if shown and not (RUNS / name).is_symlink():
            names.add(name)
    found = [_listed(name) for name in names]
    return sorted(found, key=lambda run: (-run.began_s, run.name))


def named(name: object) -> Listed:
    """The run of this name. MisError where there is none: a name is never made into a path."""
    for run in listed():
        if run.name == name:
            return run
    raise MisError("this run does not exist any more: choose another one")


def _listed(name: str) -> Listed:
    folder = RUNS / name
    job = _job(name)
    worker = _worker(folder, job)
    state = STOPPED
    if worker:
        state = RUNNING
    elif (folder / run_folder.RESULT).is_file():
        state = FINISHED
    began_s = job.began_s if job else 0.0
    with contextlib.suppress(OSError):
        began_s = began_s or run_folder.began_s(folder)
    model_bytes = 0
    with contextlib.suppress(OSError):
        for file in (folder / "model").glob("*.safetensors"):
            model_bytes += file.stat().st_size
    return Listed(
        name=name,
        worker=worker,
        state=state,
        began_s=began_s,
        job=job,
        model_bytes=model_bytes,
    )


def _job(name: str) -> Job | None:
    try:
        values = json.loads((BOOKS / f"{name}.json").read_text("utf-8"))
        return Job(**{**values, "flags": tuple(map(str, values["flags"]))})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _worker(folder: Path, job: Job | None) -> Started | None:
    """The process that works on it: ours, or the one that holds its lock."""
    if job and job.pid and jobs.alive(job.started):
        return job.started
    with contextlib.suppress(OSError):
        held = HELD.match((folder / ".lock").read_text("utf-8", "replace"))
        if held and _locked(folder / ".lock"):
            return jobs.holder(int(held[1]))
    return None


def _locked(path: Path) -> bool:
    """Whether somebody holds this lock."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def make_books() -> None:
    """Make the folder of records. MisError where a file is in its place."""
    for _ in BOOKS.parts:
        with contextlib.suppress(FileExistsError):  # two may make each part at the same moment
            DISK.make_folder(BOOKS)
    if not BOOKS.is_dir():
        raise MisError(
            f"{RUNS} or {BOOKS} is a file here: move it away, or start in another folder"
        )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nobody else starts or resumes meanwhile, in this process or another.

    What a crash left half-written goes.
    """
    with as_mis_error(RUNS, "the list of runs"):
        make_books()
        with (BOOKS / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            sweep(BOOKS)
            yield


def running() -> Listed | None:
    """The run at work, if there is one."""
    return next((run for run in listed() if run.state == RUNNING), None)


def _refuse_second() -> None:
    busy = running()
    if busy:
        raise MisError(f"{busy.name} is running, and one run at a time fits: stop it or wait")


def start(model: str, flags: Sequence[str]) -> str:
    """Start `distill` with these flags in a new run; its name. MisError while another one runs."""
    stem = re.sub(r"[^\w.-]", "-", model).strip("-.")[:60] or "run"
    with _alone():
        _refuse_second()
        name = _free_name(stem)
        job = Job(flags=tuple(flags))
        try:
            _begin(name, job, [*flags, "--out", str(RUNS / name)])
        except MisError:
            for path in (BOOKS / f"{name}.json", BOOKS / f"{name}.log"):
                DISK.discard(path)  # a full disk may have taken a part of it
            raise
    return name


def _free_name(stem: str) -> str:
    number = 1
    while True:
        name = f"{stem}-{number:03d}"
        if not (RUNS / name).exists() and not (BOOKS / f"{name}.json").exists():
            return name
        number += 1


def _begin(name: str, job: Job, line: Sequence[str]) -> None:
    """Start the process and write it down. Where that cannot be written, nothing runs."""
    record = BOOKS / f"{name}.json"
    _write(record, job)  # a full disk says so before anything runs
    started = jobs.start("distill", line, BOOKS / f"{name}.log")
    known = replace(job, **started._asdict(), began_s=time.time())
    try:
        _write(record, known)
    except MisError:
        jobs.stop(started, at_once=True)
        raise


def _write(path: Path, job: Job) -> None:
    DISK.replace_text(path, json.dumps(asdict(job)))


def resume(name: object) -> None:
    """Go on with a run that was stopped: from its last checkpoint, or its search."""
    with _alone():
        run = named(name)
        _refuse_second()
        if run.state == FINISHED:
            raise MisError(f"{run.name} is finished: there is nothing to go on with")
        line = ["--out", str(run.folder)]
        if run_folder.is_run(run.folder):
            line.append("--resume")
        elif run.job:
            line = [*run.job.flags, *line]
        else:
            raise MisError(f"{run.name} holds no run that could go on: start a new one")
        _begin(run.name, run.job or Job(()), line)


def stop(name: object, at_once: bool) -> None:
    """Ask a run to stop after this step, with all of it saved; or end its process now."""
    run = named(name)
    if not run.worker:
        raise MisError(f"{run.name} has ended: there is nothing to stop")
    jobs.stop(run.worker, at_once)


def last_lines(run: Listed, count: int) -> list[str]:
    """The last lines that a run's process said."""
    try:
        with run.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith("{")]
    return said[-count:]


def held(run: Listed) -> dict[str, Any]:
    """What a run was begun with: the first record of phases.jsonl; {} where there is none yet."""
    for record in run_folder.parsed(run.folder / run_folder.PHASES, 1 << 16):
        if record and isinstance(record.get("planned"), list):
            return record
    return {}


def check_fits(what: str, nbytes: int) -> None:
    """MisError where a model does not fit beside the run at work, and what else is in memory."""
    left = jobs.free_bytes()
    busy = running()
    beside = ""
    if busy and busy.worker:
        budget = held(busy).get("budget_bytes")
        # What the run may still take, it will.
        if isinstance(budget, int):
            left -= max(0, budget - jobs.held_bytes(busy.worker.pid))
        beside = f" next to {busy.name}"
    if nbytes > left:
        why = f"{what} needs {gib(nbytes)}, {gib(max(0, left))} are free{beside}"
        remedy = "wait for the run or stop it" if busy else "close other programs"
        raise MisError(f"{why}: {remedy}")
