"""What all charts share: a panel with its axes, its legend, and the picture around it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice

from mis_mlx.reporting import html, run_reader, svg
from mis_mlx.reporting.svg import ROW, Legend, Scale

# in a viewBox: letters of 12 in it are readable on a phone
WIDTH = 420
RIGHT = WIDTH - 8
PANEL_HEIGHT = 190
LOWER_PANEL_HEIGHT = 85
BELOW = 40  # room for the numbers and the name of the axis of x
COLORS = 4  # in templates/chart.css
SHAPES = ("circle", "triangle", "diamond", "square")
# key, with which the ids in a picture begin, unique on the page; title; description
Caption = tuple[str, str, str]
Span = tuple[float, float]
Labels = tuple[str, str]  # of x and y
Lines = Mapping[str, Sequence[run_reader.Point]]  # by name
Ticks = Sequence[tuple[float, str]]  # values and their texts


@dataclass
class Axes:
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


def kind_of(number: int, role: str) -> str:
    """CSS classes of the number-th line or group."""
    return f"{role} k{number % COLORS}"


def legend_of(
    names: Sequence[str],
    left: float,
    shapes: Sequence[str] = SHAPES,
    kinds: Sequence[str] = (),
) -> Legend:
    """The names above a panel that begins at `left`, by default with the signs of groups."""
    by_number = [kind_of(number, "fill") for number in range(len(names))]
    return Legend(
        names,
        kinds=kinds or by_number,
        shapes=list(islice(cycle(shapes), len(names))),
        left=left,
        right=RIGHT,
    )


def with_texts(values: Sequence[float], unit: str = "") -> Ticks:
    """Values with their texts."""
    texts = [text + unit for text in svg.tick_texts(values)]
    return list(zip(values, texts, strict=True))


def left_of(y_ticks: Ticks) -> float:
    """Where panels begin, right of these numbers."""
    widths = [svg.width_of(text) for _, text in y_ticks]
    return 12 + max(widths, default=0.0)


def as_html(parts: Sequence[str], height: float, caption: Caption) -> str:
    """HTML: elements in an SVG of this height, with its title and description."""
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


def charted(axes: Axes, legend: Legend, labels: Labels, caption: Caption) -> str:
    """The picture of one panel, its axes named: y above, x below."""
    bottom = axes.y.start
    parts = [
        svg.words(labels[1], 0, 13, kind="soft"),
        *legend.drawn(ROW + 2),
        *axes.parts,
        svg.words(labels[0], RIGHT, bottom + 34, anchor="end"),
    ]
    return as_html(
        parts,
        bottom + BELOW,
        caption,
    )


def points_of(lines: Lines) -> Iterable[run_reader.Point]:
    """The points of all lines."""
    return chain.from_iterable(lines.values())


def range_of(lines: Lines) -> Span:
    """(lowest, highest) value of all lines, with a little room."""
    values = [value for _, value in points_of(lines)]
    return svg.padded(min(values, default=0.0), max(values, default=1.0))
