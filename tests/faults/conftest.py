"""What the fault tests share: jobs that were made once, and a note of every fault's end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mis_mlx.planner import estimates
from tests.faults import NOTES, jobs, verdicts

Note = Callable[..., None]


@pytest.fixture(scope="session")
def note() -> Note:
    """`note(fault, command, ends, bad)`: a line for the fault matrix, when somebody makes one.

    ends: how it ended, and how often. bad: how often something was lost or wrong. said: what the
    user reads.
    """

    def write(
        fault: str, command: str, ends: Mapping[str, int], bad: int = 0, said: str = ""
    ) -> None:
        if path := os.environ.get(NOTES):
            with Path(path).open("a", encoding="utf-8") as file:
                row = {
                    "fault": fault,
                    "command": command,
                    "ends": dict(ends),
                    "bad": bad,
                    "said": said,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write


@pytest.fixture(scope="session")
def all_jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, jobs.Job]:
    """Every job by its name, on a model and a text made once."""
    return jobs.jobs(*jobs.made(tmp_path_factory.mktemp("made") / "made"))


@pytest.fixture(autouse=True)
def one_set_of_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once for all tests here, and for no test elsewhere."""
    monkeypatch.setattr(estimates, "machine_rates", lambda *_: verdicts.rates())


@pytest.fixture(scope="session")
def known() -> dict[str, verdicts.Whole]:
    """What each job ends with when nothing happens, once somebody has asked."""
    return {}


@pytest.fixture
def bench(
    all_jobs: dict[str, jobs.Job], known: dict[str, verdicts.Whole], tmp_path: Path
) -> Callable[[str], verdicts.Bench]:
    """`bench(name)`: a job, what it ends with undisturbed, and a room for faults under it."""
    return lambda name: verdicts.Bench(all_jobs[name], tmp_path / "room", known)
