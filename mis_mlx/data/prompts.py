"""Prompts that a teacher answers, so that its student learns to answer.

benchmarks/prompts.py makes them. Sixteen kinds in English and Polish, from explanations to second
turns. The prompts that judge a student (evaluation/answers) have other templates and other words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mis_mlx.storage import run_folder

TRAIN = Path(__file__).parent / "prompts" / "train.jsonl"


class Prompt(NamedTuple):
    """turns: the user's sentences; the model answers each turn before it reads the next one."""

    kind: str
    language: str
    turns: tuple[str, ...]


def train(count: int | None = None, languages: Sequence[str] = ("en", "pl")) -> list[Prompt]:
    """The first `count` prompts in these languages; None: all. Kinds and templates come in turn."""
    prompts = []
    for row in run_folder.records(TRAIN):
        if row["language"] in languages:
            prompts.append(Prompt(row["kind"], row["language"], tuple(row["turns"])))
    return prompts[:count]
