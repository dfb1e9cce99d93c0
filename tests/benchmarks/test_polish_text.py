"""The Miś texts: the same for ever, all different, and their sums, times and word forms are
right.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from benchmarks.polish_text.documents import SPLITS, documents, write
from benchmarks.polish_text.inflection import FORMS, Count
from benchmarks.polish_text.money import Money
from benchmarks.polish_text.stories import STORIES
from mis_mlx.data import preparation

NUMBER = r"\d+(?:,\d\d)?"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """300 documents, 60 of each kind."""
    return documents(seed=0, count=300)


def _value(expression: str) -> Fraction:
    """The value of a working such as "3 · 12,50 zł − 4 : 2", exactly."""
    plain = expression.replace(" zł", "").replace(",", ".")
    plain = plain.translate(str.maketrans({"·": "*", ":": "/", "−": "-"}))
    assert re.fullmatch(r"[0-9.+\-*/ ]+", plain), expression
    return Fraction(eval(re.sub(r"[0-9.]+", r"Fraction('\g<0>')", plain), {"Fraction": Fraction}))


def _minutes(time: str) -> int:
    hours, minutes = time.split(":")
    return 60 * int(hours) + int(minutes)


def _spans(text: str) -> set[str]:
    """Every 32 characters in a row."""
    return {text[at : at + 32] for at in range(len(text) - 31)}


def _hits(pattern: str, texts: list[str], at_least: int) -> list[re.Match[str]]:
    """All matches, and the assurance that there are enough of them for the test to mean
    something.
    """
    found = list[re.Match[str]]()
    for text in texts:
        found += re.finditer(pattern, text)
    assert len(found) >= at_least
    return found


def test_money_has_a_decimal_comma_and_words() -> None:
    """Whole złoty without decimals, the rest with two; both parts inflect in words."""
    assert [f"{Money(n)}" for n in (1250, 400, 5, 10030)] == [
        "12,50 zł",
        "4 zł",
        "0,05 zł",
        "100,30 zł",
    ]
    words = [f"{Money(n):słownie}" for n in (100, 1222, 505, 1401)]
    assert words == [
        "1 złoty",
        "12 złotych i 22 grosze",
        "5 złotych i 5 groszy",
        "14 złotych i 1 grosz",
    ]


def test_the_files_that_ship_are_what_it_writes(tmp_path: Path) -> None:
    """To the byte, and read back they are its documents; nothing else lies in the folder."""
    write(tmp_path)
    names = {f"{name}.jsonl" for name in SPLITS}
    built_in = preparation.MIS_FOLDER
    assert (
        {path.name for path in built_in.iterdir()}
        == {path.name for path in tmp_path.iterdir()}
        == names
    )
    for name in names:
        assert (built_in / name).read_bytes() == (tmp_path / name).read_bytes(), name
    texts = preparation.load(preparation.MIS)
    for name, (seed, count) in SPLITS.items():
        assert [row["text"] for row in getattr(texts, name)] == documents(seed, count)


def test_documents_are_different_and_of_the_promised_length(texts: list[str]) -> None:
    """300 different documents of 600 to 1200 characters, without a placeholder left open."""
    assert len(set(texts)) == 300
    assert all(600 <= len(text) <= 1200 for text in texts)
    assert not re.search(r"[{}]|None", "".join(texts))


def test_no_two_documents_are_near_copies(texts: list[str]) -> None:
    """Of the 32-character spans of two documents of one kind, less than half are shared, 6 % on
    average.
    """
    spans = [_spans(text) for text in texts]
    for kind in range(5):
        pairs = combinations(spans[kind::5], 2)
        shares = [len(a & b) / len(a | b) for a, b in pairs]
        assert max(shares) < 0.5
        assert sum(shares) / len(shares) < 0.06


def test_train_and_test_share_sentences_but_not_values() -> None:
    """Spans with three numbers in 32 characters come from drawn values: < 10 % of the test's are in
    train.
    """

    def spans(texts: list[str]) -> set[str]:
        cut = set[str]().union(*map(_spans, texts))
        return {span for span in cut if len(re.findall(r"\d+", span)) >= 3}

    test = spans(documents(2, 75))
    assert len(test) > 1000
    assert len(test & spans(documents(0, 400))) < 0.1 * len(test)


def test_every_working_is_right(texts: list[str]) -> None:
    """ "Rachunek: a · b + c = d.": the left side, computed from the text, is the right side."""
    for match in _hits(r"Rachunek: (.+) = (.+)\.\n", texts, 300):
        assert _value(match[1]) == _value(match[2]), match[0]


def test_stories_give_the_numbers_of_their_working_and_answer_with_its_result() -> None:
    """Every story is told; numbers in the working come from the text (but for ": 2", ": 100")."""
    texts = documents(1, 600)[4::5]
    pattern = r"Zadanie \d\. (.+)\nRachunek: (.+) = (.+)\.\nOdpowiedź: (.+)\n"
    told = _hits(pattern, texts, 360)
    for story in STORIES:
        opening = re.escape(story.text.rpartition("}")[2])
        assert any(re.search(opening, match[1]) for match in told), story.text
    for match in told:
        for number in re.findall(NUMBER, re.sub(r": (2|100)$", "", match[2])):
            assert number in re.findall(NUMBER, match[1]), match[0]
        result = match[3].removesuffix(" zł")
        assert result in re.findall(NUMBER, match[4]), match[0]
        assert _value(result) > 0


def test_timetables_add_up(texts: list[str]) -> None:
    """Times rise, the interval is kept, the ride's length fits first and last arrival, no
    midnight.
    """
    for text in texts[1::5]:
        departures = re.findall(r"\d+:\d\d", _hits(r"Odjazdy z .*", [text], 1)[0][0])
        first = re.findall(r"\d+:\d\d", _hits(r"Pierwszy kurs: .*", [text], 1)[0][0])
        last = re.findall(r"\d+:\d\d", _hits(r"Ostatni kurs .*", [text], 1)[0][0])
        every, ride = map(int, re.findall(r"co (\d+) min\w+, jazda trwa (\d+) min", text)[0])
        times = list(map(_minutes, departures))
        assert len(times) >= 5
        assert {b - a for a, b in pairwise(times)} == {every}
        passing = list(map(_minutes, first))
        assert passing == sorted(set(passing))
        assert (passing[0], passing[-1]) == (times[0], times[0] + ride)
        assert list(map(_minutes, last)) == [times[-1], times[-1] + ride]
        assert times[-1] + ride < 24 * 60


def test_recipes_end_when_they_say(texts: list[str]) -> None:
    """Start plus duration is the time on the table; 2, 4, 6 or 8 portions."""
    for match in _hits(
        r"Zaczynamy o (\S+), całość zajmuje (\d+) min\w+, na stole o (\S+)\.", texts, 60
    ):
        assert _minutes(match[1]) + int(match[2]) == _minutes(match[3])
    portions = {match[1] for match in _hits(r"(\d+) porcj[ei]\n", texts, 60)}
    assert portions == {"2", "4", "6", "8"}


def test_price_lists_agree_with_their_example(texts: list[str]) -> None:
    """Each price in the working is on the list; change is what was paid less the total."""
    for text in texts[2::5]:
        listed = {match[1] for match in _hits(rf"\n- .*: ({NUMBER}) zł", [text], 8)}
        working, total = re.findall(r"Rachunek: (.+) = (.+)\.", text)[0]
        assert set(re.findall(rf"· ({NUMBER}) zł", working)) <= listed
        if change := re.search(rf"zapłaciła? ({NUMBER}) zł i dostała? ({NUMBER}) zł reszty", text):
            assert _value(change[1]) - _value(change[2]) == _value(total)


def test_no_number_stands_before_a_wrong_form(texts: list[str]) -> None:
    """Every "number noun" in all documents is inflected as the number asks ("22 owce", "25
    owiec").
    """
    # these words ask for a case of their own
    genitive = re.compile(r"(zakupie|wymaga|obecności) $")
    checked = 0
    for word, forms in FORMS.items():
        for text in texts:
            for match in re.finditer(rf"(?<![\d,:])(\d+) ({'|'.join(forms)})\b", text):
                if genitive.search(text[: match.start()]):
                    continue
                assert match[0] == f"{Count(int(match[1])):{word}}", text
                checked += 1
    assert checked > 1000
