"""What judges shares nothing with what is learned, of all prompts and texts of the package."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mis_mlx.data import preparation, prompts
from mis_mlx.judge import answers

RUN = 13  # words in a row, as GPT-3's authors counted (arXiv 2005.14165, appendix C)


def texts_of(path: Path) -> list[str]:
    """What is said in every row of a file of prompts or conversations."""
    found = list[str]()
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        found += row.get("turns") or [message["content"] for message in row["messages"]]
    return found


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def runs_of(texts: Sequence[str]) -> set[tuple[str, ...]]:
    """All runs of so many words in these texts, and every shorter text whole."""
    found = set[tuple[str, ...]]()
    for text in texts:
        words = words_of(text)
        last = max(0, len(words) - RUN)
        found |= {tuple(words[start : start + RUN]) for start in range(last + 1)}
    return found


def test_training_and_judge_share_no_text() -> None:
    """No run of 13 words, and no shorter prompt, of what judges a student is in what one learns
    from; nor any answer by which it is judged.
    """
    train = runs_of([*texts_of(prompts.TRAIN), *texts_of(preparation.ANSWERS)])
    assert len(train) > 10_000
    assert runs_of(texts_of(answers.PROMPTS)) & train == set()
    said = list[str]()
    for line in answers.SHIPPED.read_text("utf-8").splitlines()[1:]:
        record = json.loads(line)
        said += [record["sampled"]["text"], record["greedy"]["text"]]
    long = [text for text in said if len(words_of(text)) >= RUN]
    assert len(long) > 150
    assert runs_of(long) & train == set()
