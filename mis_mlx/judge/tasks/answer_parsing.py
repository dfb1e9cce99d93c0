"""Read a value out of a short text: an exact number with its unit, a time of day, or names.

In Polish and English. A text that holds more than one value, or anything else, has no value:
"5 or 7", "not 5", "about 5", digits of other alphabets, invisible characters, a comma with two
readings. Digits are counted before they are converted; nothing is evaluated.
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


def _read_units() -> dict[str, tuple[str, int]]:
    """{name of a unit: (its kind, its factor to the smallest unit of that kind)}."""
    path = Path(__file__).parent / "units.json"
    units = {}
    for kind, factors in json.loads(path.read_text("utf-8")).items():
        for factor, names in factors.items():
            for name in names.split():
                units[name] = (kind, int(factor))
    return units


_UNITS = _read_units()
# no-break, thin and narrow no-break spaces, as typeset numbers have them
_SPACES = "[\u00a0\u2009\u202f]"
_INVISIBLE = ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp")  # categories of Unicode; a tab is allowed
_NUMBER = re.compile(
    r"(?P<sign>[-+−–]|minus )? ?"
    r"(?:(?P<whole>[0-9]+) (?:i |and )?(?P<top>[0-9]{1,2}) ?/ ?(?P<bottom>[0-9]{1,3})(?![0-9.,])"
    r"|(?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+)(?![0-9.,])"
    r"|(?P<plain>[0-9]{1,3}(?: [0-9]{3})+(?:[.,][0-9]+)?(?![0-9])|[0-9]+(?:[.,][0-9]+)*))"
)
# 1.250; 1.250.000,5
_GROUPED = re.compile(r"[1-9][0-9]{0,2}([.,])[0-9]{3}(?:\1[0-9]{3})*(?:(?!\1)[.,][0-9]+)?")
# a unit, and what may stand between it and the next number
_UNIT = re.compile(r" ?([^0-9\s,;()/+−–-]*)(?:,? (?:i |and )?|$)")
_TIME = re.compile(
    r"(?:o |at |godz\.? ?|godzina |o godzinie )?([0-9]{1,2})[:.]([0-9]{2})(?: ?([ap])\.?m\.?)?",
    re.I,
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")  # fractions of one character
_LATEX = re.compile(r"([0-9]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    amount: in the smallest unit of its kind. kind: "mass" (amount in mg), "clock" (minutes), "" (no
    unit) and so on. given: the number as written; None where it has several parts ("1 kg 20 dag").
    """

    amount: Fraction
    kind: str = ""
    given: Fraction | None = None


Value = Quantity | tuple[str, ...]  # a quantity, or the lower-case words of a list of names


def clean(text: str) -> str | None:
    """One line without markup and doubled spaces.

    None where it is too long or holds invisible characters.
    """
    if len(text) > TEXT_LIMIT:
        return None
    text = unicodedata.normalize("NFC", text)
    text = re.sub(_SPACES, " ", text)
    for character in text:
        if unicodedata.category(character) in _INVISIBLE and character != "\t":
            return None
    for opening in (r"\text{", r"\mathrm{", r"\textbf{"):
        text = _unwrapped(text, opening)
    text = _LATEX.sub(r"\1 \2/\3", text)
    for mark in ("**", "__", "`", r"\(", r"\)"):
        text = text.replace(mark, "")
    for space in (r"\,", r"\ ", "~"):
        text = text.replace(space, " ")
    text = text.replace(r"\%", "%")
    if len(text) > 1 and text.count("$") == 2:
        text = text.replace("$", "")
    text = re.sub(r"\s+", " ", text)
    return text.strip().strip("*_").strip()


def _unwrapped(text: str, opening: str) -> str:
    """The text with every LaTeX command `opening` ... } replaced by a space and its contents."""
    start = text.find(opening)
    while start >= 0:
        end = text.find("}", start)
        if end < 0:
            break
        contents = text[start + len(opening) : end]
        text = f"{text[:start]} {contents}{text[end + 1 :]}"
        start = text.find(opening)
    return text


def _fraction(match: re.Match[str], language: Language | None) -> Fraction | None:
    """The exact number of a `_NUMBER`: "−3/4", "2 1/2", "1 250,5" (pl), "1,250.5" (en).

    language decides what one comma or point before three digits is. In Polish a comma is decimal
    and "1.250" is refused, since both readings occur; in English a comma groups. None: refused
    wherever the two would differ. The result is None where there is no number.
    """
    digits = sum(character.isdigit() for character in match[0])
    if digits > DIGIT_LIMIT:
        return None
    size = _unsigned(match, language)
    if size is None:
        return None
    sign = (match["sign"] or "+").strip()
    if sign in ("-", "−", "–", "minus"):
        return -size
    return size


