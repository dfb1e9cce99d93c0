"""Personal data in text: e-mail addresses, telephone numbers, PESEL and NIP, replaced and counted.

A rule, not a guarantee: names and addresses of houses are not looked for. PESEL and NIP must pass their checksums, so
that other numbers stay; a telephone number must be written as one: with +, in groups, with a Polish prefix."""

import re
from collections import Counter
from collections.abc import Callable

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
PESEL = re.compile(r"(?<![\d-])\d{11}(?![\d-])")
NIP = re.compile(r"(?<![\d-])(?:PL ?)?(?:\d{10}|\d{3}-\d{3}-\d{2}-\d{2}|\d{3}-\d{2}-\d{2}-\d{3})(?![\d-])")
# Abroad: + and 7 to 14 digits. Poland: perhaps +48, then 3-3-3 of a mobile or 2-3-2-2 of a landline, in groups.
MOBILE = r"(?:45|5[0137]|6[069]|7[2389]|88)\d[ -]\d{3}[ -]\d{3}"
LANDLINE = (
    r"\(?(?:1[2-8]|2[2-59]|3[234]|4[1-468]|5[24-689]|6[1-3578]|7[14-7]|8[1-79]|9[145])\)?[ -]\d{3}[ -]\d{2}[ -]\d{2}"
)
PHONE = re.compile(rf"(?<![\d+-])(?:(?:\+|00)\d(?:[ -]?\(?\d\)?){{7,13}}|{MOBILE}|{LANDLINE})(?![\d-])")


def is_pesel(text: str) -> bool:
    """Whether 11 digits are a PESEL: the checksum fits, and the first six are a day of the calendar, roughly."""
    total = sum(w * int(d) for w, d in zip((1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), text, strict=True))
    return total % 10 == 0 and 1 <= int(text[2:4]) % 20 <= 12 and 1 <= int(text[4:6]) <= 31


def is_nip(text: str) -> bool:
    """Whether ten digits, hyphens and PL allowed, are a NIP: the checksum fits."""
    digits = [int(c) for c in text if c.isdigit()]
    total = sum(w * d for w, d in zip((6, 5, 7, 2, 3, 4, 5, 6, 7), digits, strict=False))
    return any(digits) and total % 11 == digits[9]


KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "e-mail": (EMAIL, bool),
    "PESEL": (PESEL, is_pesel),
    "NIP": (NIP, is_nip),
    "telephone": (PHONE, bool),
}


def scrub(text: str, removed: Counter[str]) -> str:
    """`text` with "[e-mail]", "[PESEL]" and so on in their places; `removed` counts them by kind."""
    for kind, (pattern, valid) in KINDS.items():
        for match in reversed([m for m in pattern.finditer(text) if valid(m[0])]):
            text = f"{text[: match.start()]}[{kind}]{text[match.end() :]}"
            removed[kind] += 1
    return text
