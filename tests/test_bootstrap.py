"""scripts/mis with stand-ins for the tools around it (uname, python, pip) in a folder of their own.

The script itself is the real one; what stands in is what another machine would have, or not have.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mis_mlx import __version__

ROOT = Path(__file__).parent.parent
MIS = ROOT / "scripts" / "mis"
TOOLS = ("cat", "cksum", "dirname", "getconf", "mkdir", "mv", "readlink", "rm", "sed", "sh")
WORKERS = min(4, os.sysconf("SC_NPROCESSORS_ONLN"))

# A Python that notes what it is asked, makes a "venv" of itself, and can be told to fail at pip.
PYTHON = """#!/bin/sh
echo "in $PWD: python $*" >>"$LOG"
case "$*" in
*"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*"-m pip"*)
    if [ -n "${PIP_TAKES_LONG:-}" ]; then mkdir "$PIP_TAKES_LONG"; exec sleep 60; fi
    [ -z "${PIP_FAILS:-}" ] || { echo "no network" >&2; exit 1; } ;;
*"import ensurepip"*) [ -z "${TOO_OLD:-}" ] || exit 1 ;;
*"-m mis_mlx "*) echo "ran in $PWD with LD_PRELOAD=${LD_PRELOAD:-}"
    echo "relaxed: ${AGX_RELAX_CDM_CTXSTORE_TIMEOUT-no}" ;;
