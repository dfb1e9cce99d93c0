"""What the one class that touches the disk promises, on a real disk."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest

from mis_mlx.storage.files import DISK, Files, as_mis_error
from mis_mlx.types import GIB, MisError


def test_write_makes_a_new_file_and_extend_grows_it(tmp_path: Path) -> None:
    """What is there already is not touched, by a link either; a misspelt name makes no file."""
    victim = tmp_path / "victim"
    DISK.write(victim, b"one")
    DISK.extend(victim, memoryview(b"two"))
    (tmp_path / "link").symlink_to(victim)
    for path in (victim, tmp_path / "link"):
        with pytest.raises(FileExistsError):
            DISK.write(path, b"new")
    with pytest.raises(FileNotFoundError):
        DISK.extend(tmp_path / "nowhere", b"x")
    assert victim.read_bytes() == b"onetwo"


def test_append_keeps_a_torn_line_apart(tmp_path: Path) -> None:
    """A half line of a crash does not swallow the next; a folder that is gone is a sentence."""
    log = tmp_path / "metrics.jsonl"
    DISK.append(log, '{"step": 1}')
    with open(log, "a") as file:
        file.write('{"st')
    DISK.append(log, '{"step": 2}')
    assert log.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']
    with pytest.raises(MisError, match=r"gone vanished: the log metrics\.jsonl was not saved"):
        DISK.append(tmp_path / "gone" / "metrics.jsonl", "{}")


def test_remove_tree_deletes_a_link_but_not_its_target(tmp_path: Path) -> None:
    """A leftover that is a link to somewhere else costs nothing there."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    DISK.remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "file").exists()


def test_fsync_falls_back_where_the_full_one_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told it is on macOS, it asks for F_FULLFSYNC, which this kernel refuses, then calls fsync."""
    synced: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 10**6, raising=False)  # EINVAL on every system
    monkeypatch.setattr(os, "fsync", synced.append)
    DISK.fsync(tmp_path)
    assert len(synced) == 1


def test_require_space_names_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needed (with a fifth to spare), free, where, and what to do are all in the sentence."""
    assert DISK.free_bytes(tmp_path / "a" / "b") > 0  # of a folder yet to be made
    free = [GIB, 2 * GIB]
    monkeypatch.setattr(DISK, "free_bytes", lambda path: free.pop(0))
    with pytest.raises(MisError) as caught:
        DISK.require_space(tmp_path, GIB, "the model")
    said = str(caught.value)
    assert all(word in said for word in (str(tmp_path), "1.20 GiB", "1.00 GiB"))
    DISK.require_space(tmp_path, GIB, "the model")


def test_make_folder_syncs_every_parent_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new folder's entry is made durable in its parent; folders that exist are left alone."""
    synced: list[Path] = []
    monkeypatch.setattr(DISK, "fsync", synced.append)
    for _ in range(2):
        DISK.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("broken", ["write", "fsync", "rename"])
def test_replace_text_is_all_or_nothing(tmp_path: Path, broken: str) -> None:
    """When any of its operations fails, the old text is there and no temporary file is."""
    path = tmp_path / "state.json"
    DISK.replace_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = Files()
    setattr(files, broken, refuse)
    with pytest.raises(MisError, match="Not enough disk space"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
    DISK.replace_text(path, "new: Miś")
    assert path.read_text() == "new: Miś"


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES"])
def test_a_refusing_disk_becomes_one_sentence(tmp_path: Path, name: str) -> None:
    """With the place and what to do; other errors keep their traceback."""
    number = getattr(errno, name)
    with pytest.raises(MisError) as caught, as_mis_error(tmp_path, "it", 3 * GIB, "do this"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith("do this")
    with pytest.raises(FileNotFoundError), as_mis_error(tmp_path, "it"):
        (tmp_path / "missing").read_bytes()
