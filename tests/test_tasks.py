"""Generated tasks as they ship, by the verifier that trains on them: right answers and wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.data import examples
from mis_mlx.judge.tasks import rewards, task_registry


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


TRAIN, VALID = (rows(examples.BUILT_IN / f"{split}.jsonl") for split in ("train", "valid"))
EXAMS = {name: rows(task_registry.BUILT_IN / f"{name}.jsonl") for name in task_registry.ABOUT}
LESSONS = [*TRAIN, *VALID]


def test_the_worked_answer_is_rewarded_and_the_slip_is_not() -> None:
    """By the verifier that trains on them: right and in form, wrong and in form, in both
    languages.
    """
    for row in LESSONS:
        answer = row["answer"]
        language = row["language"]
        assert row["chosen"] == row["completion"]
        assert rewards.accuracy(row["completion"], answer, language) == 1.0, row
        assert rewards.accuracy(row["rejected"], answer, language) == 0.0, row
        assert rewards.well_formed(row["rejected"], answer, language) == 1.0, row
        assert rewards.accuracy(row["prompt"], answer, language) == 0.0, row  # copied


@pytest.mark.parametrize("kind", ["maths", "bus", "cooking", "logic"])
def test_options_are_right_and_wrong(kind: str) -> None:
    """The answer earns the reward, the other option does not; neither its place nor the language
    says anything.
    """
    questions = EXAMS[kind]
    languages = Counter[str]()
    places = Counter[int]()
    for row in questions:
        answer = row["answer"]
        language = row["language"]
        languages[language] += 1
        places[row["options"].index(answer)] += 1
        assert row["question"].endswith("?")  # and not how to write it down
        mark = {"en": "Answer", "pl": "Odpowiedź"}[language]
        for option in row["options"]:
            score = rewards.accuracy(f"{mark}: {option}", answer, language)
            assert score == float(option == answer), row
    assert languages == {"en": 100, "pl": 100}
    assert places == {0: 100, 1: 100}
