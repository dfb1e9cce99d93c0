"""Prompts that a teacher answers, so that a student of it learns to answer (benchmarks/prompts.py
makes them).

Sixteen kinds in English and Polish, from explanations to second turns. What judges a student
(evaluation/answers) is made of other templates and other words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mis_mlx.storage import run_folder

TRAIN = Path(__file__).parent / "prompts" / "train.jsonl"


class Prompt(NamedTuple):
    """turns: what the user says; the model answers each turn before it reads the next one."""

    kind: str
    language: str
    turns: tuple[str, ...]


def train(count: int | None = None, languages: Sequence[str] = ("en", "pl")) -> list[Prompt]:
    """The first `count` prompts in these languages (all, without a count): kinds and templates come
    in turn.
    """
    rows = run_folder.records(TRAIN)
    listed = [Prompt(row["kind"], row["language"], tuple(row["turns"])) for row in rows]
    return [prompt for prompt in listed if prompt.language in languages][:count]
