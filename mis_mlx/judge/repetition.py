"""Whether a text repeats itself.

Models that are cut too far, or asked in a language that they hardly know, say the same words again
and again. The usual sign, that a compressor makes little of a text, misses what has no blanks to
count words by, and loops that begin late. So there are four signs, and one is enough:

- the whole text, of more than LOOP_WORDS words, packs to less than LOOP_SHARE of its bytes;
- its second half does, to less than HALF_SHARE: then words are not counted;
- the text ends in a unit that comes several times in a row, numbers apart;
- most runs of NGRAM words in its second half have come there before.

The limits are such that Python's manual, this program's code and pages, and tables and lists are
not found by the last three signs unless by the first one (tests/judge/test_repetition.py).
"""

import re
import zlib

VERSION = 2  # of what counts as a loop: shares of loops by another version do not compare
LOOP_WORDS = 20
LOOP_SHARE = 0.35
HALF_SHARE = 0.22
HALF_BYTES = 80  # of a half, at least: zlib itself takes a dozen
RULER = re.compile(r"([-=_*~#+])\1{3,}")  # of tables and headings: a sign of order
# Of the end that repeats a unit: bytes, and how often the unit comes there; a long end needs fewer.
END_BYTES = 60
END_TIMES = 4
LONG_END_BYTES = 120
LONG_END_TIMES = 3
END_CHARACTERS = 2000  # are searched for it
ANCHOR = 8  # last characters: where they stand before, a unit may end
NUMBERED_WORDS = 4  # of a unit that differs by its numbers alone: shorter ones are lists and tables
NGRAM = 4
NGRAMS = 12  # in a half, at least
NGRAM_SHARE = 0.6


def loops(text: str) -> bool:
    """Whether a text repeats itself, by any of the signs."""
    raw = text.encode()
    if len(text.split()) > LOOP_WORDS and _packed(raw) < LOOP_SHARE:
        return True
    words = RULER.sub(r"\1\1\1", text).split()
    plain = " ".join(words)
    raw = plain.encode()
    half = raw[len(raw) // 2 :]
    if len(half) >= HALF_BYTES and _packed(half) < HALF_SHARE:
        return True
    middle = len(words) // 2
    return _ends_in_units(plain) or _repeats_words(words[middle:])


def _packed(raw: bytes) -> float:
    """The share of its bytes that zlib packs a text to."""
    return len(zlib.compress(raw)) / len(raw)


def _repeats_words(words: list[str]) -> bool:
    """Whether most runs of NGRAM words are repeats."""
    count = len(words) - NGRAM + 1
    if count < NGRAMS:
        return False
    runs = set[tuple[str, ...]]()
    for start in range(count):
        run = words[start : start + NGRAM]
        runs.add(tuple(run))
    repeats = count - len(runs)
    return repeats > NGRAM_SHARE * count


def _ends_in_units(text: str) -> bool:
    """Whether a text ends in a unit several times in a row, numbers apart."""
    if _repeats_end(text[-END_CHARACTERS:], words=0):
        return True
    unnumbered = re.sub(r"\d+", "0", text)
    return _repeats_end(unnumbered[-END_CHARACTERS:], words=NUMBERED_WORDS)


def _repeats_end(text: str, words: int) -> bool:
    """Whether a text ends in a unit several times in a row. words: that such a unit has, at least.

    A unit without a letter is none: it is a ruler, or a row of zeros.
    """
    anchor = text[-ANCHOR:]
    last = len(text) - ANCHOR
    place = last
    while place > 0:
        # Where the anchor stands the next time, going back.
        place = text.rfind(anchor, 0, place + ANCHOR - 1)
        period = last - place
        if place < 0 or LONG_END_TIMES * period > len(text):
            return False
        if _is_unit(text[-period:], words) and _is_long(_periodic_end(text, period), period):
            return True
    return False


def _is_unit(unit: str, words: int) -> bool:
    """Whether a unit has a letter, and so many words."""
    found = re.findall(r"[^\W\d]{2,}", unit)
    if len(found) < words:
        return False
    return any(character.isalpha() for character in unit)


def _is_long(end: str, period: int) -> bool:
    """Whether an end that repeats with this period, in characters, is long enough for a loop."""
    nbytes = len(end.encode())
    times = len(end) / period
    if nbytes >= LONG_END_BYTES:
        return times >= LONG_END_TIMES
    return nbytes >= END_BYTES and times >= END_TIMES


def _periodic_end(text: str, period: int) -> str:
    """The end of a text that repeats with this period, the first unit included."""
    length = period
    while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
        length += 1
    return text[-length:]
