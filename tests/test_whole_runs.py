"""A whole `distill` in a process of its own: what the system counts of it, and what was planned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx.models.opening import load, resolve
from mis_mlx.reporting import run_reader

pytestmark = pytest.mark.slow

BUDGET_MIB = 480  # of a teacher of 538 MB in float32, which is read from disk
SMALL = (
    *("--max-seq-length", "64", "--num-samples", "4", "--eval-windows", "3"),
    *("--eval-prompts", "2", "--q-iters", "2"),
)


def distilled(out: Path, *flags: str) -> int:
    """`distill` into `out`: the process's largest resident set in bytes, as the kernel counts."""
    line = [sys.executable, "-m", "mis_mlx", "distill", "--out", str(out), *SMALL, *flags]
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, said[-2000:]
    return used.ru_maxrss * 1024


def phases(out: Path) -> tuple[set[str], set[str]]:
    """(phases that a finished run planned, phases that it went through)."""
    run = run_reader.read(out)
    return {phase["phase"] for phase in run.begun["planned"]}, set(run.took())


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(run, largest resident set) of a teacher that is bigger than the budget."""
    folder = tmp_path_factory.mktemp("streamed")
    teacher = resolve.resolve_model(None).path
    load.mlx_lm("convert").convert(str(teacher), str(folder / "teacher"), dtype="float32")
    flags = ("--teacher", str(folder / "teacher"), "--budget", f"{BUDGET_MIB}MiB")
    return folder / "run", distilled(folder / "run", *flags)


@pytest.mark.xfail(
    strict=True,
    reason="plans leave out what Python, libraries and the tokenizer hold before the work begins",
)
def test_a_whole_run_stays_below_its_budget(streamed: tuple[Path, int]) -> None:
    """The process, search and judging included, never holds more than --budget."""
    assert streamed[1] <= BUDGET_MIB * 2**20


def test_a_streamed_run_goes_through_the_phases_that_it_planned(
    streamed: tuple[Path, int],
) -> None:
    """Nothing was done that the time line had left out."""
    planned, taken = phases(streamed[0])
    assert taken == planned


def test_a_resident_run_goes_through_the_phases_that_it_planned(tmp_path: Path) -> None:
    """The same of the default teacher, which fits."""
    distilled(tmp_path / "run")
    planned, taken = phases(tmp_path / "run")
    assert taken == planned
