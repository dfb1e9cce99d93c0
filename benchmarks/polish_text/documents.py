"""The Miś dataset, which ships as mis_mlx/data/polish/mis: a seeded generator of Polish texts, all
of our own making.

Five kinds take turns: recipes, bus timetables, price lists, regulations and sums told as stories.
Their arithmetic is right: amounts, times and totals are computed, and a line "Rachunek: ..." shows
the working. Knows no tokenizer. Only `random_draws` draws, so a seed means the same documents under
every version of Python.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mis_mlx.storage.files import DISK

from . import shop, words
from .inflection import Count, Time
from .money import Money
from .random_draws import between, pick, some
from .stories import STORIES

SPLITS = {"train": (0, 400), "valid": (1, 25), "test": (2, 75)}  # split: (seed, documents)


def write(folder: Path) -> None:
    """The folder that ships: train.jsonl, valid.jsonl, test.jsonl, a line {"text"} a document."""
    for name, (seed, count) in SPLITS.items():
        lines = [
            json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents(seed, count)
        ]
        DISK.replace_text(folder / f"{name}.jsonl", "".join(lines))


def documents(seed: int, count: int) -> list[str]:
    """`count` Polish documents of about 600 to 1200 characters; document i depends on (seed, i)
    alone.
    """
    kinds = (_recipe, _timetable, _price_list, _regulation, _stories)
    return [kinds[i % len(kinds)](random.Random(f"{seed}-{i}")) for i in range(count)]


def _recipe(rng: random.Random) -> str:
    dish, ingredients, steps = pick(rng, words.DISHES)
    pairs = between(rng, 1, 4)
    start = between(rng, 8 * 60, 18 * 60, 5)
    long = between(rng, 20, 55, 5)
    total = long + between(rng, 45, 90, 5)
    times = {
        "d": Count(long),
        "d2": Count(between(rng, 10, 30)),
        "s": Count(between(rng, 2, 4)),
        "s2": Count(between(rng, 2, 5)),
    }
    amounts = [f"- {Count(amount * pairs):{noun}}{rest}" for noun, amount, rest in ingredients]
    tips = some(rng, words.TIPS, 2)
    return "\n".join(
        [
            f"Przepis: {dish}, {Count(2 * pairs):porcja}",
            _say(rng, pick(rng, words.SCENES)),
            "Składniki:",
            *amounts,
            *(f"{number}. {_say(rng, step, **times)}" for number, step in enumerate(steps, 1)),
            f"Zaczynamy o {Time(start)}, całość zajmuje {Count(total):minuta}, na stole o "
            f"{Time(start + total)}.",
            *(_say(rng, tip) for tip in tips),
            _say(rng, pick(rng, words.CLOSINGS)),
        ]
    )


def _timetable(rng: random.Random) -> str:
    place, to_place, stops = pick(rng, words.ROUTES)
    first = between(rng, 5 * 60, 7 * 60)
    every = between(rng, 35, 95)
    legs = [between(rng, 6, 17) for _ in range(len(stops) + 1)]
    departures = [first + every * i for i in range(between(rng, 5, 9))]
    passing = []
    at = first
    for stop, leg in zip([*stops, place], legs, strict=True):
        at += leg
        passing.append(f"{stop} {Time(at)}")
    fare = between(rng, 500, 1800, 20)
    adults = between(rng, 2, 4)
    children = between(rng, 2, 6)
    total = Money(adults * fare + children * fare // 2)
    notes = some(rng, words.BUS_NOTES, 3)
    return "\n".join(
        [
            f"Rozkład jazdy, linia {between(rng, 2, 59)}: Nowy Targ – {place}",
            _say(rng, pick(rng, words.SCENES)),
            f"Odjazdy z Nowego Targu do {to_place}: "
            f"{', '.join(f'{Time(at)}' for at in departures)}.",
            f"Autobus kursuje co {Count(every):minuta}, jazda trwa {Count(sum(legs)):minuta}.",
            f"Pierwszy kurs: Nowy Targ {Time(first)}, {', '.join(passing)}.",
            f"Ostatni kurs odjeżdża o {Time(departures[-1])} i jest na miejscu o "
            f"{Time(departures[-1] + sum(legs))}.",
            f"Bilet normalny kosztuje {Money(fare)}, ulgowy {Money(fare // 2)}. "
            f"{Count(adults):bilet} "
            f"{Count(adults):!normalny} i {Count(children)} {Count(children):!ulgowy} to razem "
            f"{total}.",
            f"Rachunek: {adults} · {Money(fare)} + {children} · {Money(fare // 2)} = {total}.",
            *(_say(rng, note) for note in notes),
            "Rozkład jest zmyślony, góry są prawdziwe.",
        ]
    )


def _price_list(rng: random.Random) -> str:
    goods = some(rng, shop.GOODS, 8)
    prices = [between(rng, low, high, 10) for _, _, low, high in goods]
    bought = [between(rng, 2, 6) for _ in range(3)]
    total = sum(count * price for count, price in zip(bought, prices, strict=False))
    paid = -(-total // 5000) * 5000
    person, _, ending = pick(rng, words.PEOPLE)
    basket = [
        f"{Count(n):{noun}}{rest}" for n, (noun, rest, _, _) in zip(bought, goods, strict=False)
    ]
    working = " + ".join(f"{n} · {Money(price)}" for n, price in zip(bought, prices, strict=False))
    listed = some(rng, list(zip(goods, prices, strict=True)), len(goods))
    change = f"i dostał{ending} {Money(paid - total)} reszty" if paid > total else "co do grosza"
    return "\n".join(
        [
            f"Sklep „U Zośki”: cennik ważny {pick(rng, words.DAYS)}",
            _say(rng, pick(rng, words.SCENES)),
            *(f"- {noun}{rest}: {Money(price)}" for (noun, rest, _, _), price in listed),
            f"Przykład: {person} bierze {basket[0]}, {basket[1]} oraz {basket[2]}.",
            f"Rachunek: {working} = {Money(total)}.",
            f"{_capital(person)} zapłacił{ending} {Money(paid)} {change}.",
            *(_say(rng, note) for note in some(rng, shop.SHOP_NOTES, 3)),
            _say(rng, pick(rng, words.CLOSINGS)),
        ]
    )


def _regulation(rng: random.Random) -> str:
    rules = some(rng, shop.RULES, between(rng, 8, 10))
    return "\n".join(
        [
            f"Regulamin {pick(rng, shop.RULED)}",
            _say(rng, pick(rng, words.SCENES)),
            *(f"§ {number}. {_say(rng, rule)}" for number, rule in enumerate(rules, 1)),
            _say(rng, pick(rng, shop.SIGNATURES)),
        ]
    )


def _stories(rng: random.Random) -> str:
    lines = ["Zadania z hali", _say(rng, pick(rng, words.SCENES))]
    for number, story in enumerate(some(rng, STORIES, 3), 1):
        drawn = {
            name: kind(between(rng, low, high, step))
            for name, (kind, low, high, step) in story.draw.items()
        }
        values: dict[str, Any] = {
            name: Count(formula(**drawn)) for name, formula in story.derived.items()
        }
        values |= {**drawn, **_person(rng), "wynik": story.kind(story.result(**drawn))}
        lines += [
            f"Zadanie {number}. {story.text.format_map(values)}",
            f"Rachunek: {story.working.format_map(values)}.",
            f"Odpowiedź: {story.answer.format_map(values)}",
        ]
    return "\n".join([*lines, _say(rng, pick(rng, words.CLOSINGS))])


def _say(rng: random.Random, sentence: str, **known: int) -> str:
    """The sentence with its placeholders filled: `known` ones as given, all others drawn afresh."""
    day = pick(rng, words.DAYS)
    drawn = {
        "n": Count(between(rng, 2, 9)),
        "m": Count(between(rng, 11, 48)),
        "w": Count(between(rng, 45, 130)),
        "t": Count(between(rng, 2, 24)),
        "cena": Money(between(rng, 600, 6000, 50)),
        "drobne": Money(between(rng, 110, 390, 10)),
        "rano": Time(between(rng, 4 * 60, 8 * 60, 5)),
        "wieczór": Time(between(rng, 20 * 60, 23 * 60, 5)),
    }
    return sentence.format_map(
        {**drawn, **_person(rng), "dzień": day, "Dzień": _capital(day), **known}
    )


def _person(rng: random.Random) -> dict[str, str]:
    nominative, dative, ending = pick(rng, words.PEOPLE)
    return {"kto": nominative, "Kto": _capital(nominative), "komu": dative, "a": ending}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
