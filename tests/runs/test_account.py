"""What a run has taken, over all processes that worked on it, and where its models and data lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx import sft
from mis_mlx.runs import run_loop
from mis_mlx.runs.run_loop import Account
from mis_mlx.storage import run_folder
from tests.conftest import Done, last_line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that accounts see."""
    now = [1000.0]
    monkeypatch.setattr(run_loop.time, "monotonic", lambda: now[0])
    return now


def test_processes_add_up(tmp_path: Path, clock: list[float]) -> None:
    """30 s, then 12 s after an hour in which nobody worked; the larger peak; all tea breaks."""
    first = Account(tmp_path)
    first.breaks.count = 2
    first.breaks.seconds = 5.0
    first.peak.note(2**40)
    clock[0] += 30
    first.keep()
    clock[0] += 3600
    second = Account(tmp_path)
    clock[0] += 12
    assert second.seconds == pytest.approx(42)
    assert second.peak_bytes == 2**40
    assert (second.breaks.count, second.breaks.seconds) == (2, 5.0)


def test_a_kill_costs_seconds(tmp_path: Path, clock: list[float]) -> None:
    """It is kept from time to time, not at every step; that of a part keeps that of the whole."""
    whole = Account(tmp_path)
    (tmp_path / "part").mkdir()
    part = Account(tmp_path / "part", whole=whole)
    clock[0] += run_loop.EVERY_S - 1
    part.keep_sometimes()
    assert not (tmp_path / run_folder.TAKEN).exists()
    clock[0] += 1
    part.keep_sometimes()
    for folder in (tmp_path, tmp_path / "part"):
        assert Account(folder).seconds == pytest.approx(run_loop.EVERY_S)


def test_a_resumed_run_tells_of_all_of_it(
    tmp_path: Path, finished: tuple[Path, Done], command: Callable[..., Done]
) -> None:
    """Killed after its last model was written: seconds, memory and tea breaks of the processes
    before are in the result.
    """
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / run_folder.RESULT).unlink()
    taken = json.loads((out / run_folder.TAKEN).read_text())
    taken |= {"seconds": 5000.0, "peak_bytes": 2**40}
    taken["tea"] |= {"count": 3, "seconds": 60.0, "reasons": {"hot": 3}}
    (out / run_folder.TAKEN).write_text(json.dumps(taken))
    done = command("distill", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert result["seconds"] > 5000
    assert result["peak_bytes"] == 2**40
    assert (result["tea_breaks"], result["throttled_s"]) == (3, 60.0)
    assert result["tea_reasons"] == {"hot": 3}


def test_a_folder_stays_the_one_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder `owner/model` would be a stranger's on the hub."""
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked, _ = run_loop.resumed(sft.Settings(model="owner/model", data="org/set"), frozenset())
    assert asked.model == str(tmp_path / "owner" / "model")
    assert asked.data == "org/set"
