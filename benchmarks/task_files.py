"""Write the generated tasks anew: what `sft`, `dpo` and `grpo` learn without --data, and what
`evaluate` asks.

    scripts/mis benchmarks/task_files.py

Seconds. The files come out as they are in the checkout, to the byte, unless polish_text/ was
changed. Problems to train on and problems to be examined in are disjoint (polish_text/problems.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polish_text import minimal_pairs, problems

from mis_mlx.data import examples
from mis_mlx.judge.tasks import task_registry
from mis_mlx.storage.files import DISK

# rows
TRAIN = 400
VALID = 320
QUESTIONS = 200
EXAMS: dict[str, tuple[str, ...]] = {
    "maths": ("sums", "two-digit-sums"),
    "bus": ("bus",),
    "cooking": ("recipe",),
    "logic": ("logic",),
}


def choices(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The right answer against a likely slip, which comes first half of the time; not how to write
    it down.
    """
    made = []
    for number, row in enumerate(rows):
        end = problems.END[row["language"]].partition("{")[0]  # type: ignore[index]
        mark = problems.MARK[row["language"]]  # type: ignore[index]
        wrong = row["rejected"].rpartition(f"{mark}: ")[2]
        options = [row["answer"], wrong] if number // 2 % 2 else [wrong, row["answer"]]
        question = row["prompt"].partition(f" {end}")[0]
        made.append(
            {
                "question": question,
                "options": options,
                "answer": row["answer"],
                "language": row["language"],
            }
        )
    return made


def write(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """One file."""
    DISK.make_folder(folder)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    DISK.replace_text(folder / f"{name}.jsonl", lines)


def main(lessons: Path, exams: Path) -> None:
    """All files: rows to learn from, and questions."""
    for name, split, count in (("train", "train", TRAIN), ("valid", "test", VALID)):
        rows = problems.rows(split, 0, count)  # type: ignore[arg-type]
        write(lessons, name, ({**row, "chosen": row["completion"]} for row in rows))
    for name, kinds in EXAMS.items():
        rows = problems.rows("test", 0, QUESTIONS, kinds)
        write(exams, name, choices(rows))
        written = []
        for row in rows:
            written.append({key: row[key] for key in ("prompt", "answer", "language")})
        write(exams, f"{name}-written", written)
    for language in minimal_pairs.RULES:
        write(exams, f"grammar-{language}", minimal_pairs.rows(language, QUESTIONS))


if __name__ == "__main__":
    main(examples.BUILT_IN, task_registry.BUILT_IN)
