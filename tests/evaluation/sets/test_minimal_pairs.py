"""Minimal pairs: one word apart, never twice, and wrong for the reason that the rule gives."""

from __future__ import annotations

import random

import pytest

from mis_mlx.evaluation.sets import minimal_pairs
from mis_mlx.types import MisError


@pytest.mark.parametrize("language", ["pl", "en"])
def test_a_pair_is_one_word_apart(language: minimal_pairs.Language) -> None:
    """Else something besides the rule could decide."""
    for right, wrong in minimal_pairs.pairs(language, 300):
        one, other = right.split(), wrong.split()
        assert len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1, (right, wrong)


@pytest.mark.parametrize("language", ["pl", "en"])
def test_no_right_sentence_is_wrong_elsewhere(language: minimal_pairs.Language) -> None:
    """The same sentence is never right in one pair and wrong in another; no pair comes twice."""
    found = minimal_pairs.pairs(language, 300)
    assert len(set(found)) == 300
    assert not {right for right, _ in found} & {wrong for _, wrong in found}


def test_polish_by_the_school_book() -> None:
    """Every rule makes the pair that a grammar gives as its example."""
    made = {rule.__name__: {rule(random.Random(str(n))) for n in range(6000)} for rule in minimal_pairs.RULES["pl"]}
    assert ("Mamy 5 jajek.", "Mamy 5 jajka.") in made["_noun_after_number"]
    assert ("Mamy 22 jajka.", "Mamy 22 jajek.") in made["_noun_after_number"]
    assert ("Mamy 12 jajek.", "Mamy 12 jajka.") in made["_noun_after_number"]
    assert ("Zostały nam 3 jajka.", "Zostało nam 3 jajka.") in made["_verb_after_number"]
    assert ("Zostało nam 5 jajek.", "Zostały nam 5 jajek.") in made["_verb_after_number"]
    assert ("Wczoraj Ala kupiła chleb.", "Wczoraj Ala kupił chleb.") in made["_gender"]
    assert ("W sobotę Staszek przyszedł na halę.", "W sobotę Staszek przyszła na halę.") in made["_gender"]
    assert ("Wracamy z Zakopanego.", "Wracamy z Zakopane.") in made["_genitive"]


def test_english_by_the_school_book() -> None:
    """The verb agrees with its subject and not with the nearest noun."""
    made = {pair for rule in minimal_pairs.RULES["en"] for n in range(6000) for pair in [rule(random.Random(str(n)))]}
    assert ("The dogs near the house are old.", "The dogs near the house is old.") in made
    assert ("The dog near the houses is old.", "The dog near the houses are old.") in made
    assert ("I think these books are old.", "I think this books are old.") in made
    assert ("She has written a letter.", "She has wrote a letter.") in made


def test_rows_are_seeded_and_their_order_says_nothing() -> None:
    """Always the same; the right one is the first option about half of the time."""
    rows = minimal_pairs.rows("pl", 200)
    assert rows == minimal_pairs.rows("pl", 200) and minimal_pairs.rows("pl", 50) == rows[:50]
    first = sum(row["options"][0] == row["answer"] for row in rows)
    assert 70 < first < 130 and all(row["answer"] in row["options"] for row in rows)


def test_more_than_there_are_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a loop without end: of one rule with 45 pairs, 45 are found."""
    monkeypatch.setattr(minimal_pairs, "RULES", {"en": [minimal_pairs._participle]})
    assert len(minimal_pairs.pairs("en", 45)) == 45
    with pytest.raises(MisError, match="there are no 46 different pairs, 45 were found"):
        minimal_pairs.pairs("en", 46)
