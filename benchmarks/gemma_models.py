"""What `plan` says of Gemma 4 and Gemma 3n on Macs of 8 and 16 GB, for docs/models.md. Computed.

    scripts/mis benchmarks/gemma_models.py    # minutes; nothing is downloaded
    scripts/mis scripts/render.py             # writes the page's table from it

Only tokens go: half or a quarter of them stay, and the rest is rounded to 4.5 bits a weight. Once
as `distill` does it by default, with GPTQ, and once with --q-method round, which takes less memory
and time. The machine is an M1 Air by published rates; one of 16 GB has twice the room for a
process. With 8 GB the budget is what `distill` takes by itself there; with 16 GB it is one that has
to be asked for, `--budget 10GiB`.

The shapes come with the package; tests/models/test_gemma4.py and test_gemma3n.py compare their
parameters with the published numbers. Writes benchmarks/results/<machine>/gemma_models.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import laboratory
import models_table

from mis_mlx import cli, plan
from mis_mlx.hardware import rates
from mis_mlx.models import arch

TITLES = {
    "gemma-4-e2b": "Gemma 4 E2B",
    "gemma-4-e4b": "Gemma 4 E4B",
    "gemma-3n-e2b": "Gemma 3n E2B",
    "gemma-3n-e4b": "Gemma 3n E4B",
}
BUDGETS = {"8 GB": "5GiB", "16 GB": "10GiB"}
STUDENTS = {"half": "0.5x", "quarter": "0.25x"}
METHODS = ("gptq", "round")


@dataclass(frozen=True)
class Settings:
    """Nothing to set: all four models."""


def planned(teacher: str, budget: str, vocab: str, method: str) -> dict[str, Any]:
    """What a plan says of one student. method: how it is rounded."""
    settings = plan.Settings(
        teacher=teacher,
        machine="m1-air",
        budget=budget,
        scenario="none",
        vocab=vocab,
        q_method=method,  # type: ignore[arg-type]
    )
    room = rates.M1_AIR.room_bytes
    assert room is not None
    machine = replace(rates.M1_AIR, room_bytes=2 * room)
    made, _ = plan.planned(settings, machine)
    return models_table.student(made)


def row(teacher: str) -> dict[str, Any]:
    """All plans of one model: of each student, by method and machine."""
    config = arch.PUBLISHED[teacher]
    students = dict[str, Any]()
    for student, vocab in STUDENTS.items():
        plans = dict[str, Any]()
        for method in METHODS:
            for machine, budget in BUDGETS.items():
                plans[f"{method}, {machine}"] = planned(teacher, budget, vocab, method)
        students[student] = plans
    return {
        "title": TITLES[teacher],
        "params": arch.params(config),
        "bytes": 2 * arch.params(config),
        "students": students,
    }


def main(_: Settings) -> None:
    """Plan for every model; store the rows."""
    rows = {}
    for teacher in TITLES:
        rows[teacher] = row(teacher)
        cli.say(f"{teacher}: planned")
    given = {"machine": "m1-air", "rates": rates.M1_AIR.source, "budgets": BUDGETS}
    laboratory.write(
        name="gemma_models",
        command="scripts/mis benchmarks/gemma_models.py",
        found={"given": given, "rows": rows},
    )


if __name__ == "__main__":
    laboratory.start(Settings, main)
