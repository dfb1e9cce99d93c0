"""Who reads a command's result: a person on a terminal, or a program.

(The studio's questions: test_planted_modules.py.)
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from mis_mlx import cli, plan
from mis_mlx.types import Checkpoint
from tests.conftest import Done


def test_a_terminal_shows_no_json(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is all."""
    monkeypatch.setattr("sys.argv", ["plan", "--teacher", str(llama.path)])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit):
        cli.main(plan.Settings, plan.run)
    shown = capsys.readouterr().out
    assert "| phase" in shown
    assert "{" not in shown


def test_a_pipe_has_the_table_and_then_the_json(
    llama: Checkpoint, command: Callable[..., Done]
) -> None:
    """--json moves the table to stderr, and both give the same result."""
    both = command("plan", "--teacher", llama.path)
    alone = command("plan", "--teacher", llama.path, "--json")
    *table, last = both.stdout.splitlines()
    assert any(line.startswith("| phase") for line in table)
    assert json.loads(last) == json.loads(alone.stdout)
    assert "| phase" in alone.stderr
    assert "| phase" not in both.stderr
