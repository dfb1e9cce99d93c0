"""The default teacher's answers that come with the package, as training text and for judging:
written once.

    scripts/mis benchmarks/training_answers.py              # a quarter of an hour on 2 cores
    scripts/mis benchmarks/training_answers.py --judging    # the other file: 8 minutes

Writes mis_mlx/data/written/answers.jsonl, less what shares text with the other file; or that one,
mis_mlx/judge/teacher_answers.jsonl. Stopped, the same command goes on. The same machine
and versions give the same files; another processor may round another token to the top.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from laboratory import start

from mis_mlx import cli
from mis_mlx.data import preparation, prompts
from mis_mlx.distillation import teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.judge import answers
from mis_mlx.judge.tasks import questions
from mis_mlx.models.opening import compute_type, resolve
from mis_mlx.reporting import progress
from mis_mlx.storage import run_folder

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
    teacher = compute_type.open_to_compute(resolve.resolve_model().path)
    limit = memory.budget(None)
    with progress.run("answers"):
        if s.judging:
            found = answers.ship(teacher, answers.prompts(ALL), limit)
            cli.say(f"{answers.SHIPPED}: {len(found.prompts)} prompts answered")
            return
        how = teacher_answers.WritingSettings(prompts.train(s.count))
        written = teacher_answers.write(teacher, how, preparation.ANSWERS, limit)
    kept = drop_shared(preparation.ANSWERS, answers.SHIPPED)
    cli.say(
        f"{preparation.ANSWERS}: {kept} conversations of {s.count} prompts, {written - kept} left "
        f"out"
    )


def drop_shared(training: Path, judging: Path) -> int:
    """Leave conversations out that share 13 words in a row with an answer that judges; how many
    stay.

    A teacher begins many mails with the same sentences.
    """
    records = run_folder.records(judging)
    known = set[tuple[str, ...]]()
    for record in records:
        for kind in ("sampled", "greedy"):
            if kind in record:
                known |= runs_of(record[kind]["text"])
    lines = training.read_text("utf-8").splitlines()
    left = [line for line in lines if not known & runs_of(questions.text_of(json.loads(line)))]
    training.write_text("".join(f"{line}\n" for line in left), "utf-8")
    return len(left)


def runs_of(text: str) -> set[tuple[str, ...]]:
    """All runs of so many words as tell of shared text."""
    words = questions.words(text)
    return {
        tuple(words[start : start + questions.SPAN])
        for start in range(len(words) - questions.SPAN + 1)
    }


if __name__ == "__main__":
    start(Settings, main)
