"""Steps, folders and the lock, on a disk that works and on one that refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx.storage.checkpoint import (
    Saved,
    commit_folder,
    load_arrays,
    lock,
    newest,
    only_maker,
    save_step,
    sweep,
    write_once,
)
from mis_mlx.storage.files import DISK
from mis_mlx.types import GIB, MisError


def save(steps: Path, number: int, keep: int = 2) -> Path:
    """A step whose every array says its number."""
    arrays = {
        "model": {"w": mx.full((40,), number, dtype=mx.bfloat16), "b": mx.full((3,), number)},
        "optimizer": {"step": mx.array(number)},
    }
    return save_step(
        steps,
        number,
        arrays=arrays,
        state={"step": number, "rng": [1, number]},
        keep=keep,
    )


def is_whole(saved: Saved) -> bool:
    """The arrays and the state are those that `save` wrote."""
    model = load_arrays(saved, "model")
    optimizer = load_arrays(saved, "optimizer")
    n = saved.number
    return (
        model["w"].tolist() == [n] * 40
        and model["b"].tolist() == [n] * 3
        and optimizer["step"].item() == n
        and saved.state == {"step": n, "rng": [1, n]}
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_step_comes_back_and_only_two_are_kept(tmp_path: Path) -> None:
    """Steps 7 to 10 saved: 9 and 10 are left, 10 comes back, though 9 is of the future."""
    steps = tmp_path / "steps"
    assert newest(steps) is None
    for number in range(7, 11):
        save(steps, number)
    os.utime(steps / "step-00000009", (2**32, 2**32))
    saved = newest(steps)
    assert saved is not None
    assert (saved.number, saved.notes) == (10, ())
    assert is_whole(saved)
    assert names(steps) == ["step-00000009", "step-00000010"]
    assert names(saved.path) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": (lambda s: flip(s / "optimizer.safetensors"), "optimizer.safetensors"),
    "cut": (lambda s: os.truncate(s / "model.safetensors", 100), "model.safetensors"),
    "file gone": (lambda s: (s / "model.safetensors").unlink(), "model.safetensors is missing"),
    "state changed": (lambda s: flip(s / "state.json"), "state.json"),
    "manifest gone": (lambda s: (s / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "manifest a list": (lambda s: (s / "MANIFEST.json").write_text("[]"), "MANIFEST.json"),
    "manifest of another step": (
        lambda s: (s / "MANIFEST.json").write_text(
            (s.parent / "step-00001000/MANIFEST.json").read_text()
        ),
        "MANIFEST.json",
    ),
    "manifest edited": (
        lambda s: (p := s / "MANIFEST.json").write_text(
            p.read_text().replace('"bytes": ', '"bytes": 1')
        ),
        "MANIFEST.json",
    ),
    "file became a folder": (
        lambda s: ((s / "state.json").unlink(), (s / "state.json").mkdir()),
        "state.json: Is a directory",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_step_is_named_set_aside_and_survived(case: str, tmp_path: Path) -> None:
    """The one before is used; the damaged one has another name, and its number is free again."""
    save(tmp_path, 1000), save(tmp_path, 1200)
    damage, says = DAMAGE[case]
    damage(tmp_path / "step-00001200")
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.number == 1000
    assert is_whole(saved)
    assert saved.notes == (f"step 1200 is damaged ({says}), using 1000",)
    assert names(tmp_path) == [f"damaged-step-00001200-{os.getpid()}", "step-00001000"]
    save(tmp_path, 1200)
    again = newest(tmp_path)
    assert again is not None
    assert (again.number, again.notes) == (1200, ())
    assert is_whole(again)


def test_a_folder_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    """Neither a step nor a model is written over, not even an empty folder or a link."""
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("model", "link"):
        with (
            pytest.raises(MisError, match="exists already"),
            commit_folder(tmp_path / name, 0) as tmp,
        ):
            (tmp / "x").touch()
    assert names(tmp_path) == ["link", "model"]
    assert names(tmp_path / "model") == []
    save(tmp_path / "steps", 3)
    with pytest.raises(MisError, match="step-00000003 exists already"):
        save(tmp_path / "steps", 3)


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic, the remedy and the last good step are in the sentence; no file is made."""
    save(tmp_path, 1000)
    arrays = {"model": {"w": mx.zeros((GIB // 4, 3), dtype=mx.float32)}}  # lazy: never evaluated
    monkeypatch.setattr(DISK, "free_bytes", lambda path: int(1.2 * GIB))
    with pytest.raises(MisError) as caught:
        save_step(tmp_path, 1200, arrays=arrays, state={})
    said = str(caught.value)
    assert all(word in said for word in (str(tmp_path), "3.60 GiB", "1.20 GiB", "1000"))
    assert names(tmp_path) == ["step-00001000"]


HOLDER = """
import pathlib, sys, time
from mis_mlx.storage.checkpoint import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    """The sentence has the holder's number; after its end, or its error, the run is free."""
    run = tmp_path / "runs" / "first"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(MisError, match=rf"already in use by process {holder.pid} since 2"),
            lock(run),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with pytest.raises(ZeroDivisionError), lock(run):
        with pytest.raises(MisError, match=f"process {os.getpid()}"), lock(run):
            pass
        raise ZeroDivisionError
    with lock(run):
        assert str(os.getpid()) in (run / ".lock").read_text()


def test_of_those_who_wait_for_a_maker_that_gives_up_one_goes_on(tmp_path: Path) -> None:
    """Its lock is deleted; who has waited for that file holds a new one, and nothing is left."""
    said = list[str]()

    def second() -> bool:
        with only_maker(tmp_path / "made", said.append) as missing:
            with pytest.raises(MisError, match="already in use"), lock(tmp_path / ".made.lock"):
                pass
            return missing

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError), only_maker(tmp_path / "made", said.append):
            waiter = pool.submit(second)
            while not said:
                time.sleep(0.001)
            raise ZeroDivisionError
        assert waiter.result()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["m", "m[1]"])  # a name, no pattern
@pytest.mark.parametrize("end", ["-{}", "-rounded-{}-{}"])
def test_what_a_dead_process_left_is_swept(folder: str, end: str, tmp_path: Path) -> None:
    """Of the same folder, whatever it was for; not what a process that lives is making, nor of
    another folder.
    """
    name = f".tmp-{folder}{end}"
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    left, living = (
        tmp_path / name.replace("{}", str(number)) for number in (int(dead), os.getppid())
    )
    other = tmp_path / f".tmp-other-{int(dead)}"
    for path in (left, living, other):
        path.mkdir()
        (path / "half").write_bytes(b"x")
    with commit_folder(tmp_path / folder, 1) as tmp:
        DISK.write(tmp / "whole", b"y")
    assert not left.exists()
    assert living.exists()
    assert other.exists()
    assert [p.name for p in (tmp_path / folder).iterdir()] == ["whole"]
    for extra in (".trash-00000001-1", "notes"):
        (tmp_path / extra).mkdir()
    sweep(tmp_path)  # a folder that is one's own: whatever is half made or half deleted
    assert names(tmp_path) == sorted([folder, "notes"])


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_written_already_becomes_part_of_a_step(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second name, or by a copy on a disk that knows none; whoever wrote it may delete it, and
    a changed byte is found.
    """

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refused)
    steps = tmp_path / "steps"
    values = mx.arange(40)
    written = write_once(tmp_path / "values", {"w": values})
    for number in (1, 2):
        arrays = {"block": written, "count": {"n": mx.array(number)}}
        made = save_step(steps, number, arrays=arrays, state={})
        assert (made / "block.safetensors").samefile(written.path) == links
    DISK.remove_tree(written.path)
    saved = newest(steps)
    assert saved and saved.number == 2
    assert mx.array_equal(load_arrays(saved, "block")["w"], values)
    assert load_arrays(saved, "count")["n"].item() == 2
    path = saved.path / "block.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged = newest(steps)
    assert damaged is None if links else damaged and damaged.number == 1
