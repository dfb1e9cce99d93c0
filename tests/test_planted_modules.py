"""Who stands in a model folder runs no Python file of it: no command, by none of its doors, and
none of the processes that it starts.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mis_mlx.__main__ import commands
from mis_mlx.hardware import child_process, import_path, jobs, programs
from mis_mlx.types import Checkpoint
from tests.conftest import mostly_slow

ROOT = Path(__file__).parent.parent
# Of Python's library, of installed packages, and of packages that are not in every environment.
PLANTED = ("json", "random", "numpy", "mlx", "subprocess", "yaml", "llama_cpp", "datasets")
MARKS = "marks"
# What pip writes for `mis_mlx.__main__:main`.
CONSOLE = "import sys\nfrom mis_mlx.__main__ import main\nsys.exit(main())\n"
# Set by the tests' own start; a command from a shell starts itself again without them.
SETTLED = ("MIS_MLX_BLAS", "LD_PRELOAD", "PYTHONPATH")
DOORS = ("module", "scripts/mis", "console")
BRIEF = ("--num-samples", "2", "--max-seq-length", "32")
SHORT = {
    "plan": ("--teacher", "."),
    "export": ("--model", ".", "--out", "../exported"),
    "generate": ("--model", ".", "--prompt", "a", "--max-tokens", "2"),
    "prune": ("--model", ".", "--mlx-path", "../pruned", "--scenario", "goral", *BRIEF),
    "quantize": ("--model", ".", "--mlx-path", "../packed", *BRIEF),
    "evaluate": ("--teacher", ".", "--tasks", "text", "--dry-run"),
    "sft": ("--model", ".", "--out", "../tuned", "--dry-run"),
}


class Folder:
    """A model folder with Python files, each of which writes its name into MARKS when it runs."""

    def __init__(self, model: Path, place: Path) -> None:
        self.path = shutil.copytree(model, place / "model")
        self.marks = place / MARKS
        for name in PLANTED:
            text = f"open({str(self.marks)!r}, 'a').write('{name} ')\nraise ImportError('{name}')\n"
            (self.path / f"{name}.py").write_text(text)
        self.console = place / "bin"
        self.console.mkdir()

    def ran(self) -> str:
        """The names of the files that ran."""
        return self.marks.read_text() if self.marks.exists() else ""

    def line(self, door: str, command: str, flags: tuple[str, ...]) -> list[str]:
        """A command as it is started by one of DOORS."""
        if door == "module":
            return [sys.executable, "-m", f"mis_mlx.{command}", *flags]
        if door == "scripts/mis":  # its last line; tests/test_bootstrap.py has what comes before
            return [sys.executable, "-P", "-m", "mis_mlx", command, *flags]
        script = self.console / f"mis_mlx.{command}"
        script.write_text(CONSOLE)
        return [sys.executable, str(script), *flags]

    def run(self, line: list[str], home: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run it here, from a shell that has set nothing."""
        env = {name: value for name, value in home.items() if name not in SETTLED}
        return subprocess.run(line, cwd=self.path, env=env, capture_output=True, text=True)


@pytest.fixture
def folder(llama: Checkpoint, tmp_path: Path) -> Folder:
    """The tiny llama, with the files."""
    return Folder(llama.path, tmp_path)


@pytest.mark.parametrize("command", mostly_slow(sorted(commands()), "distill", "studio", "thermal"))
def test_no_command_imports_from_the_current_folder(
    folder: Folder, own_home: dict[str, str], command: str
) -> None:
    """`python -m mis_mlx.COMMAND`, for which Python itself puts the current folder first."""
    done = folder.run(folder.line("module", command, ("--help",)), own_home)
    assert folder.ran() == ""
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "door"),
    mostly_slow(
        [("export", door) for door in DOORS]
        + [(name, DOORS[i % 3]) for i, name in enumerate(SHORT) if name != "export"],
        ("export", "module"),
        ("export", "console"),
        of_several=True,
    ),
)
def test_no_child_imports_from_the_current_folder(
    folder: Folder, own_home: dict[str, str], command: str, door: str
) -> None:
    """A whole command: it starts itself again for its matrix products, and a child for the
    tokenizer.
    """
    done = folder.run(folder.line(door, command, SHORT[command]), own_home)
    assert folder.ran() == ""
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_no_job_of_the_page_imports_from_the_current_folder(
    folder: Folder, own_home: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run, a question, and other people's programs."""
    monkeypatch.chdir(folder.path)
    for name, value in own_home.items():
        monkeypatch.setenv(name, value)
    log = tmp_path / "log"
    started = jobs.start("plan", ["--help"], log)
    answer = asyncio.run(jobs.ask("plan", ["--teacher", "."]))
    assert answer.code == 0, answer.lines
    assert answer.result["peak_bytes"] > 0  # the JSON alone; what is for people are lines
    assert any(line.startswith("| phase") for line in answer.lines)
    code, lines = programs._run(import_path.python("-c", "import json; print(json.__file__)"))
    assert (code, Path(lines[0]).parent.name) == (0, "json")
    for _ in range(600):
        if not jobs.alive(started):
            break
        time.sleep(0.1)
    assert "usage: " in log.read_text()
    assert folder.ran() == ""


def test_the_folder_of_a_user_s_file_comes_last(folder: Folder, tmp_path: Path) -> None:
    """What lies beside a rewards file is found, but no library is replaced by it."""
    (folder.path / "beside.py").write_text("WORTH = 0.5\n")
    source = folder.path / "rewards.py"
    source.write_text("import json, beside\ndef f():\n    return json.loads('2') * beside.WORTH\n")
    assert child_process.ask(str(source), "f", arguments={}, seconds=60.0) == 1.0
    assert folder.ran() == ""


@pytest.mark.parametrize("how", [("-c", "{}"), ("-m", "mine"), ("mine.py",)])
def test_a_program_of_the_user_keeps_its_places(tmp_path: Path, how: tuple[str, ...]) -> None:
    """Its own modules are found, also by children that it starts, after it imported the package."""
    (tmp_path / "beside.py").write_text("")
    text = "import os, mis_mlx, beside; print(os.environ.get('PYTHONSAFEPATH'))"
    (tmp_path / "mine.py").write_text(text)
    line = [sys.executable, *(word.format(text) for word in how)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
