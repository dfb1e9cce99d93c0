"""Charts by pencil: where ticks and points lie."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mis_mlx.reporting import charts

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
    assert charts.ticks(low, high, count) == pytest.approx(expected)


def test_numbers_have_the_decimals_that_tell_them_apart() -> None:
    """And no more."""
    assert charts.tick_texts([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert charts.tick_texts([0, 2000]) == ["0", "2,000"]
    assert charts.tick_texts([1e-6, 2e-6]) == ["0.000001", "0.000002"]
    assert charts.tick_texts([1e-12]) == ["0"]


def test_a_value_lies_between_its_ticks() -> None:
    """The points of a line, read back from the picture by its grid, are those given."""
    given = [(50.0, 0.1), (100.0, 0.9), (150.0, 0.3)]
    root = root_of(charts.lines(CAPTION, ("step", "loss"), {"loss": given}))
    dots = [float(str(dot.get("cy"))) for dot in root.iter(f"{SVG}circle")]
    grid = [way.get("d") for way in root.iter(f"{SVG}path") if way.get("class") == "grid"]
    heights = [float(re.findall(r"[-0-9.]+", str(way))[1]) for way in grid]
    ends = [text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    values = [float(str(text.text)) for text in ends[1 : 1 + len(heights)]]
    slope, start = np.polyfit(heights, values, 1)
    np.testing.assert_allclose(slope * np.array(dots) + start, [0.1, 0.9, 0.3], atol=0.005)


def test_one_value_has_a_picture() -> None:
    """Nothing is divided by a range of no width."""
    root_of(charts.lines(CAPTION, ("step", "loss"), {"loss": [(1.0, 2.0)]}))
