"""Who reads a command's result: a person on a terminal, a program, a script of the last version.

(The studio's questions: test_planted_modules.py.)
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
from collections.abc import Sequence

import pytest

from mis_mlx.types import Checkpoint
from tests import forks


@pytest.fixture
def plan(llama: Checkpoint) -> tuple[str, ...]:
    """A command with words for people on stdout, and a result."""
    return ("-m", "mis_mlx.plan", "--teacher", str(llama.path))


def on_terminal(words: Sequence[object], home: dict[str, str]) -> str:
    """What a command writes to a terminal that is its stdout."""
    ours, theirs = pty.openpty()
    process = forks.start(words, home, stdout=theirs, stderr=os.open(os.devnull, os.O_WRONLY))
    os.close(theirs)
    shown = b""
    # the other end is closed
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while piece := terminal.read(65536):
            shown += piece
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_shows_no_json(plan: tuple[str, ...], own_home: dict[str, str]) -> None:
    """The table is all; with --json the JSON is all."""
    shown = on_terminal(plan, own_home)
    assert "| phase" in shown
    assert "{" not in shown

    shown = on_terminal([*plan, "--json"], own_home)
    assert json.loads(shown)["peak_bytes"] > 0


def test_a_pipe_has_the_table_and_then_the_json(
    plan: tuple[str, ...], own_home: dict[str, str]
) -> None:
    """As in the last version; --json moves the table to stderr, and both give the same result."""
    old = forks.run(plan, own_home)
    new = forks.run([*plan, "--json"], own_home)

    *table, last = old.stdout.splitlines()
    assert any(line.startswith("| phase") for line in table)
    assert json.loads(last) == json.loads(new.stdout)
    assert "| phase" in new.stderr
    assert "| phase" not in old.stderr
