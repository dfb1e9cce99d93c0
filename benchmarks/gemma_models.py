"""What `plan` says of Gemma 4 on Macs of 8 and 16 GB, for docs/models.md. Computed.

    scripts/mis benchmarks/gemma_models.py    # minutes; nothing is downloaded
    scripts/mis scripts/render.py             # writes the page's table from it

Only tokens go: half or a quarter of them stay, and the rest is rounded to 4.5 bits a weight. Once
as `distill` does it by default, with GPTQ, and once with --q-method round, which takes less memory
and time. The machines are M1 Airs by published rates. The budget is what `distill` takes by itself
there: 4 and 8 GiB.

The shapes come with the package; tests/models/test_gemma4.py compares their
parameters with the published numbers. Writes benchmarks/results/<machine>/gemma_models.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import laboratory
import models_table

from mis_mlx import cli, plan
from mis_mlx.hardware import rates
from mis_mlx.models.architectures import arch
from mis_mlx.planner import estimates

TITLES = {
    "gemma-4-e2b": "Gemma 4 E2B",
    "gemma-4-e4b": "Gemma 4 E4B",
}
MACHINES: dict[str, estimates.Machine] = {"8 GB": "m1-air", "16 GB": "m1-air-16gb"}
STUDENTS = {"half": "0.5x", "quarter": "0.25x"}
METHODS = ("gptq", "round")


@dataclass(frozen=True)
class Settings:
    """Nothing to set: all four models."""


def planned(teacher: str, machine: estimates.Machine, vocab: str, method: str) -> dict[str, Any]:
    """What a plan says of one student. method: how it is rounded."""
    settings = plan.Settings(
        teacher=teacher,
        machine=machine,
        scenario="none",
        vocab=vocab,
        q_method=method,  # type: ignore[arg-type]
    )
    made, _ = plan.planned(settings, estimates.machine_rates(machine))
    return models_table.student(made)


def row(teacher: str) -> dict[str, Any]:
    """All plans of one model: of each student, by method and machine."""
    config = arch.PUBLISHED[teacher]
    students = dict[str, Any]()
    for student, vocab in STUDENTS.items():
        plans = dict[str, Any]()
        for method in METHODS:
            for memory, machine in MACHINES.items():
                plans[f"{method}, {memory}"] = planned(teacher, machine, vocab, method)
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
    given = {"machine": "m1-air", "rates": rates.M1_AIR.source, "machines": MACHINES}
    laboratory.write(
        name="gemma_models",
        command="scripts/mis benchmarks/gemma_models.py",
        found={"given": given, "rows": rows},
    )


if __name__ == "__main__":
    laboratory.start(Settings, main)
