"""Generated tasks: answers that are right, wrong ones that are not, splits that share nothing."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from itertools import permutations

import pytest

from mis_mlx.data import generated_tasks
from mis_mlx.evaluation import rewards
from mis_mlx.types import MisError

COUNT = 400


@pytest.mark.parametrize("kind", generated_tasks.KINDS)
def test_the_worked_answer_is_rewarded_and_the_slip_is_not(kind: str) -> None:
    """By the verifier that trains on them: right and in form, wrong and in form, in both languages."""
    rows = generated_tasks.rows("train", 1, COUNT, [kind])
    assert {r["language"] for r in rows} == {"en", "pl"} and len({r["prompt"] for r in rows}) == COUNT
    for row in rows:
        assert rewards.accuracy(row["completion"], row["answer"], row["language"]) == 1.0, row
        assert rewards.accuracy(row["rejected"], row["answer"], row["language"]) == 0.0, row
        assert rewards.well_formed(row["rejected"], row["answer"], row["language"]) == 1.0, row
        assert rewards.accuracy(row["prompt"], row["answer"], row["language"]) == 0.0, row  # copied


def test_no_problem_is_in_both_splits() -> None:
    """Whatever the seeds: the split is a function of the problem, the same in both languages."""
    train = {r["prompt"] for seed in range(3) for r in generated_tasks.rows("train", seed, COUNT)}
    test = {r["prompt"] for seed in range(3) for r in generated_tasks.rows("test", seed, COUNT // 4)}
    assert not train & test and len(train) > COUNT and len(test) > COUNT // 4
    numbers = [
        {tuple(re.findall(r"\d+|[+−]", r["prompt"])) for r in generated_tasks.rows(split, 0, 200, ("sums", "recipe"))}
        for split in ("train", "test")
    ]
    assert not numbers[0] & numbers[1]
    shares = [generated_tasks.split_of(f"x{i}") for i in range(5000)].count("test") / 5000
    assert abs(shares - 1 / generated_tasks.TEST_SHARE) < 0.03


def test_rows_are_a_function_of_the_seed() -> None:
    """The same again, others from another seed; a longer list begins with the shorter."""
    assert (
        generated_tasks.rows("train", 5, 20)
        == generated_tasks.rows("train", 5, 40)[:20]
        != generated_tasks.rows("train", 6, 20)
    )
    first = generated_tasks.rows("train", 0, 1)[0]
    assert (first["prompt"].partition("?")[0], first["answer"]) == ("How much is 3 + 12", "15")


def test_sums_are_right() -> None:
    """Read back from the prompt and computed."""
    for row in generated_tasks.rows("train", 2, 100, ["sums", "two-digit-sums"]):
        a, sign, b = re.search(r"(\d+) ([+−]) (\d+)", row["prompt"]).groups()  # type: ignore[union-attr]
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0


def test_recipes_are_right() -> None:
    """The rule of three on the numbers of the prompt."""
    for row in generated_tasks.rows("train", 2, 100, ["recipe"]):
        numbers = [Fraction(n.replace(",", ".")) for n in re.findall(r"\d+(?:[.,]\d+)?", row["prompt"])]
        before, amount, after = numbers
        assert Fraction(row["answer"].split()[0].replace(",", ".")) == amount * after / before


def test_buses_are_right() -> None:
    """The timetable written out until a bus leaves that she can take."""
    for row in generated_tasks.rows("train", 2, 100, ["bus"]):
        first, comes = (int(h) * 60 + int(m) for h, m in re.findall(r"(\d+):(\d\d)", row["prompt"]))
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
    r"Zaraz po tym, jak przyszła (\w+), przyszła (\w+)\.": lambda o, a, b: o.index(a) + 1 == o.index(b),
    r"(\w+) nie przyszła pierwsza\.": lambda o, a: o[0] != a,
    r"(\w+) nie przyszła ostatnia\.": lambda o, a: o[-1] != a,
}


def test_puzzles_have_the_one_solution_that_their_words_say() -> None:
    """Read back from the prompt, every order tried: exactly one fits, and it gives the answer."""
    ranks = {w: i for i, words in enumerate(zip(*generated_tasks.RANKS.values(), strict=True)) for w in words}
    for row in generated_tasks.rows("train", 2, 200, ["logic"]):
        listed = re.search(r": ([^.]+)\.", row["prompt"])[1].split(", ")  # type: ignore[index]
        clues = [(test, m.groups()) for words, test in WORDS.items() for m in re.finditer(words, row["prompt"])]
        fits = [o for o in permutations(listed) if all(test(o, *names) for test, names in clues)]
        assert len(fits) == 1 and clues, row["prompt"]
        asked = re.search(r"(?:came|jako) (\w+)\?", row["prompt"])
        assert row["answer"] == (fits[0][ranks[asked[1]]] if asked else ", ".join(fits[0]))


def test_no_clue_is_idle() -> None:
    """Without any one of the clues more orders fit; with all of them, the hidden one alone."""
    for seed in range(200):
        order, clues = generated_tasks.puzzle(random.Random(str(seed)), 3 + seed % 2)
        assert generated_tasks.solutions(len(order), clues) == [order]
        for clue in clues:
            assert len(generated_tasks.solutions(len(order), [c for c in clues if c != clue])) > 1


def test_refusals() -> None:
    """An unknown kind, and more tasks than there are."""
    with pytest.raises(MisError, match="no tasks called chess: known are sums"):
        generated_tasks.rows("train", 0, 1, ["chess"])
    with pytest.raises(MisError, match="test has no 5000 different tasks of sums: .* were found, ask for fewer"):
        generated_tasks.rows("test", 0, 5000, ["sums"])
