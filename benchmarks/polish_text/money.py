"""Złoty and grosze, in figures and in words."""

from __future__ import annotations

from .inflection import Count


class Money(int):
    """An amount in grosze: "12,50 zł", or "12 złotych i 50 groszy" under the format `słownie`."""

    def __format__(self, style: str) -> str:
        whole, rest = divmod(int(self), 100)
        if style == "słownie":
            return f"{Count(whole):złoty}" + (f" i {Count(rest):grosz}" if rest else "")
        return f"{whole},{rest:02d} zł" if rest else f"{whole} zł"
