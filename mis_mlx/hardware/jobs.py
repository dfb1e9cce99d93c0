"""Commands of this package as processes: runs that outlive whoever started them, and questions.

A run has a session of its own, so closing the terminal or the page does not reach it. Its output
goes into a file. A question is a command that somebody waits for: it ends when nobody does.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from mis_mlx.hardware import blas, free_memory, import_path

Show = Callable[[str], object]  # is given a piece of text
NEAR_S = 2.0  # two readings of a process's start that lie so near are of the same process
CHUNK = 4096  # bytes of a stream that are passed on together


class Started(NamedTuple):
    """A process, so that its number is not mistaken for a later process's."""

    pid: int
    created_s: float  # since 1970


class Answer(NamedTuple):
    """What a command said: its exit code, its result as JSON, its lines for people."""

    code: int
    result: dict[str, Any]
    lines: list[str]

    @property
    def sentence(self) -> str:
        """The command's refusal; empty where it ended well."""
        if self.code in (0, 3):
            return ""
        last = self.lines[-1] if self.lines else f"it ended with {self.code}"
        return last.removeprefix("mis_mlx: ")


def _line(command: str, flags: Sequence[str]) -> list[str]:
    return import_path.python("-m", f"mis_mlx.{command}", *flags)


def _environment() -> dict[str, str]:
    """In which a run chooses its own number of threads: what is busy may differ from before."""
    environment = import_path.environment()
    if environment.get(blas.MARK) == blas.CHOSEN:
        del environment[blas.MARK]
        environment.pop(blas.THREADS, None)
    return environment


def call(command: str, out: Path, *, again: bool) -> int:
    """Make a run in a folder in our terminal, all that it says on stderr; its exit code.

    again: the run that is there goes on.
    """
    line = _line(command, ["--out", str(out)] + again * ["--resume"])
    return subprocess.run(line, stdout=2, env=_environment(), check=False).returncode


def start(command: str, flags: Sequence[str], log: Path) -> Started:
    """Start a command whose output is added to `log`. OSError where that cannot be written."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            _line(command, flags),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=_environment(),
            start_new_session=True,
        )
    process.returncode = 0  # nobody waits for it: `alive` asks for it by its number
    return Started(process.pid, psutil.Process(process.pid).create_time())


def alive(started: Started) -> bool:
    """Whether that process still runs."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(started.pid, os.WNOHANG)  # a child of ours that has ended
    try:
        process = psutil.Process(started.pid)
        same = abs(process.create_time() - started.created_s) < NEAR_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def holder(pid: int) -> Started | None:
    """The process of this number, if it runs one of this package's commands."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if any("mis_mlx" in word for word in process.cmdline()):
            return Started(pid, process.create_time())
    return None


def held_bytes(pid: int) -> int:
    """Resident bytes of a process; 0 where it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def free_bytes() -> int:
    """Bytes of memory that programs could take now."""
    return free_memory.now().nbytes


def total_bytes() -> int:
    """Bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def stop(started: Started, at_once: bool = False) -> None:
    """Ask a run to stop after its step, as Ctrl-C does; or end it and all that it started.

    Of a run that somebody else started, a group of processes that it does not lead goes on.
    """
    if not alive(started):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if at_once and os.getpgid(started.pid) == started.pid:
            os.killpg(started.pid, signal.SIGKILL)
        elif at_once:
            os.kill(started.pid, signal.SIGKILL)
        else:
            os.kill(started.pid, signal.SIGINT)


async def ask(command: str, flags: Sequence[str]) -> Answer:
    """A command's answer. Whoever stops waiting (CancelledError) ends it."""
    return await stream(command, [*flags, "--json"], lambda text: None)


async def stream(command: str, flags: Sequence[str], show: Show, stdin: str = "") -> Answer:
    """`show` what a command writes, as it comes, but not the JSON at its end; its answer.

    stdin: what the command reads from its standard input.
    """
    lines: list[str] = []
    speech = _Speech(show)
    code = await _run(command, flags, heard=speech.hear, told=lines.append, stdin=stdin.encode())
    return Answer(code, _last_json(speech.text), lines)


class _Speech:
    """What a command has written so far, and how much of it was shown."""

    def __init__(self, show: Callable[[str], object]) -> None:
        self.text = ""
        self._show = show
        self._shown = 0

    def hear(self, piece: str) -> None:
        """Show it, but for a line that begins with a brace: that may be the JSON."""
        self.text += piece
        brace = self.text.rfind("\n{")
        until = len(self.text) if brace < 0 else brace
        if self.text.startswith("{"):
            until = 0
        if until > self._shown:
            self._show(self.text[self._shown : until])
            self._shown = until


async def _run(
    command: str,
    flags: Sequence[str],
    heard: Callable[[str], object],
    told: Callable[[str], object],
    stdin: bytes,
) -> int:
    """Run a command to its end: its exit code. heard: pieces of stdout; told: lines of stderr."""
    process = await asyncio.create_subprocess_exec(
        *_line(command, flags),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=import_path.environment(),
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(stdin)
    process.stdin.close()
    listening = asyncio.ensure_future(_lines(process.stderr, told))
    unfinished = b""  # half of a letter waits for its other half
    try:
        while piece := await process.stdout.read(CHUNK):
            text, unfinished = _decoded(unfinished + piece)
            heard(text)
        await listening
        return await process.wait()
    finally:
        listening.cancel()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _decoded(piece: bytes) -> tuple[str, bytes]:
    """The whole letters of UTF-8, and the bytes of one that is not whole yet."""
    for cut in range(len(piece), max(-1, len(piece) - 4), -1):
        with contextlib.suppress(UnicodeDecodeError):
            return piece[:cut].decode(), piece[cut:]
    return piece.decode(errors="replace"), b""


async def _lines(pipe: asyncio.StreamReader, told: Callable[[str], object]) -> None:
    unended = b""
    while piece := await pipe.read(CHUNK):
        *lines, unended = (unended + piece).split(b"\n")
        for line in lines:
            told(line.decode(errors="replace"))
    if unended:
        told(unended.decode(errors="replace"))


def _last_json(text: str) -> dict[str, Any]:
    """The object in the last line of a command's output; {} where there is none."""
    last = text.rstrip().rpartition("\n")[2]
    with contextlib.suppress(ValueError):
        value = json.loads(last)
        if isinstance(value, dict):
            return value
    return {}


def has_browser() -> bool:
    """Whether a browser with windows can open here. One in the terminal would take the terminal."""
    if sys.platform == "darwin":
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def open_browser(address: str) -> None:
    """Have the user's browser open an address, and do not wait: some return when they are closed.

    The address is seen by everybody in the list of processes.
    """
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
