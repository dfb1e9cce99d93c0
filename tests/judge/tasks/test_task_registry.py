"""Names become tasks: presets, folders, slots; typos bring the nearest names. Generated ones as
they ship, by the verifier that trains on them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mis_mlx.data import examples
from mis_mlx.judge.tasks import rewards, task_registry
from mis_mlx.judge.tasks.sets import polish
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError


@pytest.fixture(autouse=True)
def offline(cache: Path) -> None:
    """A cache of this test's own."""


def test_builtin_needs_no_network() -> None:
    """Four kinds of problems, grammar and endings in two languages, one kind written out, and
    held-out text.
    """
    found = task_registry.find(["builtin"], 10)
    grammar = ["grammar-en", "grammar-pl", "continue-en", "continue-pl"]
    problems = ["maths", "bus", "cooking", "logic"]
    assert [task.name for task in found.tasks] == [*problems, *grammar, "maths-written"]
    assert found.text
    assert all(len(task.questions) == 10 for task in found.tasks)
    assert found.tasks[-1].kind == "checked"
    assert "Answer: number" in found.tasks[-1].questions[0].context


def counted(start: int, count: int) -> str:
    """So many words, all different."""
    return " ".join(f"w{number}" for number in range(start, start + count))


def test_any_held_out_text_becomes_a_task(tmp_path: Path) -> None:
    """Of --data's test split, without what the training split has; a sentence says how much too
    short that is.
    """
    rows = [{"text": counted(start, 100)} for start in (0, 1000, 2000)]
    for split, of in (("train", rows[1:2]), ("valid", rows), ("test", rows)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, of)))
    (task,) = task_registry.find(["continue"], 100, str(tmp_path)).tasks
    assert task.name == "continue"
    assert len(task.questions) == 9
    assert task.per_character
    for q, start in zip(
        task.questions, (0, 30, 60, 1000, 1030, 1060, 2000, 2030, 2060), strict=True
    ):
        assert q.context == counted(start, 24)
        assert len(set(q.options)) == 4
        assert q.options[q.right] == "".join(f" w{k}" for k in range(start + 24, start + 30))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(MisError, match="3 places of 30 words, .* needs 4"):
        task_registry.find(["continue"], 100, str(tmp_path))


def test_a_file_is_a_task(tmp_path: Path) -> None:
    """Named like the file, `count` questions of it."""
    path = tmp_path / "blimp.jsonl"
    pairs = [{"good": f"{n} dogs bark.", "bad": f"{n} dogs barks."} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, pairs)))

    (task,) = task_registry.find([str(path)], 5).tasks

    assert task.name == "blimp"
    assert [q.answer for q in task.questions] == [f"{n} dogs bark." for n in (0, 2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["maths-writen"], "maths-writen.* maths-written"),
        (["qqq"], "qqq.* builtin, maths"),
        (["a", "b"], "2 tasks are called quiz"),
        (["odd"], "quiz question 2: .*'because it is so'"),
        (["kashubian"], "kashubian.*pairs.jsonl"),
    ],
)
def test_refusals(
    names: list[str], said: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo, two tasks of one name, an answer that nobody can check, a slot without pairs;
    nothing half-made is left.
    """
    monkeypatch.chdir(tmp_path)
    sums = {"prompt": "1 + 1?", "answer": "2"}
    odd = {"prompt": "Why?", "answer": "because it is so"}
    for folder, rows in {"a": [sums], "b": [sums], "odd": [sums, odd]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(MisError, match=said):
        task_registry.find(names, 10)
    assert not [path for path in cache.glob("*") if path.name != ".lock"]


def test_a_slot_is_filled_by_a_folder(tmp_path: Path, cache: Path) -> None:
    """In the cache, or anywhere under the slot's name."""
    pairs = [{"polish": f"Idę do domu {n}", "dialect": f"Jidã dodóm {n}"} for n in range(6)]
    for folder in (cache / "dialects" / "kashubian", tmp_path / "mine" / "kashubian"):
        folder.mkdir(parents=True)
        (folder / polish.PAIRS).write_text("\n".join(map(json.dumps, pairs)))
    kept, brought = (
        task_registry.find([n], 10) for n in ("kashubian", str(tmp_path / "mine" / "kashubian"))
    )
    assert [task.name for task in kept.tasks] == ["kashubian-label", "kashubian-text"]
    assert [task.sha256 for task in kept.tasks] == [task.sha256 for task in brought.tasks]
    assert len(task_registry.find(["dialects"], 10).tasks) == 4  # Silesian is there
    (cache / "dialects" / "kashubian" / polish.PAIRS).write_text('{"polish": "Idę"}\n')
    with pytest.raises(MisError, match="pairs.jsonl line 1"):
        task_registry.find(["dialects"], 10)


def test_silesian_comes_with_the_package(cache: Path) -> None:
    """Some 1,900 pairs of Firefox; the letters of Silesian are on its side. What the user brings
    takes their place.
    """
    label, text = task_registry.find(["silesian"], 100_000).tasks
    assert len(label.questions) == len(text.questions) > 1500
    dialect = [q.options[q.right] for q in text.questions]
    polish = [q.options[1 - q.right] for q in text.questions]
    marked = re.compile("[ōôŏ]").search
    assert len(list(filter(marked, dialect))) / len(dialect) > 0.7
    assert len(list(filter(marked, polish))) / len(polish) < 0.01


def test_the_worked_answer_is_rewarded_and_the_slip_is_not() -> None:
    """By the verifier that trains on them: right in form, wrong in form, in both languages."""
    train, valid = (
        run_folder.records(examples.BUILT_IN / f"{split}.jsonl") for split in ("train", "valid")
    )
    assert train and valid
    for row in [*train, *valid]:
        answer = row["answer"]
        language = row["language"]
        assert row["chosen"] == row["completion"]
        assert rewards.accuracy(row["completion"], answer, language) == 1.0, row
        assert rewards.accuracy(row["rejected"], answer, language) == 0.0, row
        assert rewards.well_formed(row["rejected"], answer, language) == 1.0, row
        assert rewards.accuracy(row["prompt"], answer, language) == 0.0, row  # copied


@pytest.mark.parametrize("kind", ["maths", "bus", "cooking", "logic"])
def test_options_are_right_and_wrong(kind: str) -> None:
    """The answer earns the reward, the other option does not; place and language say nothing."""
    questions = run_folder.records(task_registry.BUILT_IN / f"{kind}.jsonl")
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
