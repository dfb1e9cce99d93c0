"""Python processes that start in no time: on Linux forks of one that has imported mlx_lm and
computed nothing.

What `start` gives is used like a `subprocess.Popen` in text mode. Process id, environment, folder,
files, exit code, signals and the clean-up at the end are its own. What differs from a start:
modules are there already, strings hash alike in all forks of a server, and a tokenizer that one of
them has tried is not tried again. Libraries read some of the environment while they are imported,
so each such part has a server of its own. On macOS, where Metal does not live through a fork,
`start` starts a process. Whoever tests start-up itself uses `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mis_mlx.models.opening import tokenizer_check

ROOT = Path(__file__).parents[1]
# Beginnings of the names of what is read from the environment while Python starts and libraries are
# imported.
EARLY = (
    "HF_",
    "HOME",
    "LD_",
    "MKL_",
    "MLX_",
    "MPL",
    "OMP",
    "OPENBLAS",
    "PYTHON",
    "TOKENIZERS_",
    "TRANSFORMERS_",
    "XDG_",
)
LATER = ("MLX_HOSTFILE", "MLX_RANK")  # but these when the processes first meet
SERVERS = dict[tuple[tuple[str, str], ...], "Server"]()


def not_synced(_: int) -> None:
    """In place of os.fsync: what tests write need not survive a power cut of this machine, and a
    drive makes them wait. Power cuts under test (`tests/faults/power.py`) count the calls of
    `Files.fsync`, which stay.
    """


class Server:
    """A process to fork from. It ends, and its forks with it, when its door is closed or we end."""

    def __init__(self, env: Mapping[str, str]):
        self.door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests import forks; forks.serve()", str(theirs.fileno())],
            env={"OPENBLAS_NUM_THREADS": "1", **env},
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """The process id of a fork with these files as its 0, 1, 2; its exit status comes through
        the fourth.
        """
        socket.send_fds(self.door, [json.dumps(request).encode()], files)
        answer = self.door.recv(64)
        assert answer, f"the fork server has ended: {self.process.wait()}"
        return int(answer)


def server(env: Mapping[str, str]) -> Server:
    """The one for this environment, started when first asked for."""
    early = {k: v for k, v in env.items() if k.startswith(EARLY) and k not in LATER}
    key = tuple(sorted(early.items()))
    if key not in SERVERS:
        SERVERS[key] = Server({k: v for k, v in env.items() if k not in LATER})
    return SERVERS[key]


def close() -> None:
    """End all servers."""
    while SERVERS:
        _, each = SERVERS.popitem()
        each.door.close()
        each.process.wait()


class Fork:
    """A fork: what `subprocess.Popen(..., text=True)` has and tests use."""

    def __init__(
        self,
        argv: Sequence[object],
        env: Mapping[str, str],
        cwd: Path | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ):
        self.args = [sys.executable, *map(str, argv)]
        self.returncode = None
        self._status, status = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, status)
            ends = [
                self._end(number, what, stack)
                for number, what in enumerate((stdin, stdout, stderr))
            ]
            self.stdin, self.stdout, self.stderr = (ours for ours, _ in ends)
            request = {
                "argv": self.args[1:],
                "env": {**env, "PYTHONPATH": str(ROOT)},
                "cwd": str(cwd or Path.cwd()),
            }
            self.pid = server(request["env"]).fork(
                request, [*(theirs for _, theirs in ends), status]
            )

    @staticmethod
    def _end(
        number: int, what: int | None, stack: contextlib.ExitStack
    ) -> tuple[IO[str] | None, int]:
        """(our end of a pipe or None, the file that the fork gets)."""
        if what == subprocess.PIPE:
            read, write = os.pipe()
            ours, theirs, mode = (write, read, "w") if number == 0 else (read, write, "r")
            stack.callback(os.close, theirs)
            return open(ours, mode, encoding="utf-8"), theirs
        if what == subprocess.DEVNULL:
            theirs = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, theirs)
            return None, theirs
        return None, number if what is None else what

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended; that of a signal is negative."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            told = os.read(self._status, 64)
            os.close(self._status)
            assert told, "the fork server ended before the fork"
            self.returncode = os.waitstatus_to_exitcode(int(told))
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it wrote into pipes, once it has ended."""
        until = None if timeout is None else time.monotonic() + timeout
        if self.stdin:
            self.stdin.close()
        texts: list[str | None] = [None, None]

        def read(number: int, pipe: IO[str]) -> None:
            with pipe:
                texts[number] = pipe.read()

        readers = [
            threading.Thread(target=read, args=(number, pipe), daemon=True)
            for number, pipe in enumerate((self.stdout, self.stderr))
            if pipe and not pipe.closed
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if until is None else max(0.0, until - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe:
                pipe.close()
        self.wait()


def start(
    argv: Sequence[object],
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Fork | subprocess.Popen[str]:
    """`python argv`, under way: a fork on Linux, a process elsewhere."""
    if sys.platform == "linux":
        return Fork(argv, env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)
    line = [sys.executable, *map(str, argv)]
    all_env = {**env, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        line, env=all_env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr, text=True
    )


def run(
    argv: Sequence[object], env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python argv` to its end."""
    process = start(
        argv, env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), *said)


class _TriedTokenizers:
    """Tokenizers that other forks have tried, which this one need not try again."""

    def __init__(self, known: set[bytes]):
        self.passed = set(known)
        self._try = tokenizer_check._try

    def look(self, tokenizer: tokenizer_check.Tokenizer) -> None:
        """In place of `tokenizer_check._try`."""
        if tokenizer.digest not in self.passed:
            self._try(tokenizer)
            self.passed.add(tokenizer.digest)


def serve() -> None:
    """The server's side: import, then fork for every request; in a fork, be the program that was
    asked for.

    Whether a thread runs after the imports is looked at: it would be missing in a fork, and MLX
    computes in threads.
    """
    door = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; they close the door
    importlib.import_module("tests.faults.preloaded")
    assert len(os.listdir("/proc/self/task")) == 1, (
        "an import has started a thread, which no fork would have"
    )
    gc.freeze()
    os.fsync = not_synced
    log = os.memfd_create("tokenizers that forks have tried")  # all forks write at the end of it
    request = _forked(door)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tried = os.pread(log, 1 << 20, 0)
    known = {tried[at : at + 32] for at in range(0, len(tried), 32)}
    tokenizers = _TriedTokenizers(known)
    tokenizer_check._try = tokenizers.look
    # what a command that starts itself anew goes by
    sys.orig_argv = [sys.executable, *request["argv"]]
    with _left_at_once():
        try:
            _become(*request["argv"])
        finally:
            os.write(log, b"".join(tokenizers.passed - known))


def _become(*line: str) -> None:
    """Do what `python LINE` does; of Python's own flags it knows -P, as the first word."""
    safe = line[0] == "-P"
    what, *argv = line[1:] if safe else line
    # In the first place stands the server's own folder. With -P nothing takes it: neither the
    # current folder nor the program's is a place of modules.
    place = {"-c": "", "-m": os.getcwd()}.get(what, str(Path(what).parent))
    sys.path[:1] = [] if safe else [place]
    if what == "-c":
        code, sys.argv = argv[0], ["-c", *argv[1:]]
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif what == "-m":
        sys.argv = list(argv)
        sys.modules.pop(sys.argv[0], None)  # it is going to be __main__
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *argv]
        runpy.run_path(what, run_name="__main__")


@contextlib.contextmanager
def _left_at_once() -> Iterator[None]:
    """The end of an ordinary program without the 0.1 s in which Python takes all modules apart; any
    other end is its own. Threads are waited for, exit handlers run, and what was printed is
    written.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _forked(door: socket.socket) -> dict[str, Any]:
    """The request, in the fork that is to fulfil it. The server itself stays in here to its end."""
    waiting = dict[int, tuple[int, int]]()
    ready = selectors.DefaultSelector()
    ready.register(door, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj is not door:
                pid, status = waiting.pop(key.fd)
                ready.unregister(key.fd)
                os.close(key.fd)
                os.write(status, str(os.waitpid(pid, 0)[1]).encode())
                os.close(status)
                continue
            data, files, _, _ = socket.recv_fds(door, 1 << 20, 4)
            if not data:
                for pid, _ in waiting.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                ready.close()
                door.close()
                for number in range(3):
                    os.dup2(files[number], number)
                for fd in (*files, *waiting, *(status for _, status in waiting.values())):
                    os.close(fd)
                return json.loads(data)
            for fd in files[:3]:
                os.close(fd)
            watch = os.pidfd_open(pid)
            waiting[watch] = pid, files[3]
            ready.register(watch, selectors.EVENT_READ)
            door.send(str(pid).encode())
