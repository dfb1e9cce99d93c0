"""How a command ends when somebody leaves: real pipes whose reader is gone, real signals in the
first second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import __version__, cli, distill
from mis_mlx.__main__ import commands
from mis_mlx.distillation import pipeline
from mis_mlx.runs import run_loop
from mis_mlx.types import Checkpoint, Step
from tests.conftest import SMALL, mostly_thorough

ROOT = Path(__file__).parent.parent

# Sends Ctrl-C to its own process at the moment when a module of this name is imported.
CTRL_C = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch, own_home: dict[str, str]) -> None:
    """No process here measures this machine's rates, which takes half a second."""
    monkeypatch.setenv("MIS_MLX_CACHE", own_home["MIS_MLX_CACHE"])


def bare() -> dict[str, str]:
    """The environment of somebody who has set nothing."""
    ours = ("MIS_MLX_BLAS", "OPENBLAS_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def unread(*argv: object, stream: str = "stdout") -> tuple[int, str]:
    """Exit code and the other stream of `python ARGV` whose output nobody reads any more, in a bare
    environment.
    """
    ends, beginning = os.pipe()
    os.close(ends)
    kept = "stderr" if stream == "stdout" else "stdout"
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=bare(),
        text=True,
        **{stream: beginning, kept: subprocess.PIPE},
    )
    os.close(beginning)
    return done.returncode, getattr(done, kept)


@pytest.mark.parametrize("line", mostly_thorough(["mis_mlx", "mis_mlx plan --help"], "mis_mlx"))
def test_help_into_a_closed_pipe(line: str) -> None:
    """`--help | head`: ended as by SIGPIPE, and not a word of it."""
    assert unread("-m", *line.split()) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_stream_that_is_closed_from_the_first(closed: str, llama: Checkpoint) -> None:
    """Nothing is printed there, and nothing is amiss."""
    line = f"{sys.executable} -m mis_mlx.plan --teacher {llama.path} {closed}"
    done = subprocess.run(["sh", "-c", line], env=bare(), capture_output=True, text=True)
    assert done.returncode == 0
    assert bool(done.stdout) == (closed == "2>&-") != bool(done.stderr)


def test_results_into_a_closed_pipe(llama: Checkpoint) -> None:
    """A command that has computed leaves no traceback on stderr where nobody reads its result."""
    code, said = unread("-m", "mis_mlx.plan", "--teacher", llama.path)
    assert code == 141
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


def test_another_closed_pipe_is_not_hidden() -> None:
    """A BrokenPipeError while our own readers are there is a bug like any other."""
    with pytest.raises(BrokenPipeError, match="theirs"), cli.end_quietly_on_closed_pipe():
        raise BrokenPipeError("theirs")


@pytest.mark.parametrize("module", mostly_thorough(["tyro", "numpy"], "tyro"))
def test_ctrl_c_in_the_first_second(tmp_path: Path, module: str) -> None:
    """While a command is imported: one sentence, exit code 130, nothing made."""
    (tmp_path / "sitecustomize.py").write_text(CTRL_C)
    done = subprocess.run(
        [sys.executable, "-m", "mis_mlx", "distill", "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "AT": module},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 130
    assert done.stderr.startswith("mis_mlx: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_a_run_names_its_folder(
    tmp_path: Path,
    llama: Checkpoint,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In every phase, and after a step, the last one too: exit code 130 and what to type to go on,
    which then does.
    """
    out = tmp_path / "run"
    phase = pipeline.Run.phase
    step_text = run_loop.text.step_text
    hit = list[str]()

    def once(name: str) -> None:
        if name not in hit:
            hit.append(name)
            os.kill(os.getpid(), signal.SIGINT)

    @contextmanager
    def stopped_phase(c: pipeline.Run, name: str) -> Iterator[None]:
        with phase(c, name):
            once(name)
            yield

    def stopped_step(step: Step, *more: Any) -> str:
        if step.number < 3:  # scales are tuned for more of them
            once(f"step {step.number}")
        return step_text(step, *more)

    monkeypatch.setattr(pipeline.Run, "phase", stopped_phase)
    monkeypatch.setattr(run_loop.text, "step_text", stopped_step)
    small = ("--teacher", llama.path, "--data", text_folder, *SMALL, "--iters", 2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    codes = list[Any]()
    try:
        while not codes or codes[-1] == 130:
            words = map(str, ("--resume",) if hit else small)
            monkeypatch.setattr("sys.argv", ["distill", *words, "--out", str(out)])
            with pytest.raises(SystemExit) as caught:
                cli.main(distill.Settings, distill.run)
            codes.append(caught.value.code)
            said = capsys.readouterr().err
            if codes[-1] == 130:
                assert said.endswith(f" --out {out} --resume\n")
                assert "step" not in hit[-1] or hit[-1] in said.splitlines()[-1]
    finally:
        signal.signal(signal.SIGINT, before)
    steps = ["distil", "step 1", "step 2"]
    before_them = ["prune", "logit store", "repair"]
    assert hit == [*before_them, *steps, "quantize", "distil scales", "measure"]
    assert codes == [*[130] * len(hit), 0]


@pytest.mark.parametrize(
    ("words", "code"), [([], 0), (["--version"], 0), (["plan", "--version"], 0), (["destill"], 2)]
)
def test_what_needs_no_package(words: list[str], code: int) -> None:
    """A fresh checkout lists its commands, each with a line of its own, and knows its version,
    before anything is installed, and a word that is no command.
    """
    line = [sys.executable, "-S", "-m", "mis_mlx", *words]
    done = subprocess.run(line, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if "--version" in words:
        assert done.stdout == f"mis_mlx {__version__}\n"
    elif words:
        assert " distill" in done.stderr
    else:
        halves = [line.split(None, 1) for line in done.stdout.splitlines()]
        lines = dict(words for words in halves if len(words) == 2)
        assert all(lines[name] == about != "" for name, about in commands().items())
