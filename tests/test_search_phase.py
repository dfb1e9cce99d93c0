"""The search for sizes is the first phase of a run: stopped, killed, gone on with; other text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx.models.architectures import arch
from mis_mlx.size_search import candidates
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint
from tests import forks, tiny
from tests.conftest import Done, last_line, weights

LIMIT = ("--bytes", "190KB")  # below what tokens and bits reach: axes are measured alone
Line = tuple[object, ...]


@pytest.fixture(scope="module")
def line(llama: Checkpoint, text_folder: Path) -> Line:
    """Flags of a `distill` that searches first."""
    return (*tiny.run_flags(llama.path, text_folder), *LIMIT)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, line: Line, command: Callable[..., Done]
) -> tuple[Path, Done]:
    """(run folder, process) of an undisturbed run; do not write into it."""
    here = tmp_path_factory.mktemp("whole")
    done = command("distill", *line, "--out", here / "run", cwd=here)
    assert done.returncode == 0, done.stderr
    return here / "run", done


def test_a_distillation_in_so_many_bytes(whole: tuple[Path, Done], llama: Checkpoint) -> None:
    """A search, then a run with its sizes and bits; the file is no larger than
    asked for.
    """
    run, done = whole
    size = (run / "model" / "model.safetensors").stat().st_size
    assert 0.9 * 190_000 < size <= 190_000
    stored = run_folder.stored_settings(run)
    assert (stored["bytes"], stored["scenario"]) == ("190KB", "none")
    assert stored["target_bpw"] > 3.5
    assert last_line(done)["params_student"] < arch.params(llama.config)
    assert not (run.parent / "runs").exists()


def measured(run: Path) -> int:
    """How many measurements its search has logged."""
    return len(run_folder.records(run / run_folder.SEARCH / candidates.PROBES))


@pytest.fixture
def environment(own_home: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """With a cache of its own: nothing that another search measured is known."""
    cache = tmp_path / "cache"
    shutil.copytree(own_home["MIS_MLX_CACHE"], cache)
    shutil.rmtree(cache / "searches", ignore_errors=True)
    return {**own_home, "MIS_MLX_CACHE": str(cache), "PYTHONPATH": str(forks.ROOT)}


def stopped_in_search(
    line: Line, here: Path, env: dict[str, str], number: int, *, out: Path | None = None
) -> tuple[Path, str]:
    """Send this signal to a run in its search: its folder, and what it said."""
    place = ("--out", out) if out else ()
    words = ["-m", "mis_mlx.distill", *line, *place]
    process = forks.start(words, env, here, stderr=subprocess.PIPE)
    while process.poll() is None and not any(map(measured, runs_in(here, out))):
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert said is not None
    assert process.returncode in (-number, 130), said
    (run,) = [run for run in runs_in(here, out) if measured(run)]
    assert not run_folder.is_decided(run)
    assert not run_folder.records(run / run_folder.PHASES)
    return run, said


def runs_in(here: Path, out: Path | None) -> list[Path]:
    """The one that was named, or all."""
    return [out] if out else list((here / "runs").glob("*"))


@pytest.mark.thorough
def test_killed_in_its_search(
    tmp_path: Path,
    line: Line,
    whole: tuple[Path, Done],
    environment: dict[str, str],
) -> None:
    """--resume finds it, although an older run is unfinished, too; what was measured is not
    measured again; the weights are those of the undisturbed run, to the last bit.
    """
    older = tmp_path / "runs" / "older-001"
    older.mkdir(parents=True)
    shutil.copy(whole[0] / run_folder.CONFIG, older)
    os.utime(older / run_folder.CONFIG, (1e9, 1e9))
    run, _ = stopped_in_search(line, tmp_path, environment, signal.SIGKILL)
    before = (run / run_folder.SEARCH / candidates.PROBES).read_text()
    done = forks.run(["-m", "mis_mlx.distill", "--resume"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_line(done)["run"] == str(run.relative_to(tmp_path))
    assert (run / run_folder.SEARCH / candidates.PROBES).read_text().startswith(before)
    assert weights(run) == weights(whole[0])
    assert run_folder.stored_settings(run) == run_folder.stored_settings(whole[0])
    assert {path.name for path in older.iterdir()} == {run_folder.CONFIG}


@pytest.mark.slow
def test_the_line_that_a_stop_leaves_can_be_pasted(
    tmp_path: Path, line: Line, whole: tuple[Path, Done], environment: dict[str, str]
) -> None:
    """Ctrl-C in the search; then the very line, into a shell."""
    out = tmp_path / "a run"
    run, said = stopped_in_search(line, tmp_path, environment, signal.SIGINT, out=out)
    last = said.splitlines()[-1]
    assert last.startswith("mis_mlx: stopped by hand; finished work is kept: ")
    pasted = last.partition("continue with ")[2]
    done = subprocess.run(
        pasted, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["run"] == str(run)
    assert weights(run) == weights(whole[0])
