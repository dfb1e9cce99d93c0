"""`distill` gone on with by other matrix products, or in other threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx.storage import run_folder
from tests import forks
from tests.conftest import Done, losses, weights


@pytest.mark.thorough
def test_threads_of_matrix_products_stay(
    tmp_path: Path, finished: tuple[Path, Done], own_home: dict[str, str]
) -> None:
    """Their number is chosen by what else is busy, and another one adds up in another order. A run
    goes on with that of its beginning.
    """
    assert run_folder.stored_settings(finished[0], run_folder.ORIGIN)["blas_threads"] == "1"
    out = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("distilled", "model", "steps/step-00000018"):
        shutil.rmtree(out / name)
    (out / "result.json").unlink()
    # A process from its start: two threads would not live through a fork.
    line = [sys.executable, "-m", "mis_mlx.distill", "--resume", "--out", str(out)]
    env = {**own_home, "PYTHONPATH": str(forks.ROOT), "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OPENBLAS_NUM_THREADS=1, as when the run began, not 2" in done.stderr
    assert weights(out) == weights(finished[0])
    assert losses(out) == losses(finished[0])


@pytest.mark.slow
def test_other_matrix_products_are_said(
    tmp_path: Path, finished: tuple[Path, Done], own_home: dict[str, str]
) -> None:
    """A resume without the fast ones computes on, and says that the bits may differ."""
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "result.json").unlink()
    slow = ("LD_PRELOAD", "MLX_BFS_MAX_WIDTH")
    env = {name: value for name, value in own_home.items() if name not in slow}
    line = ["-m", "mis_mlx.distill", "--resume", "--out", out]
    done = forks.run(line, {**env, "MIS_MLX_BLAS": "off"})
    assert done.returncode == 0, done.stderr
    assert "blas was OpenBLAS, is now MLX's own: the result may differ" in done.stderr
