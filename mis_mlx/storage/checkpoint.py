"""The commit protocol: a folder or a training step is on disk as a whole, or not at all.

A commit: check free space, fill a hidden folder next to the final place, sync every file and
folder, rename once, sync the parent. Older steps are deleted only after that. Steps are ordered by
number, because clocks jump.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import psutil

from mis_mlx.storage.files import AGAIN, DISK, as_mis_error, file_sha256, json_sha256, sweep
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import lazy, write_arrays
from mis_mlx.types import MisError

MANIFEST = "MANIFEST.json"
STATE = "state.json"
STEP = re.compile(r"step-(\d{8,})")
Arrays = Mapping[str, Mapping[str, mx.array]]  # by checkpoint file and name
ARRAYS = ".safetensors"  # how the name of a checkpoint file ends


class Saved(NamedTuple):
    """A step whose every byte was verified.

    notes: sentences about newer steps that could not be used.
    """

    number: int
    path: Path
    state: Mapping[str, Any]
    notes: tuple[str, ...]


class Written(NamedTuple):
    """A file of arrays that is on disk, synced, and never changes: a step needs only link it."""

    path: Path
    nbytes: int
    sha256: str


Entries = Mapping[str, Mapping[str, mx.array] | Written]  # by checkpoint file


def write_once(path: Path, named: Mapping[str, mx.array]) -> Written:
    """Write a new file of arrays, which no one may change afterwards."""
    facts = write_arrays(path, named)
    return Written(path, nbytes=facts["bytes"], sha256=facts["sha256"])


@contextlib.contextmanager
def commit_folder(
    final: Path, nbytes: int, what: str = "the model", remedy: str = AGAIN
) -> Iterator[Path]:
    """Make the folder `final` of the files that the block writes into another folder.

    All of it becomes durable, or nothing. nbytes: about how much the block writes. MisError when
    `final` exists, when space is short (before the block begins) or when the disk refuses a write.
    """
    if final.exists() or final.is_symlink():
        raise MisError(f"{final} exists already: choose another name or move it away")
    # `final` may itself be the hidden folder of another commit.
    stem = final.name.removeprefix(".tmp-")
    tmp = final.with_name(f".tmp-{stem}-{os.getpid()}")
    with as_mis_error(final.parent, what, nbytes, remedy):
        DISK.make_folder(final.parent)
        DISK.require_space(final.parent, nbytes, what, remedy)
        _remove_leftovers(tmp, stem)
        try:
            DISK.mkdir(tmp)
            yield tmp
            for path in sorted(tmp.rglob("*")):
                if not path.is_symlink():
                    DISK.fsync(path)
            DISK.fsync(tmp)
            DISK.rename(tmp, final)
            DISK.fsync(final.parent)  # from here on the folder survives a power cut
        except BaseException:
            DISK.discard(tmp)  # give the space back; what stays is swept at the next start
            raise


def _remove_leftovers(tmp: Path, stem: str) -> None:
    """Delete hidden folders of processes that are gone, or had this process's number."""
    for left in tmp.parent.glob(f".tmp-{glob.escape(stem)}-*"):
        number = left.name.rpartition("-")[2]
        if left == tmp:
            DISK.remove_tree(left)
        elif number.isdigit() and not psutil.pid_exists(int(number)):
            DISK.discard(left)  # it may be another user's


