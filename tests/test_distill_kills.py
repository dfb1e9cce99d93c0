"""`distill` killed, stopped, damaged and resumed: the end is that of the undisturbed run, to the
last bit.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx.storage import run_folder
from tests import forks
from tests.conftest import ITERS, Done, losses, sentence, weights


class Child:
    """`distill` as a process of its own that can be killed."""

    def __init__(self, env: dict[str, str], *argv: object):
        pipe = subprocess.PIPE
        line = ["-m", "mis_mlx.distill", *argv]
        self.process = forks.start(line, env, stdout=pipe, stderr=pipe)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds or the process has ended."""
        while not condition() and self.process.poll() is None:
            time.sleep(0.005)

    def end(self) -> Done:
        """Its exit code and what it said, once it has ended."""
        out, err = self.process.communicate(timeout=120)
        return subprocess.CompletedProcess([], self.process.returncode, out, err)


def progress(out: Path) -> float:
    """How far a run is, 0 to 1, by what is on disk: half of it the training steps."""
    names = ("config.yaml", "pruned", "steps", "distilled", "model", "result.json")
    return (
        sum((out / name).exists() for name in names) + 6 * len(run_folder.metrics(out)) / ITERS
    ) / 12


def holds(out: Path, process: int) -> bool:
    """Whether this process has the run's lock."""
    lock = out / ".lock"
    return lock.exists() and f"process {process} " in lock.read_text()


def start(out: Path, flags: tuple[object, ...], env: dict[str, str]) -> Child:
    """A new run, or what there is of it resumed."""
    born = run_folder.is_run(out)
    return Child(env, *(("--resume",) if born else flags), "--out", out)


@pytest.mark.thorough
def test_killed_and_resumed_is_the_undisturbed_run(
    tmp_path: Path, finished: tuple[Path, Done], flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """SIGKILL at five random moments, --resume until it ends: distilled/ and model/ are equal to
    the last bit.

    A moment is a share of the way and up to a tenth of a second, so that slow machines are hit
    where quick ones are.
    """
    out = tmp_path / "run"
    moments = random.Random(5)
    killed = 0
    for share in sorted(moments.uniform(0.0, 0.8) for _ in range(5)):
        child = start(out, flags, own_home)
        number = child.process.pid
        child.wait_for(
            lambda share=share, n=number: progress(out) >= share and (share < 0.08 or holds(out, n))
        )
        time.sleep(moments.uniform(0.0, 0.1))
        child.process.kill()
        killed += child.end().returncode == -signal.SIGKILL
    done = start(out, flags, own_home).end()
    assert done.returncode == 0 and killed >= 3, done.stderr
    assert weights(out) == weights(finished[0])
    assert losses(out) == losses(finished[0])
    assert sorted(p.name for p in (out / "steps").iterdir()) == ["step-00000016", "step-00000018"]
    assert not [*out.rglob(".tmp-*"), *out.rglob(".trash-*")]


def test_sigterm_stops_after_the_step(
    tmp_path: Path,
    finished: tuple[Path, Done],
    flags: tuple[object, ...],
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """Exit code 1, a sentence with the step and how to go on, that step saved; the resumed run ends
    bit-equal.
    """
    out = tmp_path / "run"
    child = Child(own_home, *flags, "--out", out)
    child.wait_for(lambda: (out / "metrics.jsonl").exists() and len(run_folder.metrics(out)) >= 3)
    child.process.terminate()
    said = sentence(child.end())
    step = int(said.split("stopped at step ")[1].split()[0])
    assert 3 <= step < ITERS
    assert f"--out {out} --resume" in said
    assert (out / "steps" / f"step-{step:08d}").is_dir()
    assert not (out / "distilled").exists()
    done = command("distill", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {step}" in done.stderr
    assert weights(out) == weights(finished[0])
    assert losses(out) == losses(finished[0])


def test_a_damaged_checkpoint_costs_steps_not_the_run(
    tmp_path: Path, finished: tuple[Path, Done], command: Callable[..., Done]
) -> None:
    """One bit of the last checkpoint flipped: said, the one before is used, and the end is the
    same.
    """
    out = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("distilled", "model"):
        shutil.rmtree(out / name)
    (out / "result.json").unlink()
    path = out / "steps" / "step-00000018" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    done = command("distill", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 18 is damaged (model.safetensors), using 16" in done.stderr
    assert weights(out) == weights(finished[0])
    assert losses(out) == losses(finished[0])


@pytest.mark.thorough
def test_threads_of_matrix_products_stay(
    tmp_path: Path,
    finished: tuple[Path, Done],
    flags: tuple[object, ...],
    own_home: dict[str, str],
) -> None:
    """Their number is chosen by what else is busy, and another one adds up in another order. A run
    goes on with that of its beginning.
    """
    assert run_folder.stored_settings(finished[0], run_folder.ORIGIN)["blas_threads"] == "1"
    out = tmp_path / "run"
    child = Child(own_home, *flags, "--out", out)
    child.wait_for(lambda: (out / "metrics.jsonl").exists() and len(run_folder.metrics(out)) >= 5)
    child.process.kill()
    child.end()
    assert len(run_folder.metrics(out)) < ITERS
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
    done = Child({**env, "MIS_MLX_BLAS": "off"}, "--resume", "--out", out).end()
    assert done.returncode == 0, done.stderr
    assert "blas was OpenBLAS, is now MLX's own: the result may differ" in done.stderr
