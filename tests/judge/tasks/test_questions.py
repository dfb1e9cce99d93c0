"""Rows become questions: three formats, every fault a sentence, constants by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.judge.tasks import questions
from mis_mlx.types import MisError

CHOICE = {"question": "2 + 2?", "options": ["3", "4", "5"], "answer": "4"}
CLOZE = {
    "text": "Baca pasie ___ na hali.",
    "options": ["owce", "rowery"],
    "answer": "owce",
    "language": "pl",
}
CHECKED = {"prompt": "How much is 2 + 2?", "answer": "4"}
PAIR = {"good": "The cat sleeps.", "bad": "The cat sleep.", "task": "agreement", "field": "syntax"}

TOLD = {"prompt": "Write.", "instruction_id_list": ["no comma", "title"], "kwargs": [{}, {}]}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return path


def test_the_three_formats_as_a_model_reads_them(tmp_path: Path) -> None:
    """What stands before an option, and what is an option, to the last space."""
    write(tmp_path / "a.jsonl", CHOICE, {**CHOICE, "language": "pl"}, {**CHOICE, "question": ""})
    write(tmp_path / "b.jsonl", CLOZE)
    write(tmp_path / "c.jsonl", CHECKED)
    choice, cloze, checked = questions.folder(tmp_path)
    assert [t.name for t in (choice, cloze, checked)] == ["a", "b", "c"]
    assert [q.context for q in choice.questions] == ["2 + 2?\nAnswer:", "2 + 2?\nOdpowiedź:", ""]
    assert [q.asked for q in choice.questions] == ["2 + 2?", "2 + 2?", ""]
    assert choice.asks
    assert not cloze.asks
    assert choice.as_text().sha256 != choice.sha256
    assert cloze.as_text().sha256 == cloze.sha256
    assert choice.questions[0].options == (" 3", " 4", " 5")
    assert choice.questions[2].options == ("3", "4", "5")
    assert [q.right for q in choice.questions] == [1, 1, 1]
    (q,) = cloze.questions
    assert (q.context, q.right) == ("Baca pasie", 0)
    assert q.options == (" owce na hali.", " rowery na hali.")
    (q,) = checked.questions
    assert (checked.kind, q.context, q.answer) == ("checked", "How much is 2 + 2?", "4")
    assert [t.questions[0].chance for t in (choice, cloze, checked)] == [1 / 3, 1 / 2, 0]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({**CHOICE, "answer": "6"}, "'6' .* 3 "),
        ({**CHOICE, "options": ["4"]}, "'options'"),
        ({**CHOICE, "options": ["4", "4"]}, "options"),
        ({**CHOICE, "options": ["4", None]}, "'options'"),
        ({**CHOICE, "language": "de"}, "'de'.* en, pl"),
        ({**CLOZE, "text": "___ and ___"}, "'text' has 2 "),
        ({**CHECKED, "prompt": "\n"}, "'prompt'"),
        ({**PAIR, "bad": ""}, "'bad'"),
        ({**PAIR, "good": 3}, "'good'"),
        ({"question": "2 + 2?", "answer": "4"}, "'question', 'answer'"),
        ("{half", "JSON"),
        ({**TOLD, "instruction_id_list": []}, "'instruction_id_list'"),
        ({**TOLD, "instruction_id_list": "no comma"}, "'instruction_id_list'"),
        ({**TOLD, "instruction_id_list": ["no comma", 3]}, "'instruction_id_list'"),
        ({**TOLD, "kwargs": None}, "'kwargs'"),
        ({**TOLD, "kwargs": [{}, None]}, "'kwargs'"),
        ({**TOLD, "kwargs": [{}]}, "2 instructions have 1 'kwargs'"),
        ({**TOLD, "prompt": " "}, "'prompt'"),
    ],
)
def test_a_bad_row_is_a_sentence_with_its_line(tmp_path: Path, row: Any, why: str) -> None:
    """Found before anything is asked, and named by file and line."""
    path = write(tmp_path / "quiz.jsonl", CHOICE, row)
    with pytest.raises(MisError, match=f"1 rows? .*quiz.jsonl line 2: .*{why}"):
        questions.file(path)


def test_a_pair_is_a_choice_after_nothing(tmp_path: Path) -> None:
    """The good sentence is the right option; log-likelihoods are sums; other keys do not count.
    Pairs of one sentence, of which BLiMP has one, are left out and counted.
    """
    twice = {"good": "The cat sleeps.", "bad": "The cat sleeps."}
    task = questions.file(write(tmp_path / "blimp.jsonl", PAIR, twice))

    (q,) = task.questions
    assert task.kind == "choice"
    assert not task.per_character
    assert q.context == ""
    assert q.options[q.right] == q.answer == "The cat sleeps."
    assert set(q.options) == {"The cat sleeps.", "The cat sleep."}
    assert q.chance == 1 / 2
    plain = {"good": PAIR["good"], "bad": PAIR["bad"]}
    assert task.sha256 == questions.task("t", [plain], "").sha256
    assert "1 of 2" in task.about


def test_the_place_of_the_good_sentence_cannot_be_guessed() -> None:
    """By their hashes: of 400 pairs about half have the good one first, and swapped pairs swap."""
    pairs = [{"good": f"{n} dogs bark.", "bad": f"{n} dogs barks."} for n in range(400)]
    swapped = [{"good": pair["bad"], "bad": pair["good"]} for pair in pairs]

    task, other = (questions.task("t", some, "") for some in (pairs, swapped))

    best = questions.best_constant_answer(task)
    assert best is not None
    assert best[0] < 0.56
    for one, two in zip(task.questions, other.questions, strict=True):
        assert one.options == two.options
        assert one.right != two.right


def test_files_that_are_no_task(tmp_path: Path) -> None:
    """A folder without any; files that are empty, alike, of two kinds, or not there."""
    with pytest.raises(MisError):
        questions.folder(tmp_path)
    write(tmp_path / "empty.jsonl", "", " ")
    write(tmp_path / "same.jsonl", {**PAIR, "bad": PAIR["good"]})
    write(tmp_path / "mixed.jsonl", CHOICE, CLOZE)
    for name in ("empty", "same", "mixed", "missing"):
        with pytest.raises(MisError, match=f"{name}.jsonl"):
            questions.file(tmp_path / f"{name}.jsonl")


def test_the_best_constant_by_hand() -> None:
    """U Zośki may name a place in the list or an answer, whichever is right more often."""
    rows = [{**CHOICE, "options": ["4", "5"]}, CHOICE, {**CHOICE, "options": ["3", "5", "4"]}]
    assert questions.best_constant_answer(questions.task("t", rows, "")) == (1.0, "“4”")
    rows = [
        {"question": "x", "options": [f"a{n}", f"b{n}"], "answer": f"{'ab'[n % 3 == 0]}{n}"}
        for n in range(6)
    ]
    assert questions.best_constant_answer(questions.task("t", rows, "")) == (4 / 6, "option 1")
    rows = [CHECKED, CHECKED, {**CHECKED, "answer": "5"}]
    best = questions.best_constant_answer(questions.task("t", rows, ""))
    assert best is not None
    assert best[0] == 2 / 3


def test_the_hash_is_of_what_decides_the_answers() -> None:
    """Not of names and notes; of every word, option and language that a model or a judge sees."""
    task = questions.task("t", [CHOICE, CHECKED], "about")
    assert questions.task("u", [CHOICE, CHECKED], "else").sha256 == task.sha256
    changes: list[dict[str, Any]] = [
        {"question": "2+2?"},
        {"options": ["4", "3", "5"]},
        {"language": "pl"},
    ]
    others = {questions.task("t", [{**CHOICE, **change}, CHECKED], "").sha256 for change in changes}
    assert len(others | {task.sha256}) == 4
    words = [{**TOLD, "kwargs": [{}, {"num_words": number}]} for number in (5, 6)]
    assert len({questions.task("t", [row], "").sha256 for row in words}) == 2


def test_chosen_questions_are_spread_evenly() -> None:
    """The first, the last, no one twice; all when there are fewer."""
    task = questions.task("t", [{**CHECKED, "prompt": f"{n}"} for n in range(11)], "")
    assert [q.context for q in task.chosen(3).questions] == ["0", "5", "10"]
    assert task.chosen(99) == task