def _unsigned(match: re.Match[str], language: Language | None) -> Fraction | None:
    """The number without its sign."""
    if match["plain"]:
        plain = _decimal(match["plain"], language)
        return None if plain is None else Fraction(plain)
    if not match["whole"]:
        top = int(match["over"])
        bottom = int(match["under"])
        return Fraction(top, bottom) if bottom else None
    top = int(match["top"])
    bottom = int(match["bottom"])
    # "1 250/500" could be 1250/500, so a mixed number needs a proper fraction.
    if bottom == 0 or top >= bottom:
        return None
    return int(match["whole"]) + Fraction(top, bottom)


def _decimal(text: str, language: Language | None) -> str | None:
    """Digits with at most one point, or None where separators make no number or more than one."""
    spaced = " " in text
    text = text.replace(" ", "")
    one_mark = re.fullmatch(r"[0-9]+(?:[.,][0-9]+)?", text)
    grouped = _GROUPED.fullmatch(text)
    if grouped is None or spaced:
        return text.replace(",", ".") if one_mark else None
    decimal_marks = {"pl": ",", "en": "."}
    if one_mark and grouped[1] == decimal_marks.get(language or ""):
        return text.replace(",", ".")
    if one_mark and (language, grouped[1]) != ("en", ","):
        return None
    return text.replace(grouped[1], "").replace(",", ".")


def quantity(text: str, language: Language | None) -> Quantity | None:
    """A number with or without a unit ("0,45 kg", "$5", "1 h 20 min"); all of `text`, or None.

    Several parts make one quantity where they have units of one kind, from the largest down, and
    only the last is not a whole number.
    """
    text = re.sub(r"^(?:[a-zA-Z] ?)?= ?", "", text)
    if text[:1] in ("$", "€") and len(text) > 1:
        text = f"{text[1:].strip()} {text[0]}"
    parts = _parts(text, language)
    if not parts:
        return None
    *first, (_, last) = parts
    if not first:
        return last
    for _, part in first:
        given = part.given or Fraction(0)
        if part.kind != last.kind or part.amount < 0 or given.denominator != 1:
            return None
    falling = all(factor > following for (factor, _), (following, _) in pairwise(parts))
    if not last.kind or not falling or last.amount < 0:
        return None
    total = sum((part.amount for _, part in parts), Fraction(0))
    return Quantity(total, last.kind)


def _parts(text: str, language: Language | None) -> list[tuple[int, Quantity]]:
    """(factor of its unit, quantity) of every number in a text of nothing else; [] otherwise."""
    parts = []
    end = 0
    while end < len(text):
        match = _NUMBER.match(text, end)
        if match is None:
            return []
        number = _fraction(match, language)
        unit = _UNIT.match(text, match.end())
        if number is None or unit is None:
            return []
        name = unit[1].lower()
        kind = ""
        factor = 1
        if name:
            if name not in _UNITS:
                return []
            kind, factor = _UNITS[name]
        parts.append((factor, Quantity(number * factor, kind, given=number)))
        end = unit.end()
    return parts


def clock(text: str) -> Quantity | None:
    """A time of day that is all of `text`: "14:35", "godz. 14.35", "2:35 pm"."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    hours = int(match[1])
    minutes = int(match[2])
    half = (match[3] or "").lower()
    latest = 12 if half else 23
    if minutes > 59 or hours > latest or (half and hours == 0):
        return None
    if half:
        hours = hours % 12
    if half == "p":
        hours += 12
    return Quantity(Fraction(60 * hours + minutes), "clock")


def names(text: str) -> tuple[str, ...] | None:
    """The words of a list that is all of `text`, in lower case: "Ala, Ola i Ewa"."""
    separator = r" ?(?:,|;|>|→|->) ?(?:(?:i|and) )?| (?:i|and|oraz) "
    words = re.sub(separator, ",", text).split(",")
    for word in words:
        if not re.fullmatch(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", word):
            return None
    return tuple(word.lower() for word in words)


def value(text: str, language: Language | None, like: Value | None = None) -> Value | None:
    """The value of a text; None where it has none.

    like: a right answer's value; the text is read as the same kind of value. None: the text is a
    right answer itself, as a data set writes it.
    """
    line = clean(text) or ""
    if line.endswith(".") and not line.endswith(".."):
        line = line[:-1].rstrip()
    line = _VULGAR.sub(_spelled_out, line).strip()
    if like is None:
        if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", line):
            return clock(line)
        return quantity(line, language) or names(line)
    if isinstance(like, tuple):
        return names(line)
    if like.kind == "clock":
        return clock(line)
    return quantity(line, language)


def _spelled_out(match: re.Match[str]) -> str:
    """A fraction of one character as digits with a slash: "½" is " 1/2"."""
    return " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")


def same(answer: Value, right: Value) -> bool:
    """Whether an answer is the right one: exactly, with units converted.

    An answer without a unit counts in the unit of the right one. A percentage answers a question
    for a number. No other unit is accepted where none belongs.
    """
    if isinstance(answer, tuple) or isinstance(right, tuple):
        return answer == right
    if answer.kind == right.kind:
        return answer.amount == right.amount
    if not answer.kind:
        return right.given is not None and answer.amount == right.given
    return not right.kind and answer.kind == "percent" and answer.amount / 100 == right.amount
