"""What a finished command prints to be pasted is taken by the program that it names."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx import cli
from mis_mlx.distillation import summary
from mis_mlx.types import Checkpoint
from tests.conftest import Done


def pasted(said: str) -> list[list[str]]:
    """The words of the lines behind "Next:", which the programs' own parsers have taken."""
    lines = said.partition("Next:\n")[2].splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("  ")]
    for python, dash_m, program, command, *flags in found:
        assert Path(python).samefile(sys.executable)
        assert dash_m == "-m"
        module = importlib.import_module(f"{program}.{command}")
        if program == "mis_mlx":
            cli.parse(module.Settings, flags)
        else:
            module.setup_arg_parser().parse_args(flags)
    return found


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python in a folder whose name has a blank, as macOS's "Application Support" has."""
    (tmp_path / "my env").mkdir()
    (link := tmp_path / "my env" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(link))


@pytest.mark.usefixtures("python")
def test_after_distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with blanks, too."""
    monkeypatch.chdir(tmp_path)
    lines = pasted(summary.next_steps(tmp_path / "my run"))
    assert [line[2:4] for line in lines] == [
        ["mlx_lm", "generate"],
        ["mis_mlx", "export"],
        ["mis_mlx", "report"],
    ]
    assert lines[2][4] == "my run"
    assert lines[1][5] == "my run/model"


@pytest.mark.usefixtures("python")
def test_after_quantize(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """The model that was written, and its teacher."""
    out = tmp_path / "my model"
    flags = ("--q-method", "round", "--target-bpw", "None", "--q-iters", 0)
    done = command("quantize", "--model", llama.path, "--mlx-path", out, *flags)
    assert done.returncode == 0, done.stderr
    lines = pasted(done.stderr)
    assert [line[2:4] for line in lines] == [["mlx_lm", "generate"], ["mis_mlx", "evaluate"]]
    assert lines[1][4:8] == ["--teacher", str(llama.path), "--students", str(out)]
