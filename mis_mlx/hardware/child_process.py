"""Call one function in a process of its own, in JSON, with limits on its time and memory.

For functions that read a stranger's text, or that a user brought: what hangs, crashes or eats
memory ends there.
"""

import contextlib
import importlib
import inspect
import json
import math
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mis_mlx.hardware import import_path
from mis_mlx.types import gib

LOOK_S = 0.05  # between two looks at the memory of a child that the kernel does not limit


class NoAnswer(Exception):
    """Why there is no answer, in a few words."""


def ask(
    source: str,
    function: str,
    arguments: Mapping[str, Any],
    seconds: float,
    memory_bytes: int = 0,
    watched: bool = sys.platform == "darwin",
    look: Callable[[], object] | None = None,
) -> Any:
    """Return what a function returns for these arguments, called in a process of its own.

    source: a module's dotted name, or a path to a .py file. arguments: those that the function's
    signature does not name are left out. seconds: limit on its time. memory_bytes: limit on its
    address space, which the kernel keeps; where it is `watched` by us, as macOS has no such limit,
    on what it and its children hold; 0: no limit. look: called some twenty times a second
    meanwhile. NoAnswer when it raises, ends its process, answers what JSON has no word for, or
    exceeds a limit.
    """
    watched_bytes = memory_bytes if watched else 0
    question = {
        "source": source,
        "function": function,
        "arguments": arguments,
        "bytes": memory_bytes - watched_bytes,
        "seconds": math.ceil(seconds),
    }
    text = json.dumps(question).encode()
    # A session of its own: Ctrl-C is for us, not for an answer under way; and what it starts ends
    # with it.
    with subprocess.Popen(
        import_path.python("-m", "mis_mlx.hardware.child_process"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=import_path.environment(),
        start_new_session=True,
    ) as process:
        try:
            output = _waited(process, text, seconds, watched_bytes, look=look)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        answer = json.loads(output)
    except ValueError:
        raise NoAnswer(f"its process ended with {process.returncode}") from None
    # an exit code of 0 alone is no answer
    if not isinstance(answer, dict):
        raise NoAnswer("it gave no answer")
    if "value" not in answer:
        raise NoAnswer(str(answer.get("error", "it gave no answer")))
    return answer["value"]


def _waited(
    process: subprocess.Popen[bytes],
    question: bytes,
    seconds: float,
    most_bytes: int,
    *,
    look: Callable[[], object] | None = None,
) -> bytes:
    """Return what the child writes.

    NoAnswer when that takes more than `seconds`, or it holds more than `most_bytes` (0: no limit).
    """
    unsent: bytes | None = question
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        timeout = left
        if most_bytes or look:
            timeout = min(LOOK_S, left)
        try:
            output, _ = process.communicate(unsent, timeout=timeout)
            return output
        except subprocess.TimeoutExpired:
            unsent = None  # it has the question, and communicate takes it once
        if look:
            look()
        if most_bytes:
            held = _held(process.pid)
            if held > most_bytes:
                raise NoAnswer(f"MemoryError: it holds {gib(held)}, {gib(most_bytes)} are allowed")
    raise NoAnswer(f"no answer in {seconds:g} s")


def _held(number: int) -> int:
    """Resident bytes of a process and its children."""
    import psutil  # not at the top: the child does without it and starts faster

    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(number)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += process.memory_info().rss
    return total


def _limit(seconds: int, memory_bytes: int) -> None:
    """Have the kernel limit this process: CPU time of all cores, no core dump, address space."""
    limits = {
        resource.RLIMIT_CPU: (seconds + 1) * (os.cpu_count() or 1),
        resource.RLIMIT_CORE: 0,
    }
    if memory_bytes:
        limits[resource.RLIMIT_AS] = memory_bytes
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not let everybody
            resource.setrlimit(kind, (most, most))


def _serve() -> None:
    """The child's side: read the question from stdin, write the answer to what was stdout.

    Whatever the function prints there goes to stderr.
    """
    question = json.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "wb") as out, contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        _limit(question["seconds"], question["bytes"])
        try:
            value = _call(question["source"], question["function"], question["arguments"])
            text = json.dumps({"value": value}, allow_nan=False)
        except BaseException as error:
            message = " ".join(str(error).split())[:200]
            text = json.dumps({"error": f"{type(error).__name__}: {message}"})
        out.write(text.encode())


def _call(source: str, function: str, arguments: Mapping[str, Any]) -> Any:
    """Import the function and call it with those of the arguments that it names."""
    if source.endswith(".py"):
        # What lies beside a file that the user brought, behind everything that is installed.
        sys.path.append(str(Path(source).resolve().parent))
        called = runpy.run_path(source)[function]
    else:
        called = getattr(importlib.import_module(source), function)
    parameters = inspect.signature(called).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all:
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return called(**arguments)


if __name__ == "__main__":
    _serve()
