"""The teacher as `mlx_lm.convert -q` packs it: what a search measured of it, beside a run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mis_mlx.reporting.run_reader import Point, finite
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError


class Baseline(NamedTuple):
    """The teacher as `mlx_lm.convert -q` packs it, as `search --frontier` measured it.

    points: (MB, bits per byte of the teacher's answers above the teacher). four_bits: that of 4
    bits. source: the search's folder.
    """

    points: Sequence[Point]
    four_bits: Point | None
    source: str


def measured_beside(folder: Path, origin: Mapping[str, Any]) -> Baseline | None:
    """What the newest search beside a run measured of the same teacher, byte for byte."""
    searches = folder.absolute().parent.glob("search/*/frontier.json")
    newest_first = sorted(
        searches,
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in newest_first:
        search = path.parent
        teacher = _stored(search, run_folder.ORIGIN)
        frontier = _stored(search, path.name)
        if origin.get("teacher") is None or teacher.get("teacher") != origin["teacher"]:
            continue
        if frontier.get("loss_of") != "the teacher's answers":
            continue
        points = _points(_mappings(frontier.get("points")))
        if points:
            return Baseline(
                points=list(points.values()),
                four_bits=points.get("4 bits"),
                source=f"{search.parent.name}/{search.name}",
            )
    return None


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    if not isinstance(values, list):
        return []
    return [value for value in values if isinstance(value, Mapping)]


def _stored(folder: Path, name: str) -> dict[str, Any]:
    """What a file holds; {} where it is not there or cannot be read."""
    with suppress(OSError, MisError):
        return run_folder.stored_settings(folder, name)
    return {}


def _points(records: Sequence[Mapping[str, Any]]) -> dict[str, Point]:
    """{"4 bits": (MB, loss)} of the records that are the converted teacher's."""
    points: dict[str, Point] = {}
    for record in records:
        nbytes = finite(record.get("nbytes"))
        loss = finite(record.get("loss"))
        bits = str(record.get("name")).partition("mlx_lm.convert in ")[2]
        if bits and nbytes is not None and loss is not None:
            points[bits] = (nbytes / 1e6, loss)
    return points
