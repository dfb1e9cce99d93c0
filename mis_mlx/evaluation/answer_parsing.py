"""Read a value out of a short text: an exact number with its unit, a time of day, or names. Polish
and English.

Anything that is not one value and nothing else is no value: "5 or 7", "not 5", "about 5", digits of
other alphabets, invisible characters, a comma of two readings. Digits are counted before they are
converted, nothing is evaluated.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

Language = Literal["pl", "en"]

# characters of a value; digits of a number
TEXT_LIMIT = 160
DIGIT_LIMIT = 30

_KINDS = json.loads((Path(__file__).parent / "units.json").read_text("utf-8"))
# Name of a unit: its kind, and its factor to the smallest one of that.
_UNITS = {
    n: (kind, int(f))
    for kind, factors in _KINDS.items()
    for f, names in factors.items()
    for n in names.split()
}
# no-break, thin and narrow no-break spaces, as typeset numbers have them
_SPACES = "[\u00a0\u2009\u202f]"
_NUMBER = re.compile(
    r"(?P<sign>[-+−–]|minus )? ?"
    r"(?:(?P<whole>[0-9]+) (?:i |and )?(?P<top>[0-9]{1,2}) ?/ ?(?P<bottom>[0-9]{1,3})(?![0-9.,])"
    r"|(?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+)(?![0-9.,])"
    r"|(?P<plain>[0-9]{1,3}(?: [0-9]{3})+(?:[.,][0-9]+)?(?![0-9])|[0-9]+(?:[.,][0-9]+)*))"
)
# 1.250; 1.250.000,5
_GROUPED = re.compile(r"[1-9][0-9]{0,2}([.,])[0-9]{3}(?:\1[0-9]{3})*(?:(?!\1)[.,][0-9]+)?")
# and what may stand before the next number
_UNIT = re.compile(r" ?([^0-9\s,;()/+−–-]*)(?:,? (?:i |and )?|$)")
_TIME = re.compile(
    r"(?:o |at |godz\.? ?|godzina |o godzinie )?([0-9]{1,2})[:.]([0-9]{2})(?: ?([ap])\.?m\.?)?",
    re.I,
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")  # fractions of one character
_LATEX = re.compile(r"([0-9]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")


@dataclass(frozen=True)
class Quantity:
    """`amount` in the smallest unit of its kind, "mass": mg; "": none; "clock": minutes. `given`:
    as written.
    """

    amount: Fraction
    kind: str = ""
    given: Fraction | None = None  # None: of more than one part, "1 kg 20 dag"


Value = Quantity | tuple[str, ...]  # the words of a list of names, in lower case


def clean(text: str) -> str | None:
    """One line without markup and doubled spaces; None where it is too long or holds characters one
    cannot see.
    """
    if len(text) > TEXT_LIMIT:
        return None
    text = re.sub(_SPACES, " ", unicodedata.normalize("NFC", text))
    if any(
        unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp") and c != "\t"
        for c in text
    ):
        return None
    for wrapped in (r"\text{", r"\mathrm{", r"\textbf{"):
        while (at := text.find(wrapped)) >= 0 and (end := text.find("}", at)) >= 0:
            text = f"{text[:at]} {text[at + len(wrapped) : end]}{text[end + 1 :]}"
    text = _LATEX.sub(lambda m: f"{m[1]} {m[2]}/{m[3]}", text)
    for mark in ("**", "__", "`", r"\(", r"\)", r"\,", r"\ ", "~"):
        text = text.replace(mark, " " if mark in (r"\,", r"\ ", "~") else "")
    text = text.replace(r"\%", "%")
    if len(text) > 1 and text.count("$") == 2:
        text = text.replace("$", "")
    return re.sub(r"\s+", " ", text).strip().strip("*_").strip()


def _fraction(m: re.Match[str], language: Language | None) -> Fraction | None:
    """An exact number: "−3/4", "2 1/2", "1 250,5" (pl), "1,250.5" (en); None where it is none.
    language decides what one comma or point before three digits is: in Polish a comma is decimal
    and "1.250" is refused, since both readings occur; in English a comma groups. None: refused
    wherever the two would differ.
    """
    if sum(c.isdigit() for c in m[0]) > DIGIT_LIMIT:
        return None
    sign = -1 if (m["sign"] or "+").strip() in ("-", "−", "–", "minus") else 1
    if m["plain"]:
        plain = _decimal(m["plain"], language)
        return None if plain is None else sign * Fraction(plain)
    top, bottom = (m["top"], m["bottom"]) if m["whole"] else (m["over"], m["under"])
    # "1 250/500" could be 1250/500
    if int(bottom) == 0 or (m["whole"] and int(top) >= int(bottom)):
        return None
    return sign * (int(m["whole"] or 0) + Fraction(int(top), int(bottom)))


def _decimal(text: str, language: Language | None) -> str | None:
    """Digits with at most one point, or None where separators make no number or more than one."""
    spaced = " " in text
    text = text.replace(" ", "")
    one_mark = re.fullmatch(r"[0-9]+(?:[.,][0-9]+)?", text)
    grouped = _GROUPED.fullmatch(text)
    if grouped is None or spaced:
        return text.replace(",", ".") if one_mark else None
    if one_mark and grouped[1] == {"pl": ",", "en": "."}.get(language or ""):
        return text.replace(",", ".")
    if one_mark and (language, grouped[1]) != ("en", ","):
        return None
    return text.replace(grouped[1], "").replace(",", ".")


def quantity(text: str, language: Language | None) -> Quantity | None:
    """A number with or without a unit ("0,45 kg", "$5", "1 h 20 min"); all of `text`, or None."""
    text = re.sub(r"^(?:[a-zA-Z] ?)?= ?", "", text)
    if text[:1] in ("$", "€") and len(text) > 1:
        text = f"{text[1:].strip()} {text[0]}"
    # factor and quantity of every number with its unit
    parts = list[tuple[int, Quantity]]()
    at = 0
    while at < len(text):
        if not (match := _NUMBER.match(text, at)) or (amount := _fraction(match, language)) is None:
            return None
        rest = _UNIT.match(text, match.end())
        if rest is None or (rest[1] and rest[1].lower() not in _UNITS):
            return None
        kind, factor = _UNITS[rest[1].lower()] if rest[1] else ("", 1)
        parts.append((factor, Quantity(amount * factor, kind, amount)))
        at = rest.end()
    if len(parts) < 2:
        return parts[0][1] if parts else None
    *first, (_, last) = parts
    falling = all(a > b for (a, _), (b, _) in pairwise(parts))
    whole = all(q.amount >= 0 and (q.given or Fraction(0)).denominator == 1 for _, q in first)
    if (
        {q.kind for _, q in first} != {last.kind}
        or not last.kind
        or not falling
        or not whole
        or last.amount < 0
    ):
        return None
    return Quantity(sum((q.amount for _, q in parts), Fraction(0)), last.kind)


def clock(text: str) -> Quantity | None:
    """A time of day that is all of `text`: "14:35", "godz. 14.35", "2:35 pm"."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hours = int(match[1])
    minutes = int(match[2])
    half = (match[3] or "").lower()
    if minutes > 59 or hours > (12 if half else 23) or (half and hours == 0):
        return None
    if half:
        hours = hours % 12 + 12 * (half == "p")
    return Quantity(Fraction(60 * hours + minutes), "clock")


