"""The workflow file: which machines run what, what may stop a merge, what is kept. Nobody has seen
it run.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

WORKFLOW = Path(__file__).parents[1] / ".github" / "workflows" / "test.yml"
RETIRED = ("macos-12", "macos-13", "macos-14")  # actions/runner-images issue 13518


@pytest.fixture(name="jobs")
def _jobs() -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    return jobs


def machines(job: dict[str, Any]) -> dict[str, int]:
    """{image: minutes} that a job runs on."""
    rows = job.get("strategy", {}).get("matrix", {}).get("include")
    if rows:
        return {row["os"]: row["minutes"] for row in rows}
    return {job["runs-on"]: job["timeout-minutes"]}


def test_every_image_still_exists(jobs: dict[str, Any]) -> None:
    """A job on a retired image never starts."""
    images = list(chain.from_iterable(map(machines, jobs.values())))
    assert "macos-15" in images
    assert not set(images) & set(RETIRED)


def test_what_stops_a_merge_runs_on_the_cpu(jobs: dict[str, Any]) -> None:
    """Every job but Metal's is blocking, has the CPU for its device, and on macOS the time that new
    processes take.
    """
    blocking = [job for job in jobs.values() if not job.get("continue-on-error")]
    assert blocking
    assert all(job["env"]["MIS_MLX_DEVICE"] == "cpu" for job in blocking)
    minutes = dict(chain.from_iterable(machines(job).items() for job in blocking))
    assert minutes["macos-15"] >= 60 > minutes["ubuntu-latest"]


def test_metals_job_stands_by_itself(jobs: dict[str, Any]) -> None:
    """It stops nothing, ends in time, checks every command as Metal's debug device does, imitates
    an M1, and keeps the doctor's report whatever happened.
    """
    metal = jobs["metal"]
    assert metal["continue-on-error"] is True
    # one system for each of MLX's wheels that a runner has
    assert set(machines(metal)) == {"macos-15", "macos-26"}
    assert metal["env"] == {
        "METAL_DEVICE_WRAPPER_TYPE": "1",
        "METAL_DEBUG_ERROR_MODE": "0",
        "MLX_METAL_GPU_ARCH": "applegpu_g13g",
    }
    steps = {step.get("uses", step.get("run", "")): step for step in metal["steps"]}
    doctor = next(command for command in steps if "scripts/mis doctor" in command)
    kept = steps["actions/upload-artifact@v4"]
    assert kept["with"]["path"] == doctor.rpartition("--out ")[2]
    assert kept["with"]["name"] == "doctor-${{ matrix.os }}"  # two of one name would be refused
    assert kept["if"] == "${{ !cancelled() }}"
    limits = [
        step["timeout-minutes"] for step in metal["steps"] if "scripts/mis" in step.get("run", "")
    ]
    assert len(limits) == 2
    assert sum(limits) < min(machines(metal).values())
