"""Dialects: slots that wait for text, and which text is in
the dialect.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mis_mlx.judge.tasks.sets import polish
from mis_mlx.types import MisError


def test_the_validator_names_the_row(tmp_path: Path) -> None:
    """Nothing is asked with pairs that are none."""
    rows = [
        {"polish": "Idę", "dialect": "Ida"},
        {"polish": "Idę", "dialect": "Idę "},
        {"polish": "Idę"},
    ]
    (tmp_path / polish.PAIRS).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(MisError, match="line 2.*pairs.jsonl line 3"):
        polish.read_pairs("silesian", tmp_path)


def test_an_empty_slot_says_what_to_bring(tmp_path: Path) -> None:
    """Seven slots; none is filled with text of our own."""
    slot = list(polish.SLOTS)[6]
    with pytest.raises(MisError, match=slot):
        polish.read_pairs(slot, tmp_path)
    (tmp_path / polish.PAIRS).write_text("\n")
    with pytest.raises(MisError, match="pairs.jsonl"):
        polish.read_pairs(slot, tmp_path)


def test_two_tasks_of_the_pairs() -> None:
    """Half Polish, half dialect, each from its own pair; the dialect's place among the two says
    nothing.
    """
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
