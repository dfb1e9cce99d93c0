"""Pictures as SVG inside HTML, by matplotlib, with size and text alternative. Knows no run."""

import io
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx.reporting import html, run_reader
from mis_mlx.types import MisError

# in a viewBox; letters of 11 in it are readable on a phone
WIDTH = 420
HEIGHT = 260
MUTED = "#5b6470"
# key, with which the ids in a picture begin, unique on the page; title; description
Caption = tuple[str, str, str]
Span = tuple[float, float]
Interval = tuple[float, float, float]  # value, low, high
Labels = tuple[str, str]  # of x and y
Lines = Mapping[str, Sequence[run_reader.Point]]  # by name
PACKAGE = "'matplotlib>=3.9,<4'"  # not among the package's own dependencies
COLORS = ("#1f6fb2", "#c2410c", "#2e7d4f", "#8b5cb8")


def need() -> None:
    """MisError when matplotlib is not there."""
    if find_spec("matplotlib") is None:
        remedy = f"{sys.executable} -m pip install {PACKAGE}"
        raise MisError(f"the report's pictures need matplotlib, which is not installed: {remedy}")


@contextmanager
def _figure(
    height: int = HEIGHT,
    rows: int = 1,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    style = Path(__file__).parent / "templates" / "page.mplstyle"
    with matplotlib.rc_context(fname=style), warnings.catch_warnings():
        # a letter that matplotlib's font lacks: the browser's has it
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        yield figure, figure.subplots(rows, 1, sharex=True, **options)


def _html(figure: Any, caption: Caption) -> str:
    key, title, description = caption
    raw = io.BytesIO()
    figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    svg = raw.getvalue().decode()
    svg = re.sub(r"^.*?<svg\b[^>]*>|</svg>\s*$", "", svg, flags=re.DOTALL)
    for tag in ("metadata", "style"):  # a style element would hold for the whole page
        svg = re.sub(rf"<{tag}\b.*?</{tag}>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    svg = re.sub(r"font: (?:[a-z0-9]+ )*?([0-9.]+px) [^;\"]*", r"font-size: \1", svg)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return html.part(
        "picture",
        key=key,
        title=title,
        description=description,
        width=width,
        height=height,
        inside=svg,
    )


def _time_unit(longest_s: float) -> tuple[float, str]:
    """(seconds of a unit, its name) for an axis of this length."""
    if longest_s > 3 * 3600:
        return 3600.0, "hours"
    if longest_s > 3 * 60:
        return 60.0, "minutes"
    return 1.0, "seconds"


def over_time(
    caption: Caption,
    panels: Mapping[str, Lines],
    shaded: Sequence[Span] = (),
) -> str:
    """Panels above each other on one time axis: {axis label: {line: [(seconds, value)]}}.

    shaded: (start, end) of stretches of time, in seconds.
    """
    more = len(panels) - 1
    height = HEIGHT + 110 * more
    ratios = [2, *[1] * more]
    ends = []
    for lines in panels.values():
        ends += [points[-1][0] for points in lines.values() if points]
    longest_s = max(ends, default=0)
    unit, name = _time_unit(longest_s)
    with _figure(height, 1 + more, squeeze=False, height_ratios=ratios) as (figure, axes):
        for (label, lines), axis in zip(panels.items(), axes[:, 0], strict=True):
            axis.set_ylabel(label)
            _draw_lines(axis, lines, unit)
            for start, end in shaded:
                visible_end = max(end, start + longest_s / 300)
                axis.axvspan(
                    start / unit,
                    visible_end / unit,
                    color=COLORS[3],
                    alpha=0.25,
                )
        axes[-1, 0].set_xlabel(f"{name} since the run began")
        return _html(figure, caption)


def _draw_lines(axis: Any, lines: Lines, unit: float) -> None:
    for color, (line, points) in zip(cycle(COLORS), lines.items(), strict=False):
        if points:
            x, y = np.array(points).T
            marker = "o" if len(x) < 3 else None
            axis.plot(
                x / unit,
                y,
                color=color,
                label=line,
                linewidth=1.4,
                marker=marker,
            )
    if len(lines) > 1:
        axis.legend()


def intervals(
    caption: Caption,
    label: str,
    rows: Mapping[str, Sequence[Interval | None]],
    names: Sequence[str],
    *,
    limits: Mapping[str, float],
) -> str:
    """A point with its interval (value, low, high), as shares, for each row and name.

    limits: {label: share} of lines across.
    """
    height_of_row = 16 * len(names) + 12
    height = 90 + height_of_row * len(rows)
    with _figure(height) as (figure, axes):
        places = np.arange(len(rows))[::-1]
        for i, (name, color) in enumerate(zip(names, cycle(COLORS), strict=False)):
            known = []
            for place, cells in zip(places, rows.values(), strict=True):
                cell = cells[i]
                if cell:
                    known.append((place, *cell))
            y, value, low, high = np.array(known, np.float64).T
            y += 0.35 - 0.7 * (i + 0.5) / len(names)
            axes.errorbar(
                value,
                y,
                xerr=[value - low, high - value],
                fmt="o",
                color=color,
                label=name,
                markersize=4,
            )
        for text, share in limits.items():
            axes.axvline(share, color=MUTED, linestyle="--" if share else ":", label=text)
        axes.set_yticks(places, list(rows))
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=3)
        return _html(figure, caption)


def standalone(picture: str) -> str:
    """A picture as an SVG file of its own, on white."""
    end = "</svg>"
    start = picture.index("<svg")
    svg = picture[start : picture.index(end) + len(end)]
    head, rest = svg.split(">", 1)
    return f'{head} font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>{rest}\n'


def columns(
    caption: Caption,
    labels: Labels,
    groups: Mapping[str, Mapping[int, float]],
) -> str:
    """Standing bars at whole numbers, one colour a group: {group: {number: height}}.

    labels: of x and y.
    """
    with _figure(220) as (figure, axes):
        for color, (name, values) in zip(cycle(COLORS), groups.items(), strict=False):
            axes.bar(list(values), list(values.values()), color=color, label=name)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper center", ncols=3)
        return _html(figure, caption)


def curves(
    caption: Caption,
    labels: Labels,
    groups: Mapping[str, Sequence[run_reader.Point]],
) -> str:
    """Points (x, y), joined in the order of x, one colour a group: {group: points}.

    labels: of x and y.
    """
    with _figure() as (figure, axes):
        styles = zip(cycle(COLORS), cycle("o^Ds"), groups.items(), strict=False)
        for color, marker, (name, points) in styles:
            x, y = np.array(sorted(points)).T
            axes.plot(
                x,
                y,
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                label=name,
            )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_ylim(bottom=min(0.0, *axes.get_ylim()))
        figure.legend(loc="outside upper center", ncols=2)
        return _html(figure, caption)
