"""Ask one function one question, in JSON, in a process of its own, with a limit on its time and
memory.

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

from mis_mlx.types import gib

LOOK_S = 0.05  # between two looks at the memory of a child that the kernel does not limit
PACKAGE = Path(__file__).resolve().parents[2]


class NoAnswer(Exception):
    """Why there is none, in a few words."""


def ask(
    source: str,
    function: str,
    arguments: Mapping[str, Any],
    seconds: float,
    memory_bytes: int = 0,
    watched: bool = sys.platform == "darwin",
    look: Callable[[], object] | None = None,
) -> Any:
    """What `function` of `source` (a module's dotted name, or a path to a .py file) returns for
    these arguments. Arguments that its signature does not name are left out. memory_bytes: of its
    address space, limited by the kernel; or where it is `watched` by us, as macOS has no such
    limit, of what it and its children hold; 0: no limit. look: called some twenty times a second
    meanwhile. NoAnswer when it raises, ends its process, answers what JSON has no word for, or
    takes more than it may.
    """
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH", "")]))
    question = json.dumps(
        {
            "source": source,
            "function": function,
            "arguments": arguments,
            "bytes": 0 if watched else memory_bytes,
            "seconds": math.ceil(seconds),
        }
    )
    # A session of its own: Ctrl-C is for us, not for an answer under way; and what it starts ends
    # with it.
    with subprocess.Popen(
        [sys.executable, "-m", "mis_mlx.hardware.child_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    ) as process:
        try:
            output = _waited(
                process, question.encode(), seconds, memory_bytes if watched else 0, look
            )
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        answer = json.loads(output)
    except ValueError:
        raise NoAnswer(f"its process ended with {process.returncode}") from None
    # an exit code of 0 alone is no answer
    if not isinstance(answer, dict) or "value" not in answer:
        raise NoAnswer(
            str(answer["error"])
            if isinstance(answer, dict) and "error" in answer
            else "its answer is none"
        )
    return answer["value"]


def _waited(
    process: subprocess.Popen[bytes],
    question: bytes,
    seconds: float,
    most_bytes: int,
    look: Callable[[], object] | None = None,
) -> bytes:
    """What it writes. NoAnswer when that takes longer, or it holds more than `most_bytes` (0: no
    limit).
    """
    unsent: bytes | None = question
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            return process.communicate(
                unsent, timeout=min(LOOK_S, left) if most_bytes or look else left
            )[0]
        except subprocess.TimeoutExpired:
            unsent = None  # it has the question, and communicate takes it once
        if look:
            look()
        if most_bytes and (held := _held(process.pid)) > most_bytes:
            raise NoAnswer(f"MemoryError: it holds {gib(held)}, {gib(most_bytes)} are allowed")
    raise NoAnswer(f"no answer in {seconds:g} s")


def _held(number: int) -> int:
    import psutil  # not in the child, which starts the sooner

    total = 0
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(number)
        for each in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += each.memory_info().rss
    return total


def _serve() -> None:
    """The child's side: the question on stdin, the answer on what was stdout; what is printed there
    goes to stderr.
    """
    question = json.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "wb") as out, contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        limits = {
            resource.RLIMIT_CPU: (question["seconds"] + 1) * (os.cpu_count() or 1),
            resource.RLIMIT_CORE: 0,
        }
        for what, most in (
            limits | ({resource.RLIMIT_AS: question["bytes"]} if question["bytes"] else {})
        ).items():
            with contextlib.suppress(ValueError, OSError):  # macOS does not let everybody
                resource.setrlimit(what, (most, most))
        try:
            answer = {
                "value": _call(**{k: question[k] for k in ("source", "function", "arguments")})
            }
            text = json.dumps(answer, allow_nan=False)
        except BaseException as error:
            text = json.dumps(
                {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            )
        out.write(text.encode())


def _call(source: str, function: str, arguments: Mapping[str, Any]) -> Any:
    if source.endswith(".py"):
        called = runpy.run_path(source)[function]
    else:
        called = getattr(importlib.import_module(source), function)
    parameters = inspect.signature(called).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    return called(**arguments)


if __name__ == "__main__":
    _serve()
