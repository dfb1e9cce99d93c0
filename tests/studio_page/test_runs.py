"""Runs that a page starts: processes of `distill` on a tiny model, and what is done to them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mis_mlx.hardware import blas, jobs
from mis_mlx.storage import run_folder
from mis_mlx.studio_page import runs
from mis_mlx.studio_page.runs import FINISHED, RUNNING, STOPPED
from mis_mlx.types import Checkpoint, MisError
from tests.conftest import ROOT, SMALL, files_up_to, mostly_slow

PATIENCE_S = 120
STEPS = 100  # of a run that is stopped in the middle
NAMES = ["..", ".", "", "../other", "/etc", ".studio", "a/b", "nothing-001", None, 3, "x\0"]
START = """
import sys
from mis_mlx.studio_page import runs
from mis_mlx.types import MisError
try:
    print(runs.start("tiny", sys.argv[1:]))
except MisError as error:
    print(f"refused: {error}")
"""
HOLD = """
import signal
from pathlib import Path
from mis_mlx.storage import checkpoint
with checkpoint.lock(Path("runs/mine")):
    print(flush=True)
    signal.pause()
"""


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: dict[str, str]
) -> Iterator[Path]:
    """A user's folder. Whatever still runs in it ends with the test."""
    monkeypatch.chdir(tmp_path)
    own = ("HOME", "HF_HOME", "HF_HUB_OFFLINE", "MIS_MLX_CACHE", "OPENBLAS_NUM_THREADS")
    for name in own:
        monkeypatch.setenv(name, own_home[name])
    yield tmp_path
    for run in runs.listed():
        if run.job:
            jobs.stop(run.job.started, at_once=True)


@pytest.fixture
def line(llama: Checkpoint, text_folder: Path) -> list[str]:
    """Flags of a run that takes a while; of the last ones given, the last counts."""
    flags = ("--teacher", llama.path, "--data", text_folder, *SMALL)
    more = ("--iters", STEPS, "--eval-prompts", 0)
    return [str(flag) for flag in (*flags, *more)]


def wait(over: Callable[[], bool], what: str) -> None:
    """Until it is so."""
    until = time.monotonic() + PATIENCE_S
    while not over():
        assert time.monotonic() < until, f"{what}: {[vars(run) for run in runs.listed()]}"
        time.sleep(0.05)


def state(name: str) -> str:
    """Of a run."""
    return runs.named(name).state


def trained(name: str) -> bool:
    """Whether it has made some steps, more than it has saved at once."""
    return len(run_folder.metrics(runs.RUNS / name)) > 5


@pytest.mark.parametrize("at_once", mostly_slow([False, True], True))
def test_a_run_is_stopped_and_goes_on(here: Path, line: list[str], at_once: bool) -> None:
    """Asked to, or killed: it is listed as what it is, resumed where it was, and finishes."""
    name = runs.start("tiny", line)
    assert name == "tiny-001"
    assert state(name) == RUNNING
    for act in (lambda: runs.start("tiny", line), lambda: runs.resume(name)):
        with pytest.raises(MisError, match="tiny-001"):
            act()
    wait(lambda: trained(name), "steps")
    runs.stop(name, at_once)
    wait(lambda: state(name) == STOPPED, "stopped")
    with pytest.raises(MisError):
        runs.stop(name, at_once)
    last = run_folder.metrics(runs.RUNS / name)[-1]["number"]
    assert last < STEPS
    runs.resume(name)
    assert state(name) == RUNNING
    wait(lambda: state(name) != RUNNING, "the end")
    run = runs.named(name)
    assert run.state == FINISHED, runs.last_lines(run, 5)
    assert run.model_bytes > 0
    assert len(run_folder.metrics(run.folder)) == STEPS
    with pytest.raises(MisError):
        runs.resume(name)


def test_many_pages_start_one_run(here: Path, line: list[str]) -> None:
    """Two processes at the same moment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", START, *line], env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [starter.communicate()[0].strip() for starter in starters]
    assert said.count("tiny-001") == 1
    refused = [words for words in said if words.startswith("refused: tiny-001 is running")]
    assert len(refused) == 1
    assert [run.name for run in runs.listed()] == ["tiny-001"]


@pytest.mark.thorough
def test_a_run_outlives_who_started_it(
    here: Path, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The starter is killed with its whole session, as a terminal that is closed does. Beside the
    run, which may still take all of its budget, a model has to fit.
    """
    runs.check_fits("A model", 2**20)
    with pytest.raises(MisError):
        runs.check_fits("A model", 2**50)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = START + "\nimport os, signal\nsys.stdout.flush()\nos.killpg(0, signal.SIGKILL)\n"
    words = [sys.executable, "-c", code, *line, "--budget", "1GiB"]
    subprocess.run(words, env=env, start_new_session=True, check=False)
    assert state("tiny-001") == RUNNING
    wait(lambda: trained("tiny-001"), "steps")
    monkeypatch.setattr(jobs, "free_bytes", lambda: 2**30)
    with pytest.raises(MisError, match="512 MiB.*tiny-001"):
        runs.check_fits("A model", 2**29)
    runs.stop("tiny-001", at_once=False)
    wait(lambda: state("tiny-001") == STOPPED, "stopped")


