"""Charts as SVG inside HTML, with size, title and text alternative. Knows no run."""

from collections.abc import Mapping, Sequence
from itertools import chain, cycle

from mis_mlx.reporting import html, run_reader, svg
from mis_mlx.reporting.axes import (
    BELOW,
    PANEL_HEIGHT,
    RIGHT,
    SHAPES,
    WIDTH,
    Axes,
    Caption,
    Labels,
    as_html,
    charted,
    kind_of,
    left_of,
    legend_of,
    points_of,
    range_of,
    with_texts,
)
from mis_mlx.reporting.svg import ROW, Scale

COLUMN_HEIGHT = 150
INTERVAL_HEIGHT = 16
Interval = tuple[float, float, float]  # value, low, high


def intervals(
    caption: Caption,
    label: str,
    rows: Mapping[str, Sequence[Interval | None]],
    names: Sequence[str],
    limits: Mapping[str, float],
) -> str:
    """A point with its interval (value, low, high), as shares, for each row and name.

    limits: {label: share} of lines across.
    """
    row_height = INTERVAL_HEIGHT * len(names) + 12
    texts = [svg.shortened(row, WIDTH / 3) for row in rows]
    left = 12 + max(map(svg.width_of, texts))
    legend = legend_of(
        names,
        0,
    )
    top = legend.rows * ROW + ROW + 6
    bottom = top + row_height * len(rows)
    ends = list(limits.values())
    for cell in chain.from_iterable(rows.values()):
        if cell:
            ends += cell
    low, high = svg.padded(min(ends), max(ends))
    x = Scale(low, high, left, RIGHT)
    axes = Axes(x, Scale(0, 1, bottom, top))
    shares = with_texts(svg.ticks(100 * low, 100 * high, 5), "%")
    axes.draw_base([(share / 100, text) for share, text in shares])
    _draw_limits(axes, limits)
    middle = top + row_height / 2
    for text, cells in zip(texts, rows.values(), strict=True):
        axes.parts.append(
            svg.words(
                text,
                left - 6,
                middle + 4,
                anchor="end",
            )
        )
        height = middle - INTERVAL_HEIGHT * (len(cells) - 1) / 2
        for number, cell in enumerate(cells):
            _draw_interval(axes, cell, height, number)
            height += INTERVAL_HEIGHT
        middle += row_height
    name = svg.words(
        label,
        RIGHT,
        bottom + 34,
        anchor="end",
    )
    parts = [*legend.drawn(0), *axes.parts, name]
    return as_html(
        parts,
        bottom + BELOW,
        caption,
    )


def _draw_limits(axes: Axes, limits: Mapping[str, float]) -> None:
    top = axes.y.end
    middle = (axes.x.start + axes.x.end) / 2
    for text, share in limits.items():
        place = axes.x(share)
        line = [(place, top - 2), (place, axes.y.start)]
        anchor = "start"
        if place > middle:
            anchor = "end"
        name = svg.words(
            text,
            place,
            top - 7,
            anchor=anchor,
            kind="soft",
        )
        axes.parts += [svg.path(line, "limit"), name]


def _draw_interval(axes: Axes, cell: Interval | None, height: float, number: int) -> None:
    if cell is None:
        return
    value, low, high = map(axes.x, cell)
    shape = SHAPES[number % len(SHAPES)]
    line = svg.path(
        [(low, height), (high, height)],
        kind_of(number, "line"),
    )
    sign = svg.marker(
        shape,
        value,
        height,
        kind_of(number, "fill"),
    )
    axes.parts += [line, sign]


def standalone(html_picture: str) -> str:
    """A picture as an SVG file of its own, light or dark as its reader's system."""
    end = "</svg>"
    start = html_picture.index("<svg")
    chart = html_picture[start : html_picture.index(end) + len(end)]
    head, rest = chart.split(">", 1)
    style = html.document("chart.css", {})
    dark = "@media (prefers-color-scheme:dark){.paper{fill:#14171b}}"
    paper = '<rect class="paper" width="100%" height="100%" fill="#fff"/>'
    return f"{head}><style>{style}{dark}</style>{paper}{rest}\n"


def columns(
    caption: Caption,
    labels: Labels,
    groups: Mapping[str, Mapping[int, float]],
) -> str:
    """Standing bars at whole numbers, one colour a group: {group: {number: height}}.

    labels: of x and y.
    """
    numbers = list(chain.from_iterable(groups.values()))
    heights = [0.0]
    for values in groups.values():
        heights += values.values()
    low = min(heights)
    high = max(heights) * 1.05 or 1.0
    y_ticks = with_texts(svg.ticks(low, high, 5))
    left = left_of(y_ticks)
    legend = legend_of(
        list(groups),
        left,
        shapes=SHAPES[:1],
    )
    top = ROW + 8 + legend.rows * ROW
    first = min(numbers)
    x = Scale(
        first - 0.6,
        max(numbers) + 0.6,
        left,
        RIGHT,
    )
    y = Scale(low, high, top + COLUMN_HEIGHT, top)
    axes = Axes(x, y)
    axes.draw_grid(y_ticks)
    places = svg.ticks(x.low, x.high, 6, whole=True)
    axes.draw_base(with_texts([place for place in places if place >= first]))
    width = 0.8 * (x(1) - x(0))
    for color, values in enumerate(groups.values()):
        kind = kind_of(color, "fill")
        for number, height in values.items():
            upper = axes.y(max(height, 0.0))
            size = abs(axes.y(height) - axes.y(0.0))
            bar = svg.rectangle(
                x(number) - width / 2,
                upper,
                width,
                size,
                kind=kind,
            )
            axes.parts.append(bar)
    return charted(axes, legend, labels, caption)


def curves(
    caption: Caption,
    labels: Labels,
    groups: Mapping[str, Sequence[run_reader.Point]],
) -> str:
    """Points (x, y), joined in the order of x, one colour and sign a group: {group: points}.

    labels: of x and y.
    """
    low, high = range_of(groups)
    low = min(0.0, low)
    places = [place for place, _ in points_of(groups)]
    first, last = svg.padded(min(places), max(places))
    y_ticks = with_texts(svg.ticks(low, high, 5))
    left = left_of(y_ticks)
    legend = legend_of(
        list(groups),
        left,
    )
    top = ROW + 8 + legend.rows * ROW
    x = Scale(
        first,
        last,
        left,
        RIGHT,
    )
    y = Scale(low, high, top + PANEL_HEIGHT, top)
    axes = Axes(x, y)
    axes.draw_grid(y_ticks)
    axes.draw_base(with_texts(svg.ticks(first, last, 6)))
    shapes = cycle(SHAPES)
    for color, points in enumerate(groups.values()):
        axes.draw_line(
            sorted(points),
            kind_of(color, "line"),
        )
        axes.draw_signs(
            points,
            next(shapes),
            kind_of(color, "fill"),
        )
    return charted(axes, legend, labels, caption)
