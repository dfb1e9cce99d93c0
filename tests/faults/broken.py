"""A disk that fails at its N-th operation, under whatever runs: `Files` itself is changed, so
nobody is left out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mis_mlx.storage.files import Files

OPERATIONS = (
    *("mkdir", "write", "extend", "add_line", "scratch", "put", "fsync", "rename", "link"),
    "remove_tree",
)
KILLED = "killed"
ASKED = "asked to stop"


class Killed(BaseException):
    """Stands for the end of the process: no `except` and no clean-up gets past it."""


@contextmanager
def changed(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Every operation of every disk goes through wrap(its name, what it did)."""
    before = {name: getattr(Files, name) for name in OPERATIONS}
    for name, do in before.items():
        setattr(Files, name, wrap(name, do))
    try:
        yield
    finally:
        for name, do in before.items():
            setattr(Files, name, do)


def half(name: str, do: Callable[..., Any], files: Files, arguments: tuple[Any, ...]) -> None:
    """What a disk that fills up, or a process that dies, has done: half of the bytes."""
    if name in ("write", "extend"):
        do(files, arguments[0], arguments[1][: len(arguments[1]) // 2])
    elif name == "add_line":
        with open(arguments[0], "a", encoding="utf-8") as log:
            log.write(arguments[1][: len(arguments[1]) // 2])
    elif name == "put":
        do(files, arguments[0], arguments[1], arguments[2][: len(arguments[2]) // 2])


@contextmanager
def breaking(at: int, fate: int | str) -> Iterator[list[str]]:
    """Operation `at` (from 1; 0 is never) fails when half done. Yields the names of the operations
    asked for.

    fate: an errno, of that one operation; KILLED: that one and all that come raise `Killed`; or
    ASKED: it is done, and this process gets SIGTERM.
    """
    done: list[str] = []

    def wrap(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def operation(files: Files, *arguments: Any) -> Any:
            done.append(name)
            number = len(done)
            if not at or number < at or (number > at and fate != KILLED):
                return do(files, *arguments)
            if fate == ASKED:
                os.kill(os.getpid(), signal.SIGTERM)
                return do(files, *arguments)
            if number == at:
                half(name, do, files, arguments)
            if isinstance(fate, int):
                raise OSError(fate, os.strerror(fate))
            raise Killed

        return operation

    with changed(wrap):
        yield done
