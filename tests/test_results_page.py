"""docs/results.md against the files it links: every number of a finding stands there, and a wrong
one is noticed.

A link may name a part of its file: `recovery_table.json#tasks/grammar-en` is the entry of `tasks`
that is called so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
# What a number's unit divides it by; a number without one stands in the file as it is.
UNITS = {
    "%": (0.01, 1.0),
    "MB": (1e6, 1.0),
    "MiB": (2**20,),
    "GiB": (2**30,),
    "minutes": (60.0,),
    "min": (60.0,),
    "M": (1e6,),
    "thousand": (1e3,),
    "million": (1e6,),
    "billion": (1e9,),
}
MACHINE = {"cores", "cores_used", "memory_gib", "command"}  # keys that are no results
UNIT = rf"\s*({'|'.join(UNITS)})(?!\w)"
DIGITS = r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?"
BEHIND = rf"x\b|{UNIT}|(?= (?:to|and) [\d.]+{UNIT})"  # `16 to 55 %` has its unit twice
NUMBER = re.compile(rf"(?<![\w.,])([−+-]?)({DIGITS})(?:{BEHIND})?(?![\w,.]*\d)")


class Finding(NamedTuple):
    """One of the page's list: its words without links, commands, seeds and names; (file, part of
    it) of its links.
    """

    number: int
    text: str
    files: tuple[tuple[Path, str], ...]
    commands: tuple[str, ...]


def finding(number: int, text: str) -> Finding:
    """An item taken apart."""
    links = re.findall(r"\]\(([^)#]+\.json)#?([^)]*)\)", text)
    files = tuple(((PAGE.parent / target).resolve(), part) for target, part in links)
    commands = tuple(c for c in re.findall(r"`([^`]+)`", text) if c.startswith("scripts/mis"))
    text = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`", "", text)
    text = re.sub(r"[Ss]eeds? \d+(?:(?:, | and )\d+)*(?!\d*[.,]\d)", "", text)
    text = re.sub(r"\b[A-Za-z][\w.]*-?\d[\w.-]*|\b\d-(?:bit|to)\b|\bfloat\d+", "", text)
    return Finding(number, text, files, commands)


def values(result: Any) -> Iterator[float]:
    """Every number of a results file, those of its keys and of its verdicts' words too."""
    if isinstance(result, dict):
        for key, value in result.items():
            if key not in MACHINE:
                yield from (float(n) for n in re.findall(r"\d+(?:\.\d+)?", key.replace(",", "")))
                yield from values(value)
    elif isinstance(result, list):
        for value in result:
            yield from values(value)
    elif isinstance(result, str):
        yield from (float(n) for n in re.findall(r"^\d+(?:\.\d+)?(?=x)", result))  # "1.45x or more"
    elif isinstance(result, int | float) and not isinstance(result, bool):
        yield float(result)


def part_of(result: Any, words: str) -> Any:
    """What lies behind these keys; of a list the entry one of whose values is the word."""
    for word in filter(None, words.split("/")):
        if isinstance(result, list):
            (result,) = (entry for entry in result if word in entry.values())
        else:
            result = result[word]
    return result


def stands(sign: str, digits: str, unit: str, found: list[float]) -> bool:
    """Whether one of the values, rounded to the decimals shown, is it. A sign must agree where one
    is written.
    """
    written = digits.replace(",", "")
    places = len(written.partition(".")[2])
    for scale in UNITS.get(unit, (1.0,)):
        for value in found:
            agrees = value >= 0 if sign == "+" else value < 0 or not sign
            if agrees and f"{abs(value) / scale:.{places}f}" == written:
                return True
    return False


def missing(one: Finding, measured: bool) -> tuple[int, list[str]]:
    """How many numbers it has, and those that none of its files has, nor the parts of them that it
    links. measured: only shares and numbers with decimals.
    """
    found = list[float]()
    for path, words in one.files:
        found += values(part_of(json.loads(path.read_text("utf-8")), words))
    numbers = [(m[1], m[2], m[3] or m[4] or "") for m in NUMBER.finditer(one.text)]
    if measured:
        numbers = [n for n in numbers if "." in n[1] or n[2] == "%"]
    return len(numbers), [" ".join(n) for n in numbers if not stands(*n, found)]


ITEMS = re.findall(r"^(\d+)\. (.*?)(?=\n\n|\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
ALL = [finding(int(number), " ".join(text.split())) for number, text in ITEMS]
each = pytest.mark.parametrize("one", ALL, ids=lambda one: str(one.number))


@each
def test_a_finding_names_files_seeds_and_its_command(one: Finding) -> None:
    """Its files exist, and were made by the program that its command runs."""
    assert one.files
    assert all(path.is_file() for path, _ in one.files)
    assert re.search(
        r"(?i)seeds?\b|one run|one student", PAGE.read_text("utf-8").split(f"\n{one.number}. ")[1]
    )
    made = {json.loads(path.read_text("utf-8"))["command"].split()[1] for path, _ in one.files}
    assert {command.split()[1] for command in one.commands} == made


@each
def test_every_number_stands_in_its_file(one: Finding) -> None:
    """Rounded as it is shown."""
    count, wrong = missing(one, measured=False)
    assert count >= 3
    assert wrong == []


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_the_other_pages_quote_the_files_they_link(page: Path) -> None:
    """Every share and every number with decimals that stands beside a link, in a paragraph, an item
    or a row; whole numbers there may be settings.
    """
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for part in re.split(r"\n\s*\n|\n(?=- |\d+\. |\|)", text):
        one = finding(0, " ".join(part.split()))
        wrong = missing(one, measured=True)[1] if one.files else []
        assert not wrong, f"{page.name}: {wrong} of '{one.text[:60]}...' stand in none of its files"
