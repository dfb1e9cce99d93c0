"""Lines as SVG inside HTML. Knows no run.

Drawn here: matplotlib and what it needs take 100 MB, and the page of a run has one simple kind of
chart. Colours are CSS variables, which templates/chart.css sets for light and dark pages.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from xml.sax.saxutils import escape

import numpy as np

from mis_mlx.reporting import html

# In a viewBox: letters of 12 in it are readable on a phone.
WIDTH = 420
LEFT = 64  # numbers of eight digits stand beside it
RIGHT = WIDTH - 8
TOP = 40  # the name of y and the legend stand above it
BOTTOM = 220
COLORS = 2  # in templates/chart.css
TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
Point = tuple[float, float]
Caption = tuple[str, str, str]  # id on the page, title, description
Labels = tuple[str, str]  # of x and y


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    span = high - low
    if not span > 0:
        return [low]
    wanted = span / count
    power = 10.0 ** math.floor(math.log10(wanted))
    steps = [power * factor for factor in TICK_STEPS]
    step = min(steps, key=lambda step: abs(math.log(wanted / step)))
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


class _Panel:
    """Axes with their names, numbers and legend, and what is drawn between them.

    x, y: (low, high) of the values; a range of one value gets some width.
    """

    def __init__(self, labels: Labels, names: Sequence[str], x: Point, y: Point) -> None:
        self.x = x if x[1] > x[0] else (x[0] - 1, x[0] + 1)
        self.y = y if y[1] > y[0] else (y[0] - 1, y[0] + 1)
        self.parts = [_words(labels[1], 0, 13), _words(labels[0], RIGHT, BOTTOM + 34, "end")]
        place = LEFT
        for number, name in enumerate(names):
            self.parts.append(f'<path class="line {_color(number)}" d="M{place} 26h12"/>')
            self.parts.append(_words(name, place + 16, 30))
            place += 30 + 7 * len(name)
        y_ticks = ticks(*self.y, 5)
        for value, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
            _, height = self.at(self.x[0], value)
            self.parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>')
            self.parts.append(_words(text, LEFT - 6, height + 4, "end"))
        self.parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
        # Steps and minutes: whole numbers.
        x_ticks = [value for value in ticks(*self.x, 6) if abs(value - round(value)) < 1e-9]
        for value, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
            across, _ = self.at(value, self.y[0])
            self.parts.append(_words(text, across, BOTTOM + 17, "middle"))

    def at(self, x: float, y: float) -> Point:
        """The place of a value, in units of the picture."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    def as_html(self, caption: Caption) -> str:
        """The panel with its title and description."""
        key, title, description = caption
        return html.part(
            "picture",
            key=key,
            title=title,
            description=description,
            width=WIDTH,
            height=BOTTOM + 40,
            inside="\n".join(self.parts),
        )


def _words(text: str, x: float, y: float, anchor: str = "start") -> str:
    """A text at (x, y): its baseline. anchor: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _color(number: int) -> str:
    """The CSS class of the number-th line."""
    return f"k{number % COLORS}"


def lines(caption: Caption, labels: Labels, groups: Mapping[str, Sequence[Point]]) -> str:
    """A line through the points (x, y) of each group, with a dot at each: {group: points}."""
    points = list(chain.from_iterable(groups.values()))
    across = [x for x, _ in points]
    up = [y for _, y in points]
    room = 0.05 * (max(up) - min(up))
    panel = _Panel(
        labels,
        list(groups),
        x=(min(across), max(across)),
        y=(min(up) - room, max(up) + room),
    )
    for number, group in enumerate(groups.values()):
        placed = [panel.at(x, y) for x, y in group]
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        panel.parts.append(f'<path class="line {_color(number)}" d="M{way}"/>')
        for x, y in placed:
            dot = f'<circle class="fill {_color(number)}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
            panel.parts.append(dot)
    return panel.as_html(caption)