def save_step(
    steps_dir: Path,
    number: int,
    arrays: Entries,
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Commit step-<number> with one <key>.safetensors per entry of `arrays`, and state.json.

    Files that are `Written` become files of the step by a hard link, so whoever wrote them may
    delete them. Returns its path. Then deletes all but the last `keep` steps (2 or more). After a
    MisError older steps are as they were. `state` comes back as JSON reads it: tuples as lists,
    keys as text.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: with fewer than 2 steps one damaged file loses the run")
    final = steps_dir / f"step-{number:08d}"
    listed: dict[str, Any] = {}
    older = [n for n in _numbers(steps_dir) if n < number]
    last = f"the last good step is {older[-1]}" if older else "no step is saved yet"
    nbytes = 0
    for named in arrays.values():
        if not isinstance(named, Written):
            nbytes += sum(array.nbytes for array in named.values())
    remedy = f"free some and start again with --resume; {last}"
    with commit_folder(final, nbytes, "the checkpoint", remedy=remedy) as tmp:
        for key, named in arrays.items():
            file = f"{key}{ARRAYS}"
            if isinstance(named, Written):
                DISK.link(named.path, tmp / file)
            else:
                named = write_once(tmp / file, named)
            listed[file] = {"bytes": named.nbytes, "sha256": named.sha256}
        text = json.dumps(state, indent=2).encode()
        DISK.write(tmp / STATE, text)
        listed[STATE] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        manifest = {"step": number, "files": listed}
        manifest["sha256"] = json_sha256(manifest)
        DISK.write(tmp / MANIFEST, json.dumps(manifest, indent=2).encode())
    for old in [*older, number][:-keep]:
        with contextlib.suppress(OSError):  # an old step too many harms nobody
            trash = steps_dir / f".trash-{old:08d}-{os.getpid()}"
            DISK.rename(steps_dir / f"step-{old:08d}", trash)
            DISK.remove_tree(trash)
    return final


def newest(steps_dir: Path) -> Saved | None:
    """The highest step whose manifest and hashes are right, or None. Hold the `lock`.

    Leftovers of a crash are swept. A damaged step is set aside as damaged-step-..., never deleted.
    """
    return next(whole_steps(steps_dir), None)


def whole_steps(steps_dir: Path) -> Iterator[Saved]:
    """All steps whose manifest and hashes are right, the highest first; as `newest`."""
    if not steps_dir.is_dir():
        return
    sweep(steps_dir)
    damaged: list[str] = []
    for number in reversed(_numbers(steps_dir)):
        path = steps_dir / f"step-{number:08d}"
        why = _damage(path, number)
        if not why:
            state = json.loads((path / STATE).read_bytes())
            notes = tuple(f"{sentence}, using {number}" for sentence in damaged)
            yield Saved(number, path, state, notes)
            continue
        damaged.append(f"step {number} is damaged ({why})")
        with contextlib.suppress(OSError):
            DISK.rename(path, steps_dir / f"damaged-{path.name}-{os.getpid()}")


def load_arrays(saved: Saved, key: str) -> dict[str, mx.array]:
    """All arrays of <key>.safetensors, still lazy: evaluate them before the next step is saved."""
    tensors, _ = check(saved.path / f"{key}{ARRAYS}")
    return lazy(tensors, tensors)


@contextlib.contextmanager
def lock(
    folder: Path,
    what: str = "the lock of the run",
    remedy: str = "fix that and start again",
    wait: bool = False,
    waiting: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Hold a run's folder for this process. MisError names the process that holds it already.

    wait: wait for that process instead. waiting: is told its name before that. The kernel releases
    the lock when the holder ends, however it ends; the file .lock of a run stays. A fork of the
    holder holds the lock too, a subprocess does not.
    """
    path = folder / ".lock"
    while True:
        with as_mis_error(folder, what, remedy=remedy):
            DISK.make_folder(folder)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # its holder has deleted the folder just now
                continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 100, 0).decode(errors="replace").strip() or "another process"
                if not wait:
                    raise MisError(
                        f"Run {folder} is already in use by {holder}: wait for it or stop it"
                    ) from None
                if waiting:
                    waiting(holder)
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is_at(path, fd):  # deleted meanwhile: the next one would lock another file
                continue
            with as_mis_error(folder, what, remedy=remedy):
                holder = f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M')}"
                os.ftruncate(fd, 0)
                os.pwrite(fd, holder.encode(), 0)
            yield
            return
        finally:
            os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file is the one that stands there."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


@contextlib.contextmanager
def only_maker(made: Path, say: Callable[[str], object]) -> Iterator[bool]:
    """Whether this process is to make the folder or file `made`: False where it is there by now.

    Of several processes one makes it, and the others wait for that. Nothing else is left, whether
    it was made or not.
    """
    guard = made.with_name(f".{made.name}.lock")

    def waiting(holder: str) -> None:
        say(f"{holder} is making {made}: waiting for it")

    with lock(guard, f"the lock of {made.name}", wait=True, waiting=waiting):
        try:
            yield not made.exists()
        finally:
            DISK.discard(guard)


def _numbers(steps_dir: Path) -> list[int]:
    """Numbers of the steps present, rising; damaged ones included."""
    matches = [STEP.fullmatch(path.name) for path in steps_dir.glob("step-*")]
    return sorted(int(match[1]) for match in matches if match)


def _damage(path: Path, number: int) -> str:
    """A step's damage in a few words; empty when every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        claimed = manifest.pop("sha256")
        if (
            claimed != json_sha256(manifest)
            or manifest["step"] != number
            or STATE not in manifest["files"]
        ):
            return MANIFEST
        for name, facts in manifest["files"].items():
            if file_sha256(path / name) != facts["sha256"]:
                return name
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return MANIFEST
    return ""
