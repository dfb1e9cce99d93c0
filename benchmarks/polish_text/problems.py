"""Seeded tasks with known answers, Polish and English: sums, the bus, a recipe scaled, who came in
which order.

A problem belongs to training or to evaluation by a hash of what it is made of, numbers and clues
without names and language: no seed can bring the same one into both. Knows no tokenizer and no
reward; the last line of a worked answer is what judge/tasks/rewards reads. Only
`random.Random(str).random()` is drawn from (see draws).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from mis_mlx.types import MisError

from .inflection import Count, Time
from .random_draws import between, pick, some

Split = Literal["train", "test"]
Language = Literal["pl", "en"]
TEST_SHARE = 5  # one problem in so many is for evaluation
TRIES = 500  # drawings of one row before the generator is taken to be exhausted
END = {
    "en": 'End with a line of this form: "Answer: {}".',
    "pl": "Zakończ wierszem tej postaci: „Odpowiedź: {}”.",
}
FORM = {
    "number": {"en": "number", "pl": "liczba"},
    "time": {"en": "hour:minutes", "pl": "godzina:minuty"},
    "amount": {"en": "amount and unit", "pl": "ilość i jednostka"},
    "name": {"en": "name", "pl": "imię"},
    "order": {"en": "names in order, with commas", "pl": "imiona po kolei, z przecinkami"},
}
MARK = {"en": "Answer", "pl": "Odpowiedź"}
NAMES = {
    "pl": (
        "Ala",
        "Ola",
        "Ewa",
        "Iza",
        "Ula",
        "Maja",
        "Zosia",
        "Hania",
        "Kasia",
        "Basia",
        "Jagna",
        "Bronia",
    ),
    "en": (
        "Ann",
        "Beth",
        "Cora",
        "Dora",
        "Emma",
        "Fay",
        "Grace",
        "Helen",
        "Ivy",
        "Jane",
        "Kate",
        "Lucy",
    ),
}
PLACES = (
    ("Zakopane", "Zakopanego"),
    ("Szczawnica", "Szczawnicy"),
    ("Jabłonka", "Jabłonki"),
    ("Niedzica", "Niedzicy"),
)
# English, Polish genitive, unit (en, pl), least and most for a portion in quarters of the unit.
FOODS = (
    ("flour", "mąki", ("g", "g"), 80, 600),
    ("potatoes", "ziemniaków", ("g", "g"), 200, 1200),
    ("cottage cheese", "twarogu", ("g", "g"), 100, 600),
    ("buttermilk", "maślanki", ("ml", "ml"), 100, 800),
    ("stock", "wywaru", ("ml", "ml"), 400, 1600),
    ("oil", "oleju", ("tablespoons", "łyżki"), 1, 8),
    ("marjoram", "majeranku", ("teaspoons", "łyżeczki"), 1, 6),
)
RANKS = {
    "pl": ("pierwsza", "druga", "trzecia", "czwarta"),
    "en": ("first", "second", "third", "fourth"),
}
CLUES = {
    "before": ("{a} przyszła wcześniej niż {b}.", "{a} came earlier than {b}."),
    "next": ("Zaraz po tym, jak przyszła {a}, przyszła {b}.", "{b} came right after {a}."),
    "not_first": ("{a} nie przyszła pierwsza.", "{a} did not come first."),
    "not_last": ("{a} nie przyszła ostatnia.", "{a} did not come last."),
}


@dataclass(frozen=True)
class Problem:
    """`key`: the same in both languages. `form`: what kind of answer, of FORM. `wrong`: what one
    easily answers.
    """

    key: str
    question: str
    form: str
    working: str
    answer: str
    wrong: str


def _sum(rng: random.Random, language: Language, most: int = 20) -> Problem:
    a = between(rng, 1, most)
    b = between(rng, 1, most)
    plus = rng.random() < 0.5
    if not plus:
        a = a + b
    result = a + b if plus else a - b
    sign = "+" if plus else "−"
    question = {"en": f"How much is {a} {sign} {b}?", "pl": f"Ile to jest {a} {sign} {b}?"}[
        language
    ]
    slips = [n for n in (result - 10, result - 1, result + 1, result + 10) if n >= 0]
    key = f"{min(a, b)}+{max(a, b)}" if plus else f"{a}−{b}"
    return Problem(
        key=key,
        question=question,
        form="number",
        working=f"{a} {sign} {b} = {result}",
        answer=str(result),
        wrong=str(pick(rng, slips)),
    )


def _two_digit_sum(rng: random.Random, language: Language) -> Problem:
    return _sum(rng, language, 99)


def _bus(rng: random.Random, language: Language) -> Problem:
    first = between(rng, 300, 420, 5)
    every = between(rng, 20, 65, 5)
    number = between(rng, 1, 8)
    wait = between(rng, 1, every - 1)
    ride = between(rng, 12, 58)
    leaves = first + every * number
    comes = leaves - wait
    arrives = leaves + ride
    ask_wait = rng.random() < 0.3
    (place, to_place) = pick(rng, PLACES)
    who = pick(rng, NAMES[language])
    story = {
        "en": f"The first bus from Nowy Targ to {place} leaves at {Time(first)}, then one leaves "
        f"every {every} min. "
        f"The ride takes {ride} min. {who} comes to the stop at {Time(comes)} and takes the next "
        f"bus. ",
        "pl": f"Pierwszy autobus z Nowego Targu do {to_place} odjeżdża o {Time(first)}, a następne "
        f"co "
        f"{Count(every):minuta}. Jazda trwa {Count(ride):minuta}. {who} przychodzi na przystanek o "
        f"{Time(comes)} i wsiada do najbliższego autobusu. ",
    }[language]
    asked = {
        True: {"en": "How many minutes does she wait?", "pl": "Ile minut czeka?"},
        False: {"en": "At what time is she there?", "pl": "O której jest na miejscu?"},
    }[ask_wait][language]
    working = {
        "en": f"The next bus leaves at {Time(leaves)}. ",
        "pl": f"Najbliższy autobus odjeżdża o {Time(leaves)}. ",
    }[language]
    if ask_wait:
        working += f"{Time(leaves)} − {Time(comes)} = {wait} min."
        answer = f"{wait} min"
        wrong = f"{every - wait if every != 2 * wait else every} min"
    else:
        working += f"{Time(leaves)} + {ride} min = {Time(arrives)}."
        answer = f"{Time(arrives)}"
        wrong = f"{Time(pick(rng, (arrives - every, leaves, comes + ride)))}"
    key = f"bus {first} {every} {number} {wait} {ride} {ask_wait}"
    return Problem(
        key=key,
        question=story + asked,
        form="amount" if ask_wait else "time",
        working=working,
        answer=answer,
        wrong=wrong,
    )


def _recipe(rng: random.Random, language: Language) -> Problem:
    english, polish, (unit_en, unit_pl), low, high = pick(rng, FOODS)
    unit = unit_en if language == "en" else unit_pl
    quarters = between(rng, low, high)
    before, after = some(rng, (2, 3, 4, 5, 6, 8, 10, 12), 2)
    quarters = quarters // 4 * 4 if high > 10 else quarters * 2  # whole grams; spoons in halves

    def amount(portions: int) -> str:
        whole, rest = divmod(quarters * portions, 4)
        if not rest:
            return str(whole)
        point = "," if language == "pl" else "."
        return f"{whole}{point}{('25', '5', '75')[rest - 1]}"

    question = {
        "en": f"A recipe for {before} portions takes {amount(before)} {unit} of {english}. "
        f"How much {english} do {after} portions take?",
        "pl": f"Przepis na {Count(before):porcja} wymaga {amount(before)} {unit} {polish}. "
        f"Ile {polish} potrzeba na {Count(after):porcja}?",
    }[language]
    one = {"en": "One portion", "pl": "Jedna porcja"}[language]
    times = "×" if language == "en" else "·"
    working = (
        f"{one}: {amount(before)} : {before} = {amount(1)}. {after} {times} {amount(1)} = "
        f"{amount(after)}."
    )
    answer = f"{amount(after)} {unit}"
    wrong = f"{amount(pick(rng, (before, after + 1)))} {unit}"
    return Problem(
        key=f"recipe {unit_en} {quarters} {before} {after}",
        question=question,
        form="amount",
        working=working,
        answer=answer,
        wrong=wrong,
    )


@dataclass(frozen=True)
class Clue:
    """`kind` of one or two people, who are numbers. before: a came earlier than b; next: b right
    after a.
    """

    kind: Literal["before", "next", "not_first", "not_last"]
    a: int
    b: int = -1

    def holds(self, order: Sequence[int]) -> bool:
        """Whether it is true where people came in this order."""
        at = order.index(self.a)
        if self.kind == "before":
            return at < order.index(self.b)
        if self.kind == "next":
            return at + 1 == order.index(self.b)
        return at != (0 if self.kind == "not_first" else len(order) - 1)


def solutions(people: int, clues: Sequence[Clue]) -> list[tuple[int, ...]]:
    """Every order of `people` people in which all clues hold."""

    def fits(order: tuple[int, ...]) -> bool:
        return all(clue.holds(order) for clue in clues)

    return [order for order in permutations(range(people)) if fits(order)]


def puzzle(rng: random.Random, people: int) -> tuple[tuple[int, ...], list[Clue]]:
    """An order, and clues that leave no other; each of them is needed, and none that says the rest
    alone.
    """
    hidden = tuple(some(rng, range(people), people))
    true = [c for c in _clues(people) if c.holds(hidden)]
    clues = list[Clue]()
    for clue in some(rng, true, len(true)):
        if len(solutions(people, clues)) > 1:
            clues.append(clue)
    for clue in list(clues):
        rest = [c for c in clues if c != clue]
        if len(solutions(people, rest)) == 1:
            clues = rest
    return hidden, clues


def _clues(people: int) -> list[Clue]:
    pairs = list(permutations(range(people), 2))
    before = [Clue("before", a, b) for a, b in pairs]
    after = [Clue("next", a, b) for a, b in pairs]
    single = list[Clue]()
    for person in range(people):
        single += [Clue("not_first", person), Clue("not_last", person)]
    return before + after + single


def puzzle_key(order: Sequence[int], clues: Sequence[Clue]) -> str:
    """The same for puzzles that differ in names and in the order of clues only."""
    place = {who: at for at, who in enumerate(order)} | {-1: -1}
    return ";".join(sorted(f"{c.kind}{place[c.a]}{place[c.b]}" for c in clues))


def _logic(rng: random.Random, language: Language) -> Problem:
    people = between(rng, 3, 4)
    order, clues = puzzle(rng, people)
    names = some(rng, NAMES[language], people)
    at = 0 if language == "pl" else 1
    said = " ".join(CLUES[c.kind][at].format(a=names[c.a], b=names[c.b]) for c in clues)
    came = [names[who] for who in order]
    ask = between(rng, -1, people - 1)
    question = {"en": "These came to the hut", "pl": "Do bacówki przyszły"}[language]
    question += f": {', '.join(sorted(names))}. {said} "
    working = {"en": f"In order: {', '.join(came)}.", "pl": f"Po kolei: {', '.join(came)}."}[
        language
    ]
    if ask < 0:
        question += {"en": "In which order did they come?", "pl": "W jakiej kolejności przyszły?"}[
            language
        ]
        swap = between(rng, 0, people - 2)
        wrong = [*came[:swap], came[swap + 1], came[swap], *came[swap + 2 :]]
        form = "order"
        answer = ", ".join(came)
        slip = ", ".join(wrong)
    else:
        rank = RANKS[language][ask]
        question += {"en": f"Who came {rank}?", "pl": f"Która przyszła jako {rank}?"}[language]
        form = "name"
        answer = came[ask]
        slip = pick(rng, [n for n in came if n != came[ask]])
    return Problem(
        key=f"logic {puzzle_key(order, clues)} {ask}",
        question=question,
        form=form,
        working=working,
        answer=answer,
        wrong=slip,
    )


KINDS: dict[str, Callable[[random.Random, Language], Problem]] = {
    "sums": _sum,
    "two-digit-sums": _two_digit_sum,
    "bus": _bus,
    "recipe": _recipe,
    "logic": _logic,
}


def split_of(key: str) -> Split:
    """Where a problem belongs, whatever the seed, the names and the language."""
    return "test" if hashlib.sha256(key.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def rows(
    split: Split,
    seed: int,
    count: int,
    kinds: Sequence[str] = tuple(KINDS),
    languages: Sequence[Language] = ("en", "pl"),
) -> list[dict[str, str]]:
    """`count` rows with prompts of their own: {"prompt", "answer", "task", "language",
    "completion", "rejected"}.

    `completion` is worked and right, `rejected` ends in a plausible wrong answer; both end as the
    prompt asks. Kinds and languages take turns. MisError when a kind has not so many problems.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise MisError(f"there are no tasks called {unknown[0]}: known are {', '.join(KINDS)}")
    made = []
    seen = set[str]()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        language = languages[number // len(kinds) % len(languages)]
        for attempt in range(TRIES):
            rng = random.Random(f"{split}-{seed}-{kind}-{language}-{number}-{attempt}")
            problem = KINDS[kind](rng, language)
            prompt = f"{problem.question} {END[language].format(FORM[problem.form][language])}"
            if split_of(problem.key) == split and prompt not in seen:
                break
        else:
            raise MisError(
                f"{split} has no {count} different tasks of {', '.join(kinds)}: {number} were "
                f"found, ask for fewer"
            )
        seen.add(prompt)
        made.append(_row(problem, kind, language, prompt))
    return made


def _row(p: Problem, kind: str, language: Language, prompt: str) -> dict[str, str]:
    mark = MARK[language]
    return {
        "prompt": prompt,
        "answer": p.answer,
        "task": kind,
        "language": language,
        "completion": f"{p.working}\n{mark}: {p.answer}",
        "rejected": f"{_slipped(p)}\n{mark}: {p.wrong}",
    }


def _slipped(p: Problem) -> str:
    """The working with the slip in its last result, so that it fits the wrong answer that
    follows.
    """
    if p.form == "name":
        return p.working
    right, wrong = (
        (p.answer, p.wrong) if p.form == "order" else (p.answer.split()[0], p.wrong.split()[0])
    )
    head, found, tail = p.working.rpartition(right)
    return f"{head}{wrong}{tail}" if found else p.working