esac
"""


class Machine:
    """A checkout and a PATH with nothing on it but what the script may count on."""

    def __init__(self, folder: Path):
        self.checkout = folder / "check out"
        self.bin = folder / "bin"
        self.cwd = folder / "cwd"
        for made in (self.checkout / "scripts", self.checkout / "mis_mlx", self.bin, self.cwd):
            made.mkdir(parents=True)
        shutil.copy(MIS, self.checkout / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        (self.checkout / "mis_mlx" / "distill.py").write_text('"""Distill."""\n')
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"{tool} is missing here"
            (self.bin / tool).symlink_to(found)
        for tool in ("cp", "sleep"):  # for the stand-in Python only
            (self.bin / tool).symlink_to(shutil.which(tool) or "")
        self.tool("uname", 'case "$1" in -s) echo Linux ;; -m) echo x86_64 ;; esac')
        self.log = folder / "log"
        self.venv = self.checkout / ".venv"

    def tool(self, name: str, body: str) -> None:
        """Put a shell script on the PATH."""
        (self.bin / name).write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def mis(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/mis from another folder."""
        settings = {"PATH": str(self.bin), "LOG": str(self.log), "HOME": str(self.cwd), **env}
        command = [str(self.checkout / "scripts" / "mis"), *args]
        return subprocess.run(command, env=settings, cwd=self.cwd, capture_output=True, text=True)

    def change(self) -> str:
        """Append a line to pyproject.toml; what stood there."""
        path = self.checkout / "pyproject.toml"
        before = path.read_text()
        path.write_text(before + "# changed\n")
        return before

    def installs(self) -> int:
        """How often pip was run so far."""
        return self.log.read_text().count("-m pip install")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A Linux machine with a Python that is new enough."""
    made = Machine(tmp_path)
    made.tool("python3", PYTHON)
    return made


@pytest.mark.parametrize(
    ("system", "words", "code"),
    [
        ("Darwin x86_64", ["distill"], 1),  # Rosetta on Apple silicon too
        ("MINGW64_NT-10.0 x86_64", ["distill"], 1),
        ("Linux aarch64", ["distill"], 1),
        ("FreeBSD amd64", ["distill"], 1),
        ("Linux x86_64", ["destill"], 2),
        ("Linux x86_64", ["../scripts"], 2),  # names that lead out of the commands
        ("Linux x86_64", ["__main__"], 2),
        ("Linux x86_64", [], 0),
        ("Linux x86_64", ["--help"], 0),
        ("Linux x86_64", ["--version"], 0),
    ],
)
def test_what_installs_nothing(machine: Machine, system: str, words: list[str], code: int) -> None:
    """Other systems and unknown commands are one line; help and version are answered at once."""
    name, processor = system.split()
    machine.tool("uname", f'case "$1" in -s) echo {name} ;; -m) echo {processor} ;; esac')
    machine.tool("sysctl", "echo 0")
    shutil.copy(ROOT / "mis_mlx" / "__init__.py", machine.checkout / "mis_mlx")
    run = machine.mis(*words)
    assert run.returncode == code
    assert run.stderr.count("\n") == (code > 0)
    assert (__version__ in run.stdout) == (words == ["--version"])
    assert not machine.venv.exists()


def test_installs_once_and_runs_where_it_was_called(machine: Machine) -> None:
    """The first run installs, the second does not; the command gets its flags in the caller's
    folder. pyproject.toml changed: again. `test` adds its extra, which then serves the commands
    too.
    """
    first = machine.mis("distill", "--iters", "4 5")
    assert first.returncode == machine.mis("distill").returncode == 0, first.stderr
    assert f"ran in {machine.cwd} with" in first.stdout
    assert machine.installs() == 1
    assert "-P -m mis_mlx distill --iters 4 5" in machine.log.read_text()
    machine.change()
    machine.mis("distill")
    assert machine.installs() == 2
    machine.mis("test", "-x")
    machine.mis("distill")
    assert machine.installs() == 3
    assert "check out[test]" in machine.log.read_text()
    assert "-m pytest -x" in machine.log.read_text()


def test_an_installation_that_is_not_whole(machine: Machine) -> None:
    """While a living process installs, a second one says so and touches nothing; of one that was
    killed all is made anew. Where pip fails, its own words are there and the old installation
    stays. What is no environment of ours is not deleted.
    """
    machine.mis("distill")
    state = machine.venv / "mis-state"
    whole = state.read_text()
    state.write_text(f"building {os.getpid()}\n")
    busy = machine.mis("distill")
    assert busy.returncode == 1 and str(os.getpid()) in busy.stderr
    assert machine.installs() == 1
    line = [sys.executable, "-c", "import os; print(os.getpid())"]
    gone = subprocess.run(line, capture_output=True, text=True)
    state.write_text(f"building {gone.stdout}")
    (machine.venv / "half").touch()
    assert machine.mis("distill").returncode == 0
    assert machine.installs() == 2
    assert not (machine.venv / "half").exists()
    assert state.read_text() == whole

    old = machine.change()
    failed = machine.mis("distill", PIP_FAILS="1")
    assert failed.returncode == 1 and "no network" in failed.stderr
    (machine.checkout / "pyproject.toml").write_text(old)
    assert machine.mis("distill").returncode == 0
    assert machine.installs() == 3

    shutil.rmtree(machine.venv)
    (machine.venv / "precious").mkdir(parents=True)
    assert machine.mis("distill").returncode == 1
    assert (machine.venv / "precious").exists()


def test_uv_serves_where_python_is_too_old(machine: Machine) -> None:
    """uv makes the environment, with pip in it; without uv none is left."""
    assert machine.mis("distill", TOO_OLD="1").returncode == 1
    assert not machine.venv.exists()
    python = machine.bin / "python3"
    body = (
        f'echo "uv $*" >>"$LOG"\nfor last; do :; done\nmkdir -p "$last/bin" && cp "{python}" '
        f'"$last/bin/python"'
    )
    machine.tool("uv", body)
    assert machine.mis("distill", TOO_OLD="1").returncode == 0
    assert "uv venv --quiet --seed" in machine.log.read_text()


def test_on_a_mac_long_computations_are_not_ended(machine: Machine) -> None:
    """The variable that the sentence about it names is set, there alone, and one's own value
    stays.
    """
    assert "relaxed: no\n" in machine.mis("distill").stdout
    machine.tool("uname", 'case "$1" in -s) echo Darwin ;; -m) echo arm64 ;; esac')
    assert "relaxed: 1\n" in machine.mis("distill").stdout
    assert "relaxed: 0\n" in machine.mis("distill", AGX_RELAX_CDM_CTXSTORE_TIMEOUT="0").stdout


def test_nothing_is_imported_from_where_it_was_called(machine: Machine) -> None:
    """A Python file there is not run, whether a Python is looked for, an environment is made, pip
    installs, or a name is guessed: each starts in the checkout or is isolated from both.
    """
    machine.mis("distill")
    calls = re.findall("^in (.*): python (-.)", machine.log.read_text(), re.MULTILINE)
    here = [flag for place, flag in calls if place == str(machine.cwd)]
    assert set(here) == {"-I", "-P"}
    assert [flag for place, flag in calls if place == str(machine.checkout)] == ["-m", "-m"]
    (machine.bin / "python3").unlink()
    (machine.bin / "python3").symlink_to(sys.executable)
    shutil.rmtree(machine.venv)
    for name in ("difflib", "ensurepip", "platform", "random"):
        (machine.cwd / f"{name}.py").write_text(f"open('marks', 'a').write('{name} ')")
    assert "did you mean distill? " in machine.mis("distil").stderr
    assert not (machine.cwd / "marks").exists()


def test_tests_and_programs_run_with_fast_products(machine: Machine) -> None:
    """They start under hardware/blas.py, with their arguments; what is preloaded reaches a command
    as it was.
    """
    (machine.checkout / "program.py").touch()
    machine.mis("program.py", "--rounds", "2")
    machine.mis("test", "-x")
    machine.mis("test", "--all", "tests/test_x.py", "-k", "y")  # named ones: one process
    log = machine.log.read_text()
    blas = machine.checkout / "mis_mlx" / "hardware" / "blas.py"
    python = f"python -I {blas} {machine.venv}/bin/python"
    assert f"{python} {machine.checkout}/program.py --rounds 2\n" in log
    assert f"{python} -m pytest -x -n {WORKERS} --dist loadfile\n" in log
    assert f"{python} -m pytest -m  tests/test_x.py -k y\n" in log
    assert (ROOT / blas.relative_to(machine.checkout)).is_file()
    given = machine.mis("distill", LD_PRELOAD="/nowhere/libopenblas.so.0").stdout
    assert "with LD_PRELOAD=/nowhere/libopenblas.so.0\n" in given


@pytest.mark.parametrize("update", [False, True], ids=["first", "update"])
def test_ctrl_c_in_the_installation(machine: Machine, tmp_path: Path, update: bool) -> None:
    """A real signal to the script and to pip: one sentence, exit code 130, and the next start
    begins anew.
    """
    if update:
        machine.mis("distill")
        machine.change()
    begun = tmp_path / "pip has begun"
    with subprocess.Popen(
        [str(machine.checkout / "scripts" / "mis"), "distill"],
        env={"PATH": str(machine.bin), "LOG": str(machine.log), "PIP_TAKES_LONG": str(begun)},
        cwd=machine.cwd,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not begun.exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(said.splitlines()) == 2
    (machine.venv / "half").touch()
    assert machine.mis("distill").returncode == 0
    assert not (machine.venv / "half").exists()
