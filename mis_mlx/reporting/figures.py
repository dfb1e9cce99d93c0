"""Charts as SVG inside HTML, with size, title and text alternative. Knows no run."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice

from mis_mlx.reporting import html, run_reader, svg
from mis_mlx.reporting.svg import ROW, Legend, Scale

# in a viewBox: letters of 12 in it are readable on a phone
WIDTH = 420
RIGHT = WIDTH - 8
PANEL_HEIGHT = 190
LOWER_PANEL_HEIGHT = 85
COLUMN_HEIGHT = 150
INTERVAL_HEIGHT = 16
BELOW = 40  # room for the numbers and the name of the axis of x
COLORS = 4  # in templates/chart.css
SHAPES = ("circle", "triangle", "diamond", "square")
# key, with which the ids in a picture begin, unique on the page; title; description
Caption = tuple[str, str, str]
Span = tuple[float, float]
Interval = tuple[float, float, float]  # value, low, high
Labels = tuple[str, str]  # of x and y
Lines = Mapping[str, Sequence[run_reader.Point]]  # by name
Ticks = Sequence[tuple[float, str]]  # values and their texts


@dataclass
class _Axes:
    """Both axes of one panel, and what is drawn in it."""

    x: Scale
    y: Scale
    parts: list[str] = field(default_factory=list)

    def draw_grid(self, y_ticks: Ticks) -> None:
        """A line across at each tick, its number to the left."""
        for value, text in y_ticks:
            height = self.y(value)
            ends = [(self.x.start, height), (self.x.end, height)]
            number = svg.words(
                text,
                self.x.start - 6,
                height + 4,
                anchor="end",
            )
            self.parts += [svg.path(ends, "grid"), number]

    def draw_base(self, x_ticks: Ticks) -> None:
        """The line below, with a mark at each tick and its number under it."""
        bottom = self.y.start
        ends = [(self.x.start, bottom), (self.x.end, bottom)]
        self.parts.append(
            svg.path(
                ends,
                "axis",
            )
        )
        for value, text in x_ticks:
            place = self.x(value)
            mark = [(place, bottom), (place, bottom + 4)]
            self.parts.append(
                svg.path(
                    mark,
                    "axis",
                )
            )
            if text:
                number = svg.words(
                    text,
                    place,
                    bottom + 17,
                    anchor="middle",
                )
                self.parts.append(number)

    def draw_line(self, points: Sequence[run_reader.Point], kind: str) -> None:
        """A line through values, if there are two."""
        if len(points) > 1:
            placed = [(self.x(x), self.y(y)) for x, y in points]
            self.parts.append(
                svg.path(
                    placed,
                    kind,
                )
            )

    def draw_signs(self, points: Iterable[run_reader.Point], shape: str, kind: str) -> None:
        """A sign at each value."""
        for x, y in points:
            sign = svg.marker(
                shape,
                self.x(x),
                self.y(y),
                kind,
            )
            self.parts.append(sign)


def _kind(number: int, role: str) -> str:
    """CSS classes of the number-th line or group."""
    return f"{role} k{number % COLORS}"


def _legend(
    names: Sequence[str],
    left: float,
    shapes: Sequence[str] = SHAPES,
    kinds: Sequence[str] = (),
) -> Legend:
    own_kinds = [_kind(number, "fill") for number in range(len(names))]
    return Legend(
        names,
        kinds=kinds or own_kinds,
        shapes=list(islice(cycle(shapes), len(names))),
        left=left,
        right=RIGHT,
    )


def _with_texts(values: Sequence[float], unit: str = "") -> Ticks:
    texts = [text + unit for text in svg.tick_texts(values)]
    return list(zip(values, texts, strict=True))


def _left_of(y_ticks: Ticks) -> float:
    """Where panels begin, right of these numbers."""
    widths = [svg.width_of(text) for _, text in y_ticks]
    return 12 + max(widths, default=0.0)


def _html(parts: Sequence[str], height: float, caption: Caption) -> str:
    key, title, description = caption
    return html.part(
        "picture",
        key=key,
        title=title,
        description=description,
        width=WIDTH,
        height=round(height),
        inside="\n".join(parts),
    )


def _charted(axes: _Axes, legend: Legend, labels: Labels, caption: Caption) -> str:
    """The picture of one panel, its axes named: y above, x below."""
    bottom = axes.y.start
    parts = [
        svg.words(labels[1], 0, 13, kind="soft"),
        *legend.drawn(ROW + 2),
        *axes.parts,
        svg.words(labels[0], RIGHT, bottom + 34, anchor="end"),
    ]
    return _html(
        parts,
        bottom + BELOW,
        caption,
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
    faint: Collection[str] = (),
) -> str:
    """Panels above each other on one time axis: {axis label: {line: [(seconds, value)]}}.

    shaded: (start, end) of stretches of time, in seconds. faint: names of lines that stay in the
    background, in the colour of the line after them.
    """
    points = list(chain.from_iterable(map(_points_of, panels.values())))
    seconds = [place for place, _ in points]
    first_s = min(seconds, default=0.0)
    last_s = max([*seconds, first_s + 1e-6])
    unit, unit_name = _time_unit(last_s)
    numbers = [_panel_ticks(lines) for lines in panels.values()]
    left = max(map(_left_of, numbers))
    x = Scale(
        first_s,
        last_s,
        left,
        RIGHT,
    )
    in_units = svg.ticks(first_s / unit, last_s / unit, 5)
    x_ticks = [(value * unit, text) for value, text in _with_texts(in_units)]
    without_texts = [(value, "") for value, _ in x_ticks]
    parts: list[str] = []
    top = 0.0
    height = PANEL_HEIGHT
    last_label = list(panels)[-1]
    for (label, lines), y_ticks in zip(panels.items(), numbers, strict=True):
        parts.append(
            svg.words(
                label,
                0,
                top + 13,
                kind="soft",
            )
        )
        top += ROW + 4
        if len(lines) > 1:
            legend = _legend_of_lines(lines, faint, left)
            parts += legend.drawn(top - 2)
            top += legend.rows * ROW
        low, high = _range_of(lines)
        y = Scale(low, high, top + height, top + 4)
        axes = _Axes(x, y)
        axes.draw_grid(y_ticks)
        axes.draw_base(x_ticks if label == last_label else without_texts)
        _shade(axes, shaded)
        _draw_lines(axes, lines, faint)
        parts += axes.parts
        top += height + 10
        height = LOWER_PANEL_HEIGHT
    name = f"{unit_name} since the run began"
    parts.append(
        svg.words(
            name,
            RIGHT,
            top + 22,
            anchor="end",
        )
    )
    return _html(
        parts,
        top + 28,
        caption,
    )


def _points_of(lines: Lines) -> Iterable[run_reader.Point]:
    return chain.from_iterable(lines.values())


def _range_of(lines: Lines) -> Span:
    values = [value for _, value in _points_of(lines)]
    return svg.padded(min(values, default=0.0), max(values, default=1.0))


def _panel_ticks(lines: Lines) -> Ticks:
    low, high = _range_of(lines)
    return _with_texts(svg.ticks(low, high, 4))


def _legend_of_lines(lines: Lines, faint: Collection[str], left: float) -> Legend:
    kinds = []
    color = 0
    for name in lines:
        if name in faint:
            kinds.append(_kind(color, "pale"))
        else:
            kinds.append(_kind(color, "fill"))
            color += 1
    return _legend(
        list(lines),
        left,
        shapes=SHAPES[:1],
        kinds=kinds,
    )


def _shade(axes: _Axes, spans: Sequence[Span]) -> None:
    height = axes.y.start - axes.y.end
    for start, end in spans:
        begin = axes.x(start)
        width = max(axes.x(end) - begin, 1.5)
        box = svg.rectangle(
            begin,
            axes.y.end,
            width,
            height,
            kind="shade",
        )
        axes.parts.append(box)


def _draw_lines(axes: _Axes, lines: Lines, faint: Collection[str]) -> None:
    color = 0
    for name, points in lines.items():
        if name in faint:
            axes.draw_line(
                points,
                _kind(color, "faint"),
            )
            continue
        axes.draw_line(
            points,
            _kind(color, "line"),
        )
        if len(points) < 3:
            axes.draw_signs(
                points,
                SHAPES[0],
                _kind(color, "fill"),
            )
        color += 1


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
    legend = _legend(
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
    axes = _Axes(x, Scale(0, 1, bottom, top))
    shares = _with_texts(svg.ticks(100 * low, 100 * high, 5), "%")
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
    return _html(
        parts,
        bottom + BELOW,
        caption,
    )


def _draw_limits(axes: _Axes, limits: Mapping[str, float]) -> None:
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


def _draw_interval(axes: _Axes, cell: Interval | None, height: float, number: int) -> None:
    if cell is None:
        return
    value, low, high = map(axes.x, cell)
    shape = SHAPES[number % len(SHAPES)]
    line = svg.path(
        [(low, height), (high, height)],
        _kind(number, "line"),
    )
    sign = svg.marker(
        shape,
        value,
        height,
        _kind(number, "fill"),
    )
    axes.parts += [line, sign]


def standalone(picture: str) -> str:
    """A picture as an SVG file of its own, light or dark as its reader's system."""
    end = "</svg>"
    start = picture.index("<svg")
    chart = picture[start : picture.index(end) + len(end)]
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
    y_ticks = _with_texts(svg.ticks(low, high, 5))
    left = _left_of(y_ticks)
    legend = _legend(
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
    axes = _Axes(x, y)
    axes.draw_grid(y_ticks)
    places = svg.ticks(x.low, x.high, 6, whole=True)
    axes.draw_base(_with_texts([place for place in places if place >= first]))
    width = 0.8 * (x(1) - x(0))
    for color, values in enumerate(groups.values()):
        kind = _kind(color, "fill")
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
    return _charted(axes, legend, labels, caption)


def curves(
    caption: Caption,
    labels: Labels,
    groups: Mapping[str, Sequence[run_reader.Point]],
) -> str:
    """Points (x, y), joined in the order of x, one colour and sign a group: {group: points}.

    labels: of x and y.
    """
    low, high = _range_of(groups)
    low = min(0.0, low)
    places = [place for place, _ in _points_of(groups)]
    first, last = svg.padded(min(places), max(places))
    y_ticks = _with_texts(svg.ticks(low, high, 5))
    left = _left_of(y_ticks)
    legend = _legend(
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
    axes = _Axes(x, y)
    axes.draw_grid(y_ticks)
    axes.draw_base(_with_texts(svg.ticks(first, last, 6)))
    shapes = cycle(SHAPES)
    for color, points in enumerate(groups.values()):
        axes.draw_line(
            sorted(points),
            _kind(color, "line"),
        )
        axes.draw_signs(
            points,
            next(shapes),
            _kind(color, "fill"),
        )
    return _charted(axes, legend, labels, caption)
