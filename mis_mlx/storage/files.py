"""Every file operation of a run, in one small class, so that a test can make the N-th one fail."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mis_mlx.types import MisError, gib

CHUNK = 1 << 26  # bytes per pwrite(2): macOS refuses 2 GiB and more in one call
AGAIN = "free some and start again"
LEFTOVER = (".tmp-", ".trash-")
SPARE = 1.2  # free space asked for, as a multiple of what will be written

FULL = (errno.ENOSPC, errno.EDQUOT)
# What a file system says that has no second names, or has them on one disk only.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK)
BROKEN = {
    errno.EFBIG: "The disk does not accept files this large",
    **dict.fromkeys(
        (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE), "The disk stopped answering"
    ),
    errno.EROFS: "The disk is read-only",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Writing is not allowed"),
}


class DiskRefused(MisError):
    """A disk took no more, for a reason that may be gone later: the work can go on then."""


class Files:
    """The real disk. Methods raise OSError; callers wrap them in `as_mis_error`.

    Nothing here ever writes over the bytes of an existing file: an array that MLX loaded lazily
    from it would change silently. Files are made new (`write`, then `extend`) and put in place with
    `rename`.
    """

    def mkdir(self, path: Path) -> None:
        """Make one new folder; its parent must exist."""
        os.mkdir(path)

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Make a new file that holds `data`. FileExistsError when there is one already."""
        with open(path, "xb") as file:
            file.write(data)

    def extend(self, path: Path, data: bytes | memoryview) -> None:
        """Add `data` to the end of a file that `write` made."""
        with open(path, "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(data)

    def add_line(self, path: Path, line: str) -> None:
        """Add one line to the end of a file, which is made if necessary.

        A last line that a crash tore is ended first. Of several processes one adds at a time.
        """
        with open(path, "a+b") as file:
            with contextlib.suppress(OSError):  # not every disk knows locks
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    line = "\n" + line
            file.write(line.encode() + b"\n")

    def scratch(self, folder: Path) -> int:
        """A descriptor of a new file in `folder` that has no name and ends with the process."""
        with tempfile.TemporaryFile(prefix=".tmp-scratch-", dir=folder, buffering=0) as file:
            return os.dup(file.fileno())

    def put(self, fd: int, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset` of a `scratch` file."""
        while data:
            written = os.pwrite(fd, data[:CHUNK], offset)
            data = data[written:]
            offset = offset + written

    def fsync(self, path: Path) -> None:
        """Make the bytes of a file, or the entries of a folder, survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if sys.platform == "darwin":
                # fsync(2) on macOS leaves the bytes in the drive's own cache; F_FULLFSYNC empties
                # that cache, too.
                try:
                    fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                    return
                except OSError as error:  # network and some external disks do not know it
                    if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                        raise
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target` in one step."""
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give the file `source` a second name; where the disk knows no such thing, copy it."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copyfile(source, target)

    def remove_tree(self, path: Path) -> None:
        """Delete a folder with its contents, or one file; a link is deleted, never followed."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def free_bytes(self, path: Path) -> int:
        """Free bytes on the disk where `path` is or, if it does not exist yet, will be."""
        path = path.absolute()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    # The methods below use those above, so a test that breaks one of those breaks these, too.

    def append(self, path: Path, line: str) -> None:
        """`add_line` to a log such as metrics.jsonl; MisError when the disk refuses."""
        with as_mis_error(path.parent, f"the log {path.name}"):
            self.add_line(path, line)

    def discard(self, path: Path) -> None:
        """`remove_tree` of something that only takes space: if the disk refuses, it stays."""
        with contextlib.suppress(OSError):
            self.remove_tree(path)

    def make_folder(self, path: Path) -> None:
        """Make `path` and its missing parents durable; nothing happens when it is there."""
        if not path.is_dir():
            self.make_folder(path.parent)
            try:
                self.mkdir(path)
            except FileExistsError:  # another process made it at the same moment
                if not path.is_dir():
                    raise
            self.fsync(path.parent)

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """Another path: the block writes and syncs a file there, which then replaces `path`."""
        temp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            if temp.exists():  # an earlier process of the same number left it
                self.remove_tree(temp)
            yield temp
            self.rename(temp, path)
            self.fsync(path.parent)
        except BaseException:
            self.discard(temp)
            raise

    def replace_text(self, path: Path, text: str) -> None:
        """Put `text` (UTF-8) into a small file: after a crash it holds the old text or the new."""
        with as_mis_error(path.parent, path.name, len(text)), self.replacing(path) as temp:
            self.write(temp, text.encode())
            self.fsync(temp)

    def require_space(self, path: Path, nbytes: int, what: str, remedy: str = AGAIN) -> None:
        """Refuse before anything is written when less than `nbytes` x 1.2 are free at `path`."""
        need = int(nbytes * SPARE)
        free = self.free_bytes(path)
        if free < need:
            raise _no_space(path, what, need, free, remedy=remedy)


DISK = Files()


def sweep(folder: Path, files: Files = DISK) -> None:
    """Delete half-made and half-deleted folders of a crash in `folder`. Hold its lock."""
    for path in folder.iterdir():
        if path.name.startswith(LEFTOVER):
            files.discard(path)


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: object) -> str:
    """sha256 in hex of a value's JSON, with its keys sorted."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def need_place(
    flag: str, path: str | Path, kind: Literal["folder", "new", "file"] = "folder"
) -> None:
    """MisError, before any work, where the path of a flag cannot be written.

    kind: "folder", which may exist; "new", which may not; "file", which may be replaced.
    """
    place = Path(path).absolute()
    try:
        str(place).encode()  # MLX opens no file whose name is not UTF-8
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)
            if kind == "new":
                raise MisError(f"{path} exists already: choose another name or move it away")
            if kind == "file" and place.is_dir():
                raise MisError(f"{flag} {path} is a folder: name a file")
        if kind == "file":
            place = place.parent
        while not os.path.lexists(place):
            place = place.parent
        os.close(DISK.scratch(place))
    except (OSError, ValueError) as error:
        why = BROKEN.get(getattr(error, "errno", 0)) or error.args[-1]
        raise MisError(f"{flag} {path} cannot be written ({why}): choose another place") from None


@contextlib.contextmanager
def as_mis_error(
    folder: Path, what: str, nbytes: int = 0, remedy: str = "fix that and start again"
) -> Iterator[None]:
    """Turn a disk's refusal inside the block into one MisError sentence; other errors pass.

    `what` was being written into `folder` and takes `nbytes`. The sentence ends with `remedy`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = None
            with contextlib.suppress(OSError):  # the disk that failed the write may fail this too
                free = DISK.free_bytes(folder)
            raise _no_space(folder, what, nbytes, free, remedy=remedy) from error
        if error.errno in BROKEN:
            raise DiskRefused(
                f"{BROKEN[error.errno]} in {folder}: {what} was not saved; {remedy}"
            ) from error
        # An external disk that was pulled out.
        if error.errno == errno.ENOENT and not folder.exists():
            raise DiskRefused(f"{folder} vanished: {what} was not saved; {remedy}") from error
        raise


def _no_space(folder: Path, what: str, need: int, free: int | None, *, remedy: str) -> DiskRefused:
    room = "an unknown amount is" if free is None else f"{gib(free)} are"
    return DiskRefused(
        f"Not enough disk space in {folder}: {what} needs {gib(need)}, {room} free; {remedy}"
    )
