"""Generated tasks as they ship: answers that are right, wrong ones that are not, splits that share
nothing.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest

from benchmarks.polish_text.problems import RANKS
from mis_mlx.data import examples
from mis_mlx.judge.tasks import rewards, task_registry


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


TRAIN, VALID = (rows(examples.BUILT_IN / f"{split}.jsonl") for split in ("train", "valid"))
EXAMS = {name: rows(task_registry.BUILT_IN / f"{name}.jsonl") for name in task_registry.ABOUT}
LESSONS = [*TRAIN, *VALID]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [row for row in LESSONS if row["task"] in kinds]


def test_the_files_are_what_the_maker_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; so the same seed gives the same rows under every version of Python."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    importlib.import_module("task_files").main(tmp_path / "lessons", tmp_path / "exams")
    for made, kept in (
        (tmp_path / "lessons", examples.BUILT_IN),
        (tmp_path / "exams", task_registry.BUILT_IN),
    ):
        names = sorted(path.name for path in kept.glob("*.jsonl"))
        assert names == sorted(path.name for path in made.iterdir())
        for name in names:
            assert (made / name).read_bytes() == (kept / name).read_bytes()


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


def test_no_problem_is_in_both_splits() -> None:
    """The split is a function of the problem, the same in both languages: numbers of train are none
    of the others.
    """
    train = {row["prompt"] for row in TRAIN}
    exams = [exam for name, exam in EXAMS.items() if name.endswith("-written")]
    judging = {row["prompt"] for row in chain(VALID, *exams)}
    assert len(train) == len(TRAIN)
    assert not train & judging

    def sums(part: list[dict[str, Any]]) -> set[tuple[str, ...]]:
        rows = [row for row in part if row["task"] in ("sums", "recipe")]
        return {tuple(re.findall(r"\d+|[+−]", row["prompt"])) for row in rows}

    assert not sums(TRAIN) & sums(VALID)


def test_sums_are_right() -> None:
    """Read back from the prompt and computed."""
    for row in of_kind("sums", "two-digit-sums"):
        found = re.search(r"(\d+) ([+−]) (\d+)", row["prompt"])
        assert found is not None
        a, sign, b = found.groups()
        right = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert int(row["answer"]) == right >= 0


def number(word: str) -> Fraction:
    """With a point or a comma."""
    return Fraction(word.replace(",", "."))


def test_recipes_are_right() -> None:
    """The rule of three on the numbers of the prompt."""
    for row in of_kind("recipe"):
        words = re.findall(r"\d+(?:[.,]\d+)?", row["prompt"])
        before, amount, after = map(number, words)
        found, *_ = row["answer"].split()
        assert number(found) == amount * after / before


def test_buses_are_right() -> None:
    """The timetable written out until a bus leaves that she can take."""
    for row in of_kind("bus"):
        times = re.findall(r"(\d+):(\d\d)", row["prompt"])
        first, comes = (int(hours) * 60 + int(minutes) for hours, minutes in times)
        every, ride = (int(n) for n in re.findall(r"(\d+) min", row["prompt"]))
        leaves = first
        while leaves < comes:
            leaves += every
        arrives = f"{(leaves + ride) // 60}:{(leaves + ride) % 60:02d}"
        assert row["answer"] in (arrives, f"{leaves - comes} min"), row


WORDS = {  # of the prompt, to a test on the order of names
    r"(\w+) came earlier than (\w+)\.": lambda o, a, b: o.index(a) < o.index(b),
    r"(\w+) came right after (\w+)\.": lambda o, a, b: o.index(a) == o.index(b) + 1,
    r"(\w+) did not come first\.": lambda o, a: o[0] != a,
    r"(\w+) did not come last\.": lambda o, a: o[-1] != a,
    r"(\w+) przyszła wcześniej niż (\w+)\.": lambda o, a, b: o.index(a) < o.index(b),
    r"Zaraz po tym, jak przyszła (\w+), przyszła (\w+)\.": lambda o, a, b: (
        o.index(a) + 1 == o.index(b)
    ),
    r"(\w+) nie przyszła pierwsza\.": lambda o, a: o[0] != a,
    r"(\w+) nie przyszła ostatnia\.": lambda o, a: o[-1] != a,
}


Clue = tuple[Callable[..., bool], tuple[str, ...]]  # a test and the names in it


def orders(names: list[str], clues: list[Clue]) -> list[tuple[str, ...]]:
    """Every order of the names in which all clues hold."""

    def fits(order: tuple[str, ...]) -> bool:
        return all(test(order, *named) for test, named in clues)

    return list(filter(fits, permutations(names)))


def test_puzzles_have_the_one_solution_that_their_words_say() -> None:
    """Read back from the prompt, every order tried: exactly one fits, it gives the answer, and no
    clue is idle.
    """
    ranks = {}
    for words in RANKS.values():
        ranks |= {word: place for place, word in enumerate(words)}
    for row in of_kind("logic"):
        listed = re.search(r": ([^.]+)\.", row["prompt"])[1].split(", ")  # type: ignore[index]
        clues = list[Clue]()
        for words, test in WORDS.items():
            clues += [(test, match.groups()) for match in re.finditer(words, row["prompt"])]
        fits = orders(listed, clues)
        assert len(fits) == 1
        for clue in clues:
            rest = [other for other in clues if other != clue]
            assert len(orders(listed, rest)) > 1
        asked = re.search(r"(?:came|jako) (\w+)\?", row["prompt"])
        assert row["answer"] == (fits[0][ranks[asked[1]]] if asked else ", ".join(fits[0]))


@pytest.mark.parametrize("name", ["grammar-pl", "grammar-en"])
def test_a_pair_is_one_word_apart_and_never_right_elsewhere(name: str) -> None:
    """Else something besides the rule could decide; the right one is the first option about half of
    the time.
    """
    right = list[str]()
    wrong = list[str]()
    for row in EXAMS[name]:
        (other,) = set(row["options"]) - {row["answer"]}
        one = row["answer"].split()
        two = other.split()
        assert len(one) == len(two), row
        different = [pair for pair in zip(one, two, strict=True) if pair[0] != pair[1]]
        assert len(different) == 1, row
        right.append(row["answer"])
        wrong.append(other)
    assert not set(right) & set(wrong)
    assert len({*zip(right, wrong, strict=True)}) == 200
    assert 70 < sum(row["options"][0] == row["answer"] for row in EXAMS[name]) < 130
