"""Stories of the Miś dataset: fifteen sums told as stories, each with its working and its answer.

Knows no chance: `documents` draws the values within the ranges given here, which keep every result
whole and positive. In a working, "·" is times and ":" is divided by, as in Polish schools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .inflection import Count
from .money import Money

Range = tuple[type[int], int, int, int]  # Count or Money, lowest, highest, step


@dataclass(frozen=True)
class Story:
    """`draw` names the values of `text`; `result` takes them by name and gives {wynik}, of type
    `kind`.

    `derived` values follow from drawn ones: a product told in the text, so that the division comes
    out even.
    """

    text: str
    draw: Mapping[str, Range]
    working: str
    kind: type[int]
    result: Callable[..., int]
    answer: str
    derived: Mapping[str, Callable[..., int]] = field(default_factory=dict)


def _count(low: int, high: int, step: int = 1) -> Range:
    return Count, low, high, step


def _money(low: int, high: int, step: int = 10) -> Range:
    return Money, low, high, step


STORIES = (
    Story(
        "{Kto} kupił{a} {n:oscypek} po {cena}. Ile zapłacił{a}?",
        {"n": _count(2, 9), "cena": _money(800, 2590)},
        "{n} · {cena} = {wynik}",
        Money,
        lambda n, cena: n * cena,
        "{Kto} zapłacił{a} {wynik}, czyli {wynik:słownie}.",
    ),
    Story(
        "Rachunek w bacówce wyniósł {cena}, a {kto} położył{a} na ladzie {banknot}. Ile reszty "
        "wydał baca?",
        {"cena": _money(610, 4990), "banknot": _money(5000, 20000, 5000)},
        "{banknot} − {cena} = {wynik}",
        Money,
        lambda cena, banknot: banknot - cena,
        "Baca wydał {wynik} reszty, słownie: {wynik:słownie}.",
    ),
    Story(
        "Na hali {n:!pasła} się {n:owca}. Przed burzą {kto} sprowadził{a} do zagrody {m:owca}. "
        "Ile owiec zostało na hali?",
        {"n": _count(45, 140), "m": _count(12, 40)},
        "{n} − {m} = {wynik}",
        Count,
        lambda n, m: n - m,
        "Na hali {wynik:!została} {wynik:owca}.",
    ),
    Story(
        "{Kto} wydoił{a} {n:owca}, a każda dała {ile:litr} mleka. Ile litrów mleka jest w kotle?",
        {"n": _count(6, 48), "ile": _count(2, 4)},
        "{n} · {ile} = {wynik}",
        Count,
        lambda n, ile: n * ile,
        "Razem to {wynik:litr} mleka.",
    ),
    Story(
        "Jeden oscypek wymaga {ile} litrów mleka, a {kto} nalał{a} do kotła {razem:litr}. Ile "
        "oscypków z tego będzie?",
        {"ile": _count(4, 9), "n": _count(3, 24)},
        "{razem} : {ile} = {wynik}",
        Count,
        lambda n, **_: n,
        "Z kotła {wynik:!wyjdzie} {wynik:oscypek}.",
        {"razem": lambda ile, n: ile * n},
    ),
    Story(
        "Tabliczka obiecuje {m:minuta} marszu w górę i {d:minuta} w dół, a halny dołożył jeszcze "
        "{h:minuta}. Ile minut wędrował{a} {kto}?",
        {"m": _count(65, 190), "d": _count(40, 120), "h": _count(5, 35)},
        "{m} + {d} + {h} = {wynik}",
        Count,
        lambda m, d, h: m + d + h,
        "Wędrówka trwała {wynik:minuta}.",
    ),
    Story(
        "{Kto} podzielił{a} {razem:moskol} po równo między {k} juhasów. Ile moskoli dostał każdy?",
        {"k": _count(2, 9), "n": _count(2, 12)},
        "{razem} : {k} = {wynik}",
        Count,
        lambda n, **_: n,
        "Każdy juhas dostał {wynik:moskol}.",
        {"razem": lambda k, n: k * n},
    ),
    Story(
        "Miś pije codziennie {n:kubek} herbaty, o czym dobrze wie {kto}. Ile kubków wypije przez "
        "{d:dzień}?",
        {"n": _count(2, 9), "d": _count(5, 31)},
        "{n} · {d} = {wynik}",
        Count,
        lambda n, d: n * d,
        "Przez {d:dzień} Miś wypije {wynik:kubek} herbaty.",
    ),
    Story(
        "Z Nowego Targu jechało autobusem {n} pasażerów. W Szaflarach {m} wysiadło, a {w} wsiadło, "
        "wśród nich {kto}. Ilu pasażerów pojechało dalej?",
        {"n": _count(24, 52), "m": _count(5, 19), "w": _count(5, 14)},
        "{n} − {m} + {w} = {wynik}",
        Count,
        lambda n, m, w: n - m + w,
        "Dalej pojechało {wynik} pasażerów.",
    ),
    Story(
        "{Kto} zapakował{a} do plecaka {o:gram} oscypka, {c:gram} chleba i {k:gram} kiełbasy. "
        "Ile gramów waży prowiant?",
        {"o": _count(150, 650, 10), "c": _count(200, 900, 10), "k": _count(100, 480, 10)},
        "{o} + {c} + {k} = {wynik}",
        Count,
        lambda o, c, k: o + c + k,
        "Prowiant waży {wynik:gram}.",
    ),
    Story(
        "Para skarpet z owczej wełny kosztuje {cena}, a rękawice są o {więcej} droższe. Ile "
        "zapłaci {kto} za "
        "{n:para} skarpet i jedne rękawice?",
        {"cena": _money(1800, 4490), "więcej": _money(250, 1990), "n": _count(2, 6)},
        "{n} · {cena} + {cena} + {więcej} = {wynik}",
        Money,
        lambda cena, więcej, n: n * cena + cena + więcej,
        "Razem {wynik}, czyli {wynik:słownie}.",
    ),
    Story(
        "O świcie {kto} odczytał{a} na termometrze −{t} °C, a do południa halny ogrzał powietrze o "
        "{d:stopień}. Ile stopni było w południe?",
        {"t": _count(2, 11), "d": _count(12, 24)},
        "−{t} + {d} = {wynik}",
        Count,
        lambda t, d: d - t,
        "W południe było {wynik} °C.",
    ),
    Story(
        "{Kto} porąbał{a} {n:kłoda}, każdą na {k:szczapa}, a do pieca dorzucił{a} {m:szczapa}. Ile "
        "szczap zostało?",
        {"n": _count(5, 19), "k": _count(4, 9), "m": _count(3, 18)},
        "{n} · {k} − {m} = {wynik}",
        Count,
        lambda n, k, m: n * k - m,
        "Pod ścianą {wynik:!została} {wynik:szczapa}.",
    ),
    Story(
        "Bilet normalny kosztuje {cena}, a ulgowy połowę tej kwoty. Ile zapłaci {kto} za jeden "
        "bilet "
        "normalny i {n:bilet} {n:!ulgowy}?",
        {"cena": _money(600, 2600, 20), "n": _count(2, 7)},
        "{cena} + {n} · {cena} : 2 = {wynik}",
        Money,
        lambda cena, n: cena + n * cena // 2,
        "Za wszystkie bilety {kto} zapłaci {wynik}.",
    ),
    Story(
        "Sklep „U Zośki” obniżył cenę kierpców z {cena} o {p} procent, bo tak poradził{a} {kto}. "
        "Ile kosztują teraz?",
        {"cena": _money(9000, 26000, 1000), "p": _count(5, 40, 5)},
        "{cena} − {cena} · {p} : 100 = {wynik}",
        Money,
        lambda cena, p: cena - cena * p // 100,
        "Kierpce kosztują teraz {wynik}.",
    ),
)
