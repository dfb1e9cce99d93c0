"""Polish numbers take the right form of their noun."""

from __future__ import annotations

import pytest

from mis_mlx.data.polish.inflection import FORMS, Count, Time


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 jajek"),
        (1, "1 jajko"),
        (2, "2 jajka"),
        (4, "4 jajka"),
        (5, "5 jajek"),
        (11, "11 jajek"),
        (12, "12 jajek"),
        (14, "14 jajek"),
        (21, "21 jajek"),
        (22, "22 jajka"),
        (25, "25 jajek"),
        (101, "101 jajek"),
        (112, "112 jajek"),
        (134, "134 jajka"),
    ],
)
def test_a_count_brings_its_noun(number: int, words: str) -> None:
    """1 jajko, 2 jajka, 5 jajek, with the exceptions at 12 to 14 and the return at 22."""
    assert f"{Count(number):jajko}" == words
    assert f"{Count(number):!jajko}" == words.split()[1]
    assert f"{Count(number)}" == str(number)


def test_times_of_day() -> None:
    """Hours without, minutes with a leading zero."""
    assert [f"{Time(n)}" for n in (365, 0, 1439)] == ["6:05", "0:00", "23:59"]


def test_every_word_has_its_three_forms() -> None:
    """The table is complete: no form is missing or empty."""
    assert all(len(forms) == 3 and all(forms) for forms in FORMS.values())
