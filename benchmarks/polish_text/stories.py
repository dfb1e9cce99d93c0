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
        text="{Kto} kupił{a} {n:oscypek} po {cena}. Ile zapłacił{a}?",
        draw={"n": _count(2, 9), "cena": _money(800, 2590)},
        working="{n} · {cena} = {wynik}",
        kind=Money,
        result=lambda n, cena: n * cena,
        answer="{Kto} zapłacił{a} {wynik}, czyli {wynik:słownie}.",
    ),
    Story(
        text=(
            "Rachunek w bacówce wyniósł {cena}, a {kto} położył{a} na ladzie {banknot}. "
            "Ile reszty wydał baca?"
        ),
        draw={"cena": _money(610, 4990), "banknot": _money(5000, 20000, 5000)},
        working="{banknot} − {cena} = {wynik}",
        kind=Money,
        result=lambda cena, banknot: banknot - cena,
        answer="Baca wydał {wynik} reszty, słownie: {wynik:słownie}.",
    ),
    Story(
        text=(
            "Na hali {n:!pasła} się {n:owca}. "
            "Przed burzą {kto} sprowadził{a} do zagrody {m:owca}. "
            "Ile owiec zostało na hali?"
        ),
        draw={"n": _count(45, 140), "m": _count(12, 40)},
        working="{n} − {m} = {wynik}",
        kind=Count,
        result=lambda n, m: n - m,
        answer="Na hali {wynik:!została} {wynik:owca}.",
    ),
    Story(
        text=(
            "{Kto} wydoił{a} {n:owca}, a każda dała {ile:litr} mleka. "
            "Ile litrów mleka jest w kotle?"
        ),
        draw={"n": _count(6, 48), "ile": _count(2, 4)},
        working="{n} · {ile} = {wynik}",
        kind=Count,
        result=lambda n, ile: n * ile,
        answer="Razem to {wynik:litr} mleka.",
    ),
    Story(
        text=(
            "Jeden oscypek wymaga {ile} litrów mleka, a {kto} nalał{a} do kotła {razem:litr}. "
            "Ile oscypków z tego będzie?"
        ),
        draw={"ile": _count(4, 9), "n": _count(3, 24)},
        working="{razem} : {ile} = {wynik}",
        kind=Count,
        result=lambda n, **_: n,
        answer="Z kotła {wynik:!wyjdzie} {wynik:oscypek}.",
        derived={"razem": lambda ile, n: ile * n},
    ),
    Story(
        text=(
            "Tabliczka obiecuje {m:minuta} marszu w górę i {d:minuta} w dół, "
            "a halny dołożył jeszcze {h:minuta}. "
            "Ile minut wędrował{a} {kto}?"
        ),
        draw={"m": _count(65, 190), "d": _count(40, 120), "h": _count(5, 35)},
        working="{m} + {d} + {h} = {wynik}",
        kind=Count,
        result=lambda m, d, h: m + d + h,
        answer="Wędrówka trwała {wynik:minuta}.",
    ),
    Story(
        text=(
            "{Kto} podzielił{a} {razem:moskol} po równo między {k} juhasów. "
            "Ile moskoli dostał każdy?"
        ),
        draw={"k": _count(2, 9), "n": _count(2, 12)},
        working="{razem} : {k} = {wynik}",
        kind=Count,
        result=lambda n, **_: n,
        answer="Każdy juhas dostał {wynik:moskol}.",
        derived={"razem": lambda k, n: k * n},
    ),
    Story(
        text=(
            "Miś pije codziennie {n:kubek} herbaty, o czym dobrze wie {kto}. "
            "Ile kubków wypije przez {d:dzień}?"
        ),
        draw={"n": _count(2, 9), "d": _count(5, 31)},
        working="{n} · {d} = {wynik}",
        kind=Count,
        result=lambda n, d: n * d,
        answer="Przez {d:dzień} Miś wypije {wynik:kubek} herbaty.",
    ),
    Story(
        text=(
            "Z Nowego Targu jechało autobusem {n} pasażerów. "
            "W Szaflarach {m} wysiadło, a {w} wsiadło, wśród nich {kto}. "
            "Ilu pasażerów pojechało dalej?"
        ),
        draw={"n": _count(24, 52), "m": _count(5, 19), "w": _count(5, 14)},
        working="{n} − {m} + {w} = {wynik}",
        kind=Count,
        result=lambda n, m, w: n - m + w,
        answer="Dalej pojechało {wynik} pasażerów.",
    ),
    Story(
        text=(
            "{Kto} zapakował{a} do plecaka {o:gram} oscypka, "
            "{c:gram} chleba i {k:gram} kiełbasy. "
            "Ile gramów waży prowiant?"
        ),
        draw={"o": _count(150, 650, 10), "c": _count(200, 900, 10), "k": _count(100, 480, 10)},
        working="{o} + {c} + {k} = {wynik}",
        kind=Count,
        result=lambda o, c, k: o + c + k,
        answer="Prowiant waży {wynik:gram}.",
    ),
    Story(
        text=(
            "Para skarpet z owczej wełny kosztuje {cena}, a rękawice są o {więcej} droższe. "
            "Ile zapłaci {kto} za {n:para} skarpet i jedne rękawice?"
        ),
        draw={"cena": _money(1800, 4490), "więcej": _money(250, 1990), "n": _count(2, 6)},
        working="{n} · {cena} + {cena} + {więcej} = {wynik}",
        kind=Money,
        result=lambda cena, więcej, n: n * cena + cena + więcej,
        answer="Razem {wynik}, czyli {wynik:słownie}.",
    ),
    Story(
        text=(
            "O świcie {kto} odczytał{a} na termometrze −{t} °C, "
            "a do południa halny ogrzał powietrze o {d:stopień}. "
            "Ile stopni było w południe?"
        ),
        draw={"t": _count(2, 11), "d": _count(12, 24)},
        working="−{t} + {d} = {wynik}",
        kind=Count,
        result=lambda t, d: d - t,
        answer="W południe było {wynik} °C.",
    ),
    Story(
        text=(
            "{Kto} porąbał{a} {n:kłoda}, każdą na {k:szczapa}, "
            "a do pieca dorzucił{a} {m:szczapa}. "
            "Ile szczap zostało?"
        ),
        draw={"n": _count(5, 19), "k": _count(4, 9), "m": _count(3, 18)},
        working="{n} · {k} − {m} = {wynik}",
        kind=Count,
        result=lambda n, k, m: n * k - m,
        answer="Pod ścianą {wynik:!została} {wynik:szczapa}.",
    ),
    Story(
        text=(
            "Bilet normalny kosztuje {cena}, a ulgowy połowę tej kwoty. "
            "Ile zapłaci {kto} za jeden bilet normalny i {n:bilet} {n:!ulgowy}?"
        ),
        draw={"cena": _money(600, 2600, 20), "n": _count(2, 7)},
        working="{cena} + {n} · {cena} : 2 = {wynik}",
        kind=Money,
        result=lambda cena, n: cena + n * cena // 2,
        answer="Za wszystkie bilety {kto} zapłaci {wynik}.",
    ),
    Story(
        text=(
            "Sklep „U Zośki” obniżył cenę kierpców z {cena} o {p} procent, "
            "bo tak poradził{a} {kto}. "
            "Ile kosztują teraz?"
        ),
        draw={"cena": _money(9000, 26000, 1000), "p": _count(5, 40, 5)},
        working="{cena} − {cena} · {p} : 100 = {wynik}",
        kind=Money,
        result=lambda cena, p: cena - cena * p // 100,
        answer="Kierpce kosztują teraz {wynik}.",
    ),
)
