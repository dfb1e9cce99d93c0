"""A pessimistic model of a power cut, for any file system.

Bytes that were not fsynced may be absent, partly there or zeros; a folder entry (made, renamed,
removed) that was not fsynced may have happened or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mis_mlx.storage.files import Files
from tests.faults.broken import changed

Operation = tuple[str, Path, Any]


@contextmanager
def recorded(forgets: str = "") -> Iterator[list[Operation]]:
    """What is done to any disk. forgets: "file" or "folder", whose fsync is told, not made."""
    trace: list[Operation] = []

    def wrap(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def operation(files: Files, *arguments: Any) -> Any:
            if name not in ("scratch", "put"):  # a file without a name is gone after any cut
                trace.extend(_told(name, *arguments, forgets=forgets))
            return do(files, *arguments)

        return operation

    with changed(wrap):
        yield trace


def _told(name: str, path: Path, extra: Any = None, forgets: str = "") -> list[Operation]:
    """One operation, as `Drive` understands it; none for an fsync that is forgotten."""
    if name == "fsync":
        kind = "folder" if path.is_dir() else "file"
        return [] if kind == forgets else [(f"fsync {kind}", path, None)]
    if name == "add_line":
        return [("extend" if path.exists() else "write", path, f"{extra}\n".encode())]
    if name in ("write", "extend"):
        extra = bytes(extra)
    return [("remove" if name == "remove_tree" else name, path, extra)]


class Drive:
    """A drive: what each file holds, how much of it is durable, and which names exist."""

    def __init__(self) -> None:
        self.content: list[bytearray | None] = []  # None: a folder
        self.durable_bytes: dict[int, int] = {}
        self.seen: dict[Path, int] = {}  # names as the running system sees them
        self.durable: dict[Path, int] = {}  # names that a power cut leaves
        self.pending: list[Operation] = []  # what was done to names and is not durable yet

    def do(self, operation: Operation) -> None:
        kind, path, extra = operation
        if kind in ("mkdir", "write"):
            self.content.append(None if extra is None else bytearray(extra))
            self._name(("add", path, len(self.content) - 1))
        elif kind == "extend":
            grown = self.content[self.seen[path]]
            assert grown is not None
            grown += extra
        elif kind == "link":
            self._name(("add", extra, self.seen[path]))
        elif kind == "fsync file":
            self.durable_bytes[self.seen[path]] = len(self.content[self.seen[path]] or b"")
        elif kind == "fsync folder":
            here = [
                p for p in self.pending if path in (p[1].parent, p[0] == "rename" and p[2].parent)
            ]
            for change in here:
                apply(self.durable, change)
                self.pending.remove(change)
        else:
            self._name(operation)

    def _name(self, change: Operation) -> None:
        apply(self.seen, change)
        self.pending.append(change)

    def after_cut(self, rng: random.Random, root: Path, out: Path) -> None:
        """Make below `out` one state in which the cut may have left what was below `root`."""
        names = dict(self.durable)
        journalled = rng.random() < 0.5  # names change in order, up to some point; else any of them
        point = rng.randrange(len(self.pending) + 1)
        for i, change in enumerate(self.pending):
            if i < point if journalled else rng.random() < 0.5:
                apply(names, change)
        for path in sorted(names, key=lambda p: len(p.parts)):
            target = out / path.relative_to(root)
            data = self.content[names[path]]
            if not target.parent.is_dir():
                continue
            if data is None:
                target.mkdir()
            else:
                target.write_bytes(self._bytes_left(names[path], bytes(data), rng))

    def _bytes_left(self, file: int, data: bytes, rng: random.Random) -> bytes:
        safe = self.durable_bytes.get(file, 0)
        kept = rng.randrange(safe, len(data) + 1)
        fate = rng.choice(["absent", "partial", "zeros", "all"])
        return {
            "absent": data[:safe],
            "partial": data[:kept],
            "zeros": data[:kept] + bytes(len(data) - kept),
            "all": data,
        }[fate]


def cuts(
    trace: list[Operation], count: int, rng: random.Random, promises: Sequence[int] = ()
) -> Iterator[tuple[int, Drive]]:
    """(operations done, the drive then) of `count` random moments, in order; the drive is one and
    the same.

    promises: moments at which something was said to be safe. One cut in four comes right after one
    of them.
    """
    drive = Drive()
    done = 0
    moments = list[int]()
    for _ in range(count):
        promised = promises and rng.random() < 0.25
        moments.append(rng.choice(promises) if promised else rng.randrange(len(trace) + 1))
    for moment in sorted(moments):
        for operation in trace[done:moment]:
            drive.do(operation)
        done = moment
        yield moment, drive


def apply(names: dict[Path, int], change: Operation) -> None:
    """Add, rename or remove a name with all that is below it."""
    kind, path, extra = change
    if kind == "add":
        names[path] = extra
        return
    for old in [p for p in names if p == path or path in p.parents]:
        file = names.pop(old)
        if kind == "rename":
            names[extra / old.relative_to(path)] = file
