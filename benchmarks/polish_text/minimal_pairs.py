"""Minimal pairs of our own making, Polish and English: two sentences, one of which breaks a rule of
grammar.

Knows no row format and no model. Polish: a noun after a number, a verb after a number, the gender
of a verb in the past, the genitive after "do" and "z". English: agreement past a noun that
distracts, this and these, the participle after "have". Every rule is one that school books give;
only `random.Random(str).random()` is drawn from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from mis_mlx.types import MisError

from .inflection import Count
from .problems import NAMES, TRIES, Language
from .random_draws import between, pick, some

Pair = tuple[str, str]  # (right, wrong)
PATIENCE = 50  # drawings before the next rule takes the turn
FEW = (2, 3, 4, 22, 23, 24, 32, 33, 34)
MANY = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 25, 26, 30)
NOUNS = (
    *(
        "jajko",
        "cebula",
        "marchewka",
        "jabłko",
        "śliwka",
        "grzyb",
        "oscypek",
        "moskol",
        "kubek",
        "kłoda",
        "bilet",
    ),
    *(
        "czapka",
        "dzwonek",
        "słoik",
        "bochenek",
        "pocztówka",
        "gwizdek",
        "drożdżówka",
        "butelka",
        "latarka",
        "paczka",
    ),
)
COUNTED = (
    "Mamy {}.",
    "Kupiliśmy {}.",
    "W plecaku mamy jeszcze {}.",
    "Do schroniska przynieśliśmy {}.",
)
MEN = (
    "Jan",
    "Staszek",
    "Józek",
    "Franek",
    "Wojtek",
    "Maciek",
    "Jędrek",
    "Tomek",
    "Adam",
    "Piotr",
    "Paweł",
    "Marek",
)
PAST = (
    ("przyszedł", "przyszła", "na halę"),
    ("kupił", "kupiła", "chleb"),
    ("zgubił", "zgubiła", "czapkę"),
    ("wziął", "wzięła", "plecak"),
    ("usiadł", "usiadła", "na ławce"),
    ("wstał", "wstała", "przed świtem"),
    ("zamknął", "zamknęła", "bacówkę"),
    ("zjadł", "zjadła", "śniadanie"),
)
WHEN = ("Wczoraj", "Dziś rano", "W sobotę", "Po południu")
TOWNS = (
    *(
        ("Zakopane", "Zakopanego"),
        ("Szczawnica", "Szczawnicy"),
        ("Jabłonka", "Jabłonki"),
        ("Niedzica", "Niedzicy"),
    ),
    *(
        ("Warszawa", "Warszawy"),
        ("Rabka", "Rabki"),
        ("Krynica", "Krynicy"),
        ("Bukowina", "Bukowiny"),
    ),
    *(("Kraków", "Krakowa"), ("Poronin", "Poronina"), ("Gdańsk", "Gdańska"), ("Lublin", "Lublina")),
    *(("Limanowa", "Limanowej"), ("Biecz", "Biecza"), ("Gdynia", "Gdyni"), ("Poznań", "Poznania")),
)
TRIPS = (
    "Jutro jedziemy do {}.",
    "Wracamy z {}.",
    "Autobus z {} się spóźnia.",
    "Nie dojechaliśmy do {}.",
)
THINGS = (
    "dog",
    "book",
    "house",
    "letter",
    "farmer",
    "window",
    "road",
    "bottle",
    "shepherd",
    "teacher",
    "boat",
)
WHERE = ("near", "behind", "next to", "opposite")
ADJECTIVES = ("old", "very nice", "well known", "quite small", "gone now")
VERBS = (
    *(("written", "wrote", "a letter"), ("eaten", "ate", "the soup"), ("taken", "took", "the bus")),
    *(
        ("seen", "saw", "the film"),
        ("broken", "broke", "the window"),
        ("driven", "drove", "the car"),
    ),
    *(
        ("chosen", "chose", "a colour"),
        ("given", "gave", "an answer"),
        ("ridden", "rode", "a horse"),
    ),
)
SINGULAR = ("She", "He", "The teacher", "My brother", "Our neighbour")


def _noun_after_number(rng: random.Random) -> Pair:
    few = rng.random() < 0.5
    noun = pick(rng, NOUNS)
    frame = pick(rng, COUNTED)
    number = pick(rng, FEW if few else MANY)
    other = f"{Count(5 if few else 2):!{noun}}"
    return frame.format(f"{Count(number):{noun}}"), frame.format(f"{number} {other}")


def _verb_after_number(rng: random.Random) -> Pair:
    few = rng.random() < 0.5
    noun = pick(rng, NOUNS)
    number = Count(pick(rng, FEW if few else MANY))
    right, wrong = ("Zostały", "Zostało") if few else ("Zostało", "Zostały")
    return f"{right} nam {number:{noun}}.", f"{wrong} nam {number:{noun}}."


def _gender(rng: random.Random) -> Pair:
    (he, she, rest) = pick(rng, PAST)
    when = pick(rng, WHEN)
    man = rng.random() < 0.5
    who = pick(rng, MEN if man else NAMES["pl"])
    right, wrong = (he, she) if man else (she, he)
    return f"{when} {who} {right} {rest}.", f"{when} {who} {wrong} {rest}."


def _genitive(rng: random.Random) -> Pair:
    (nominative, genitive) = pick(rng, TOWNS)
    frame = pick(rng, TRIPS)
    return frame.format(genitive), frame.format(nominative)


def _agreement(rng: random.Random) -> Pair:
    (one, other) = some(rng, THINGS, 2)
    many = rng.random() < 0.5
    subject, distraction = (f"{one}s", other) if many else (one, f"{other}s")
    right, wrong = ("are", "is") if many else ("is", "are")
    start = f"The {subject} {pick(rng, WHERE)} the {distraction}"
    end = pick(rng, ADJECTIVES)
    return f"{start} {right} {end}.", f"{start} {wrong} {end}."


def _demonstrative(rng: random.Random) -> Pair:
    noun = pick(rng, THINGS)
    many = rng.random() < 0.5
    end = pick(rng, ADJECTIVES)
    right, wrong = ("these", "this") if many else ("this", "these")
    rest = f"{noun}s are" if many else f"{noun} is"
    return f"I think {right} {rest} {end}.", f"I think {wrong} {rest} {end}."


def _participle(rng: random.Random) -> Pair:
    (participle, past, rest) = pick(rng, VERBS)
    who = pick(rng, SINGULAR)
    return f"{who} has {participle} {rest}.", f"{who} has {past} {rest}."


RULES: dict[Language, Sequence[Callable[[random.Random], Pair]]] = {
    "pl": (_noun_after_number, _verb_after_number, _gender, _genitive),
    "en": (_agreement, _demonstrative, _participle),
}


def pairs(language: Language, count: int, seed: int = 0) -> list[Pair]:
    """`count` different pairs; the rules take turns as long as they have any. MisError when there
    are not so many.
    """
    made = dict[Pair, None]()
    rules = RULES[language]
    for number in range(count):
        for attempt in range(TRIES):
            rule = rules[(number + attempt // PATIENCE) % len(rules)]
            pair = rule(random.Random(f"{seed}-{language}-{number}-{attempt}"))
            if pair not in made:
                break
        else:
            raise MisError(
                f"there are no {count} different pairs, {len(made)} were found: ask for fewer"
            )
        made[pair] = None
    return list(made)


def rows(language: Language, count: int) -> list[dict]:
    """Choice rows of pairs, in a seeded order of the two."""
    made = []
    for number, (right, wrong) in enumerate(pairs(language, count)):
        swap = between(random.Random(f"order-{language}-{number}"), 0, 1)
        made.append(
            {"question": "", "options": [wrong, right] if swap else [right, wrong], "answer": right}
        )
    return made
