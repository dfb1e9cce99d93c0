"""Dialects, whose slots wait for text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mis_mlx.judge.tasks.sets import polish
from mis_mlx.types import MisError


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
