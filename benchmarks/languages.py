"""What a student with fewer tokens loses in languages that its text lacks, as a run says it.

    scripts/mis benchmarks/languages.py --teacher FOLDER --student RUN/model --name NAME

For students of runs that did not say it yet. Bits per byte on three short texts of ours
(judge/other_languages). Writes benchmarks/results/<machine>/languages-<name>.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from laboratory import start, write

from mis_mlx import cli
from mis_mlx.judge import other_languages
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import compute_type, resolve


@dataclass(frozen=True)
class Settings:
    """Which two models."""

    teacher: str
    """folder or hub id, with all of its tokens"""
    student: str
    """folder of the student"""
    name: str
    """what to call the student in the results"""


def main(s: Settings) -> None:
    """Both read the texts once."""
    teacher = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path)
    student = compute_type.open_to_compute(resolve.resolve_model(s.student).path)
    found = {
        "tokens": [shape_of(m.config).vocab for m in (teacher, student)],
        "lost": other_languages.excess(teacher, student),
    }
    command = "scripts/mis benchmarks/languages.py --teacher FOLDER --student RUN/model"
    write(f"languages-{s.name}", f"{command} --name {s.name}", found)
    cli.say(str(found))


if __name__ == "__main__":
    start(Settings, main)
