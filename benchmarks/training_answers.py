"""The default teacher's answers that come with the package, as training text and for judging: written once.

    scripts/mis benchmarks/training_answers.py              # a quarter of an hour on 2 cores
    scripts/mis benchmarks/training_answers.py --judging    # the other file: 8 minutes

Writes mis_mlx/data/written/answers.jsonl, or mis_mlx/evaluation/sets/teacher_answers.jsonl. Stopped, the same command
goes on. The same machine and versions give the same files; another processor may round another token to the top.
"""

from __future__ import annotations

from dataclasses import dataclass

from laboratory import start

from mis_mlx import cli
from mis_mlx.data import preparation, prompts
from mis_mlx.distillation import teacher_answers
from mis_mlx.evaluation import answers
from mis_mlx.hardware import memory
from mis_mlx.models import load, resolve
from mis_mlx.reporting import progress

ALL = 10_000


@dataclass(frozen=True)
class Settings:
    """Which file."""

    count: int = 640
    """prompts that are answered for training"""
    judging: bool = False
    """answer the held-out prompts instead"""


def main(s: Settings) -> None:
    """Write one of the files."""
    teacher = load.open_checkpoint(resolve.resolve_model().path)
    limit = memory.budget(None)
    with progress.run("answers"):
        if s.judging:
            found = answers.ship(teacher, answers.prompts(ALL), limit)
            cli.say(f"{answers.SHIPPED}: {len(found.prompts)} prompts answered")
            return
        how = teacher_answers.Writing(prompts.train(s.count))
        kept = teacher_answers.write(teacher, how, preparation.ANSWERS, limit)
        cli.say(f"{preparation.ANSWERS}: {kept} conversations of {s.count} prompts")


if __name__ == "__main__":
    start(Settings, main)