@pytest.mark.thorough
def test_a_run_that_is_refused_says_why(here: Path, line: list[str]) -> None:
    """It has no folder, but a log; the next one gets another name."""
    name = runs.start("tiny", [*line, "--budget", "1MiB"])
    wait(lambda: state(name) == STOPPED, "refused")
    run = runs.named(name)
    assert not run.folder.exists()
    (last,) = runs.last_lines(run, 1)
    assert last.startswith("mis_mlx: ")
    assert runs.start("tiny", ["--help"]) == "tiny-002"


@pytest.mark.parametrize("name", [*NAMES, "link-001"])
def test_a_name_is_no_path(here: Path, name: object) -> None:
    """Nothing outside of runs/ is listed, stopped or resumed, nor by a link."""
    for folder in (here / "other", here / "runs" / "real-001"):
        folder.mkdir(parents=True)
        (folder / run_folder.CONFIG).write_text("iters: 1\n")
    (here / "runs" / "link-001").symlink_to(here / "other")
    before = sorted(here.rglob("*"))
    assert "link-001" not in [run.name for run in runs.listed()]
    for act in (runs.named, runs.resume, lambda name: runs.stop(name, at_once=True)):
        with pytest.raises(MisError):
            act(name)
    after = [path for path in sorted(here.rglob("*")) if ".studio" not in path.parts]
    assert after == before


def test_where_nothing_can_be_written_nothing_runs(here: Path, line: list[str]) -> None:
    """A sentence, no process, and afterwards the page works as before."""
    with files_up_to(0), pytest.raises(MisError, match="was not saved"):
        runs.start("tiny", line)
    assert runs.listed() == []
    assert runs.start("tiny", ["--help"]) == "tiny-001"


def test_damaged_records_harm_nobody(here: Path) -> None:
    """Torn, of another version, of a process number that is somebody else's by now."""
    own = jobs.Started(os.getpid(), 0.0)
    assert not jobs.alive(own)
    reused = {"flags": [], "pid": own.pid, "created_s": 0.0, "began_s": 2.0}
    texts = {"torn": '{"flags', "other": "[1]", "more": '{"flags": [], "x": 1}'}
    texts["reused"] = json.dumps(reused)
    runs.BOOKS.mkdir(parents=True)
    for name, text in texts.items():
        (runs.BOOKS / f"{name}.json").write_text(text)
    assert {run.name: run.state for run in runs.listed()} == dict.fromkeys(texts, STOPPED)
    assert runs.running() is None
    with pytest.raises(MisError):
        runs.stop("reused", at_once=True)


@pytest.mark.parametrize("model", ["Żubr", "_model", "a model"])
def test_every_run_that_was_started_is_seen(here: Path, model: str) -> None:
    """Whatever the teacher is called; it works alone, and is stopped."""
    name = runs.start(model, ["--help"])
    assert runs.named(name).job
    with contextlib.suppress(MisError):  # it may have ended meanwhile
        runs.stop(name, at_once=True)


def test_a_run_that_a_terminal_resumed_is_stopped(here: Path) -> None:
    """Its record names no process that lives; the one that holds its lock is asked."""
    runs.make_books()
    (runs.BOOKS / "mine.json").write_text('{"flags": []}')
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=env, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            assert state("mine") == RUNNING
            runs.stop("mine", at_once=True)
        finally:
            process.kill()
    assert state("mine") == STOPPED


@pytest.mark.parametrize(("mark", "threads"), [(blas.CHOSEN, None), ("on", "1")])
def test_a_run_chooses_its_own_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, threads: str | None
) -> None:
    """Not those that the page found when it began; the user's own number reaches it."""
    monkeypatch.setenv(blas.MARK, mark)
    monkeypatch.setenv(blas.THREADS, "1")
    started = jobs.start("distill", ["--help"], tmp_path / "log")
    wait(lambda: bool(psutil.Process(started.pid).environ()), "an environment")
    assert psutil.Process(started.pid).environ().get(blas.THREADS) == threads


def test_what_a_crash_left_half_written_goes(here: Path) -> None:
    """When a run is started or resumed; logs stay."""
    runs.make_books()
    (runs.BOOKS / ".tmp-tiny-001.json-4321").write_text("half")
    (runs.BOOKS / "tiny-002.log").write_text("stays")
    with pytest.raises(MisError):
        runs.resume("no-such-run")
    assert {path.name for path in runs.BOOKS.iterdir()} == {".lock", "tiny-002.log"}
