"""The search for sizes is the first phase of a run: stopped, killed, gone on with; other text."""

from __future__ import annotations

import os
import shutil
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


@pytest.mark.thorough
def test_killed_in_its_search(
    tmp_path: Path, line: Line, whole: tuple[Path, Done], own_home: dict[str, str]
) -> None:
    """--resume finds it, although an older run is unfinished, too; what was measured is not
    measured again; the weights are those of the undisturbed run, to the last bit.
    """
    cache = tmp_path / "cache"  # of its own: nothing that another search measured is known
    shutil.copytree(own_home["MIS_MLX_CACHE"], cache)
    shutil.rmtree(cache / "searches", ignore_errors=True)
    env = {**own_home, "MIS_MLX_CACHE": str(cache), "PYTHONPATH": str(forks.ROOT)}
    older = tmp_path / "runs" / "older-001"
    older.mkdir(parents=True)
    shutil.copy(whole[0] / run_folder.CONFIG, older)
    os.utime(older / run_folder.CONFIG, (1e9, 1e9))

    def begun() -> list[Path]:
        return [run for run in (tmp_path / "runs").glob("*") if measured(run)]

    process = forks.start(["-m", "mis_mlx.distill", *line], env, tmp_path)
    while process.poll() is None and not begun():
        time.sleep(0.005)
    process.kill()
    process.wait()
    (run,) = begun()
    assert not run_folder.is_decided(run)
    before = (run / run_folder.SEARCH / candidates.PROBES).read_text()
    done = forks.run(["-m", "mis_mlx.distill", "--resume"], env, tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_line(done)["run"] == str(run.relative_to(tmp_path))
    assert (run / run_folder.SEARCH / candidates.PROBES).read_text().startswith(before)
    assert weights(run) == weights(whole[0])
    assert run_folder.stored_settings(run) == run_folder.stored_settings(whole[0])
    assert {path.name for path in older.iterdir()} == {run_folder.CONFIG}
