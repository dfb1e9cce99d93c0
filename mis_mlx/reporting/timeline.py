"""Lines over time, in panels above each other."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from mis_mlx.reporting import svg
from mis_mlx.reporting.axes import (
    LOWER_PANEL_HEIGHT,
    PANEL_HEIGHT,
    RIGHT,
    SHAPES,
    Axes,
    Caption,
    Lines,
    Span,
    Ticks,
    as_html,
    kind_of,
    left_of,
    legend_of,
    points_of,
    range_of,
    with_texts,
)
from mis_mlx.reporting.svg import ROW, Legend, Scale


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
    points = list(chain.from_iterable(map(points_of, panels.values())))
    seconds = [place for place, _ in points]
    first_s = min(seconds, default=0.0)
    last_s = max([*seconds, first_s + 1e-6])
    unit, unit_name = _time_unit(last_s)
    numbers = [_panel_ticks(lines) for lines in panels.values()]
    left = max(map(left_of, numbers))
    x = Scale(first_s, last_s, left, RIGHT)
    in_units = svg.ticks(first_s / unit, last_s / unit, 5)
    x_ticks = [(value * unit, text) for value, text in with_texts(in_units)]
    without_texts = [(value, "") for value, _ in x_ticks]
    parts: list[str] = []
    top = 0.0
    height = PANEL_HEIGHT
    last_label = list(panels)[-1]
    for (label, lines), y_ticks in zip(panels.items(), numbers, strict=True):
        parts.append(svg.words(label, 0, top + 13, kind="soft"))
        top += ROW + 4
        if len(lines) > 1:
            legend = _legend_of_lines(lines, faint, left)
            parts += legend.drawn(top - 2)
            top += legend.rows * ROW
        low, high = range_of(lines)
        panel = Axes(x, Scale(low, high, top + height, top + 4))
        panel.draw_grid(y_ticks)
        panel.draw_base(x_ticks if label == last_label else without_texts)
        _shade(panel, shaded)
        _draw_lines(panel, lines, faint)
        parts += panel.parts
        top += height + 10
        height = LOWER_PANEL_HEIGHT
    name = f"{unit_name} since the run began"
    parts.append(svg.words(name, RIGHT, top + 22, anchor="end"))
    return as_html(parts, top + 28, caption)


def _panel_ticks(lines: Lines) -> Ticks:
    low, high = range_of(lines)
    return with_texts(svg.ticks(low, high, 4))


def _legend_of_lines(lines: Lines, faint: Collection[str], left: float) -> Legend:
    kinds = []
    color = 0
    for name in lines:
        if name in faint:
            kinds.append(kind_of(color, "pale"))
        else:
            kinds.append(kind_of(color, "fill"))
            color += 1
    return legend_of(
        list(lines),
        left,
        shapes=SHAPES[:1],
        kinds=kinds,
    )


def _shade(axes: Axes, spans: Sequence[Span]) -> None:
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


def _draw_lines(axes: Axes, lines: Lines, faint: Collection[str]) -> None:
    color = 0
    for name, points in lines.items():
        if name in faint:
            axes.draw_line(
                points,
                kind_of(color, "faint"),
            )
            continue
        axes.draw_line(
            points,
            kind_of(color, "line"),
        )
        if len(points) < 3:
            axes.draw_signs(
                points,
                SHAPES[0],
                kind_of(color, "fill"),
            )
        color += 1