def names(text: str) -> tuple[str, ...] | None:
    """Words that are all of `text`, apart from what stands between items of a list: "Ala, Ola i
    Ewa".
    """
    words = re.sub(r" ?(?:,|;|>|→|->) ?(?:(?:i|and) )?| (?:i|and|oraz) ", ",", text).split(",")
    alike = all(re.fullmatch(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", word) for word in words)
    return tuple(word.lower() for word in words) if alike else None


def value(text: str, language: Language | None, like: Value | None = None) -> Value | None:
    """A right answer's value as a data set writes it; or an answer's, read as what `like` is. None
    where it is none.
    """
    line = clean(text) or ""
    # a closing full stop
    line = line[:-1].rstrip() if line.endswith(".") and not line.endswith("..") else line
    line = _VULGAR.sub(
        lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), line
    ).strip()
    if like is None:
        return (
            clock(line)
            if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", line)
            else quantity(line, language) or names(line)
        )
    if isinstance(like, tuple):
        return names(line)
    return clock(line) if like.kind == "clock" else quantity(line, language)


def same(answer: Value, right: Value) -> bool:
    """Whether an answer is the right one: exactly, with units converted. An answer without a unit
    counts in the unit in which the right one is written; a percentage answers a question for a
    number; no other unit where none belongs.
    """
    if isinstance(answer, tuple) or isinstance(right, tuple):
        return answer == right
    if answer.kind == right.kind:
        return answer.amount == right.amount
    if not answer.kind:
        return right.given is not None and answer.amount == right.given
    return not right.kind and answer.kind == "percent" and answer.amount / 100 == right.amount
