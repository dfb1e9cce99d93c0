"""Charts by pencil: where ticks and points lie, and that words are only words."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mis_mlx.reporting import figures, smoothing, svg, timeline

SVG = "{http://www.w3.org/2000/svg}"
CAPTION = ("key", "Title", "What it shows")


def root_of(picture: str) -> ElementTree.Element:
    """The SVG of a picture in HTML."""
    found = re.search(r"<svg.*?</svg>", picture, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.24, 5, [0.14, 0.16, 0.18, 0.2, 0.22, 0.24]),
        (-0.05, 1.19, 5, [0, 0.25, 0.5, 0.75, 1.0]),
        (1e9, 1e9 + 4, 4, [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3, 1e9 + 4]),
        (3.0, 3.0, 5, [3.0]),
    ],
)
def test_ticks(low: float, high: float, count: int, expected: list[float]) -> None:
    """Round numbers within the range."""
    assert svg.ticks(low, high, count) == pytest.approx(expected)


def test_ticks_of_whole_numbers() -> None:
    """Never halves."""
    assert svg.ticks(-0.6, 2.6, 6, whole=True) == [0, 1, 2]


def test_numbers_have_the_decimals_that_tell_them_apart() -> None:
    """And no more."""
    assert svg.tick_texts([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert svg.tick_texts([0, 2000]) == ["0", "2,000"]
    assert svg.tick_texts([1e-6, 2e-6]) == ["0.000001", "0.000002"]
    assert svg.tick_texts([1e-12]) == ["0"]


def test_a_value_lies_between_its_ticks() -> None:
    """The points of a curve, read back from the picture by its grid lines, are those given."""
    given = [(50.0, 0.1), (100.0, 0.9), (150.0, 0.3)]
    root = root_of(figures.curves(CAPTION, ("MB", "loss"), {"a": given}))
    line = next(path for path in root.iter(f"{SVG}path") if path.get("class") == "line k0")
    drawn = np.array(re.findall(r"[-0-9.]+", str(line.get("d"))), float).reshape(-1, 2)
    grid = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "grid"]
    heights = [float(re.findall(r"[-0-9.]+", str(way))[1]) for way in grid]
    ticks = [text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    values = [float(str(text.text)) for text in ticks[: len(heights)]]
    slope, start = np.polyfit(heights, values, 1)
    np.testing.assert_allclose(slope * drawn[:, 1] + start, [0.1, 0.9, 0.3], atol=0.005)


def test_nothing_lies_outside_of_a_picture() -> None:
    """Long names are cut, many names take several rows."""
    names = [f"runs/a-rather-long-name-of-a-run-number-{number}" * 2 for number in range(6)]
    lines = {name: [(0.0, 1.0), (7200.0, 2.0 + len(name))] for name in names}
    rows = {name: [(0.5, 0.4, 0.6), None] for name in names}
    limits = {"chance": 0.0, "teacher": 1.0}
    pictures = (
        timeline.over_time(CAPTION, {"loss": lines, "GiB": lines}, shaded=[(10.0, 10.0)]),
        figures.intervals(CAPTION, "recovered", rows, names=["a", "b"], limits=limits),
        figures.columns(CAPTION, ("block", "height"), {"kept": {0: 1.0, 9: 0.2}, "gone": {}}),
    )
    for picture in pictures:
        root = root_of(picture)
        _, _, width, height = map(float, str(root.get("viewBox")).split())
        for text in root.iter(f"{SVG}text"):
            x = float(str(text.get("x")))
            wide = svg.width_of(str(text.text))
            left = (
                x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[str(text.get("text-anchor"))]
            )
            assert left > -10, text.text
            assert left + wide < width + 15, text.text
            assert 0 < float(str(text.get("y"))) < height


def test_words_are_only_words() -> None:
    """Whatever a name says, the picture has the same elements."""
    hostile = "</text><script>alert(1)</script> & ]]>"
    root = root_of(
        figures.curves((CAPTION[0], hostile, hostile), (hostile, "y"), {hostile: [(1, 1)]})
    )
    assert not list(root.iter(f"{SVG}script"))
    assert hostile in [text.text for text in root.iter(f"{SVG}text")]


def test_the_mean_of_neighbours() -> None:
    """By numpy: a window of three, narrower at both ends; a constant stays, the width is odd."""
    values = np.random.default_rng(0).normal(size=40)
    points = [(float(place), float(value)) for place, value in enumerate(values)]
    means, width = smoothing.smoothed(points)
    assert width == 3
    expected = [values[0], *np.convolve(values, np.ones(3) / 3, "valid"), values[-1]]
    np.testing.assert_allclose([mean for _, mean in means], expected)
    assert [place for place, _ in means] == [place for place, _ in points]
    flat, width = smoothing.smoothed([(float(place), 2.5) for place in range(500)])
    assert width == 25
    assert {mean for _, mean in flat} == {2.5}


def test_a_file_of_its_own_has_its_colours() -> None:
    """Light and dark, without the page."""
    picture = figures.curves(CAPTION, ("x", "y"), {"a": [(1.0, 1.0), (2.0, 2.0)]})
    text = figures.standalone(picture)
    root = ElementTree.fromstring(text)
    (style,) = root.iter(f"{SVG}style")
    assert "prefers-color-scheme:dark" in str(style.text)
    used = set(re.findall(r'class="([^"]+)"', text)) - {"chart", "paper"}
    for name in " ".join(used).split():
        assert f".{name}{{" in str(style.text), name
