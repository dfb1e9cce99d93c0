"""Polish sets: questions out of the `evals` wheel, converted from rows as they stand there, cut
down; and dialects, whose slots wait for text.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.judge.tasks.sets import polish
from mis_mlx.types import MisError


def asked(text: str, ideal: str) -> dict[str, Any]:
    """A row of the registry: a system's words, a user's, and the ideal answer."""
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]
    return {"input": messages, "ideal": ideal}


OPTIONS = "A. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
EXAMS = [
    asked("Co robi baca?\nA. pasie owce\nB. gra w karty\nC. śpi\nD. leci\nAnswer:", "[A]"),
    asked(f"Ile nóg\nma owca?\n{OPTIONS}", "[D]"),
    asked("Dwie takie same?\nA. 1\nB. 1\nC. 3\nD. 4\nAnswer:", "[D]"),
    asked("Bez opcji?", "[A]"),
    asked(f"Bez klucza?\n{OPTIONS}", "A"),
    asked(f"Z kluczem spoza listy?\n{OPTIONS}", "[E]"),
]
LEXICON = [
    asked(*pair) for pair in zip(("owca", "wcao", "bcaa", "baca", "x", "y"), "YNNYYY", strict=True)
]
PROVERBS = [asked(f"Przysłowie {n} na", f"słowo{n}") for n in range(6)]
SUMS = [asked(f"dwa plus {n}", f"suma {n}") for n in range(5)]


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The four sets of a wheel with these rows."""
    wheel = tmp_path / "evals.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for (member, _), rows in zip(
            polish.SETS.values(), (EXAMS, LEXICON, PROVERBS, SUMS), strict=True
        ):
            archive.writestr(
                polish.MEMBER.format(member), "".join(json.dumps(row) + "\n" for row in rows)
            )
    for file, rows in polish.exams_in(wheel).items():
        (tmp_path / file).write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_exams_and_words(unpacked: Path) -> None:
    """Exams keep their options and key; what has two equal options, no options or no key is left
    out. Pairs of one word and one non-word, by name; two words are no pair.
    """
    exams = polish.exam("polish-exams", unpacked)
    assert [(q.context, q.right) for q in exams.questions] == [
        ("Co robi baca?\nOdpowiedź:", 0),
        ("Ile nóg\nma owca?\nOdpowiedź:", 3),
    ]
    assert exams.questions[1].options == (" 1", " 2", " 3", " 4")
    assert exams.per_character
    words = polish.exam("polish-lexicon", unpacked)
    assert [(q.context, q.options, q.answer) for q in words.questions] == [
        ("", ("owca", "wcao"), "owca"),
        ("", ("baca", "bcaa"), "baca"),
    ]


@pytest.mark.parametrize("name", ["polish-proverbs", "polish-sums"])
def test_wrong_options_are_answers_to_other_questions(unpacked: Path, name: str) -> None:
    """Three of them, seeded, the right one among them once."""
    task = polish.exam(name, unpacked)
    answers = {q.answer for q in task.questions}
    assert len(task.questions) == len(answers) > 4
    for q in task.questions:
        said = [option.strip() for option in q.options]
        assert len(set(said)) == 4
        assert set(said) <= answers
        assert said[q.right] == q.answer
    assert len({q.right for q in task.questions}) > 1


def test_pairs_that_cannot_be_read(tmp_path: Path) -> None:
    """Rows that are no pairs are named; an empty slot says what to bring, for none is filled with
    text of our own.
    """
    with pytest.raises(MisError, match="kashubian"):
        polish.read_pairs("kashubian", tmp_path)
    rows = [{"polish": "Idę", "dialect": "Ida"}, {"polish": "Idę", "dialect": "Idę "}]
    rows.append({"polish": "Idę"})
    for text, said in (
        ("\n".join(map(json.dumps, rows)), "line 2.*pairs.jsonl line 3"),
        ("\n", "pairs.jsonl"),
    ):
        (tmp_path / polish.PAIRS).write_text(text)
        with pytest.raises(MisError, match=said):
            polish.read_pairs("kashubian", tmp_path)


def test_two_tasks_of_the_pairs() -> None:
    """Half Polish, half dialect, of unlike pairs; the dialect's place says nothing."""
    pairs = [{"polish": f"Po polsku {n}", "dialect": f"Po śląsku {n}"} for n in range(100)]
    label, text = polish.dialect("silesian", pairs, "made for this test")
    assert (label.name, text.name) == ("silesian-label", "silesian-text")
    assert Counter(q.answer for q in label.questions) == {"śląskim": 50, "polskim": 50}
    for n, q in enumerate(label.questions):
        assert (f"Tekst: Po śląsku {n}\n" in q.context) == (q.answer == "śląskim")
        assert (f"Tekst: Po polsku {n}\n" in q.context) == (q.answer == "polskim")
        assert q.options == (" polskim", " śląskim")
    for n, q in enumerate(text.questions):
        assert q.answer == f"Po śląsku {n}"
        assert q.options[q.right] == f" Po śląsku {n}"
        assert len(q.options) == 2
    assert 30 < sum(q.right for q in text.questions) < 70
    assert text.per_character
    assert not label.per_character
