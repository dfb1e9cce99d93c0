"""Axes, lines, bars and words as SVG text, for figures.py. Knows no run and no HTML.

Written here rather than drawn by matplotlib: that and what it needs take 100 MB and were missing
from a plain install, while the pages have four simple kinds of chart. Colours are CSS variables,
which templates/chart.css sets for light and dark pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np

LETTER = 12  # font size, in units of the picture
LETTER_WIDTH = 0.58 * LETTER  # of an average letter of the system's fonts
ROW = 17  # height of a line of words
TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
MARKERS = {
    "circle": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
    "triangle": "M0 -4.5L4.2 3.2H-4.2Z",
    "diamond": "M0 -4.8L4.8 0L0 4.8L-4.8 0Z",
    "square": "M-3.4 -3.4H3.4V3.4H-3.4Z",
}


def width_of(text: str) -> float:
    """About how wide a text is."""
    return len(text) * LETTER_WIDTH


def shortened(text: str, width: float) -> str:
    """The text, cut off with '…' where it would be wider than `width`."""
    letters = max(1, int(width / LETTER_WIDTH))
    if len(text) <= letters:
        return text
    return text[: letters - 1] + "…"


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from low to high. whole: integers only."""
    span = high - low
    if not span > 0:
        return [low]
    wanted = span / count
    power = 10.0 ** math.floor(math.log10(wanted))
    steps = [power * factor for factor in TICK_STEPS]
    step = min(steps, key=lambda step: abs(math.log(wanted / step)))
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as tell them apart."""
    for digits in range(8):
        texts = [f"{value:,.{digits}f}" for value in values]
        shown = [float(text.replace(",", "")) for text in texts]
        if np.allclose(shown, values, rtol=1e-6, atol=1e-12):
            return texts
    return [f"{value:.3g}" for value in values]


@dataclass(frozen=True)
class Scale:
    """Values from low to high on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        length = self.end - self.start
        share = (value - self.low) / span
        return self.start + share * length


def padded(low: float, high: float) -> tuple[float, float]:
    """The range with a little room on either side; a range of one value gets some width."""
    if not high > low:
        room = abs(high) * 0.1 or 1.0
    else:
        room = 0.05 * (high - low)
    return low - room, high + room


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def words(text: str, x: float, y: float, *, anchor: str = "start", kind: str = "") -> str:
    """A text at (x, y): its baseline. anchor: start, middle or end."""
    css = ""
    if kind:
        css = f' class="{kind}"'
    place = f'x="{number(x)}" y="{number(y)}"'
    side = f'text-anchor="{anchor}"'
    return f"<text{css} {place} {side}>{escape(text)}</text>"


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return f'<path class="{kind}" d="M{steps}"/>'


def marker(shape: str, x: float, y: float, kind: str) -> str:
    """A filled sign of MARKERS at (x, y)."""
    place = f"translate({number(x)} {number(y)})"
    return f'<path class="{kind}" transform="{place}" d="{MARKERS[shape]}"/>'


def rectangle(x: float, y: float, width: float, height: float, *, kind: str) -> str:
    """A filled box whose upper left corner is (x, y)."""
    place = f'x="{number(x)}" y="{number(y)}"'
    size = f'width="{number(width)}" height="{number(height)}"'
    return f'<rect class="{kind}" {place} {size}/>'


@dataclass
class Legend:
    """Rows of (sign, name) above a panel, as many rows as the names need."""

    names: Sequence[str]
    kinds: Sequence[str]  # CSS classes of the signs
    shapes: Sequence[str]  # of MARKERS
    left: float
    right: float
    rows: int = field(init=False, default=1)
    _places: list[tuple[float, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        room = self.right - self.left - 20
        self.names = [shortened(name, room) for name in self.names]
        x = self.left
        for name in self.names:
            width = 26 + width_of(name)
            fits = x + width <= self.right + 10
            if x > self.left and not fits:
                x = self.left
                self.rows += 1
            self._places.append((x, self.rows - 1))
            x += width

    def drawn(self, top: float) -> list[str]:
        """SVG elements; `top` is the upper edge of the first row."""
        parts = []
        signs = zip(
            self.names,
            self.kinds,
            self.shapes,
            self._places,
            strict=True,
        )
        for name, kind, shape, (x, row) in signs:
            y = top + row * ROW
            sign = marker(
                shape,
                x + 5,
                y + 9,
                kind,
            )
            text = words(
                name,
                x + 14,
                y + 13,
            )
            parts += [sign, text]
        return parts
