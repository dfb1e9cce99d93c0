"""Bytes against loss for one teacher: its students, and other models of that size.

The curve of students is expected: by `Losses`, corrected by the measured loss of one student. Other
points are measured: the teacher as `mlx_lm.convert -q` rounds it, and other models that are named,
such as its next smaller sibling.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx import cli
from mis_mlx.data import token_windows
from mis_mlx.evaluation import comparison
from mis_mlx.models.architectures.sizes import Shape
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import figures, html, text
from mis_mlx.size_search import candidates, excess, limits, shape_search, unwritten
from mis_mlx.size_search.shape_search import Choice, Losses
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint

ALLOWED = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5)  # bits a byte: points of the curve
MEASURED_AT = 0.1  # the point whose student is measured, to correct the curve
CONVERTED = (6, 4, 3)  # bits of a weight: the teacher as mlx_lm.convert rounds it, in groups of 64
GROUP = 64
NAME = "frontier"  # of the files in a search's folder


@dataclass(frozen=True)
class Point:
    """A model in the picture. loss: bits a byte above the teacher, measured or expected."""

    name: str
    nbytes: int
    loss: float
    measured: bool


def expected_curve(
    c: candidates.Candidates,
    losses: Losses,
    shapes: Sequence[Shape],
    within: Sequence[limits.Limit],
) -> tuple[list[Point], list[Choice]]:
    """(the students of fewest bytes for each loss of ALLOWED, as expected; their sizes)."""
    config = c.run.teacher.config
    together = _measured_over_expected(c, losses, shapes, within)
    points = []
    chosen = list[Choice]()
    for allowed in ALLOWED:
        nats = allowed * math.log(2) / together
        students = shape_search.smallest(config, shapes, losses, nats, within=within)
        if not students or (chosen and students[0] == chosen[-1]):
            continue
        choice = students[0]
        loss = losses.expected(choice) * together / math.log(2)
        point = Point(
            name=f"{shape_search.words(choice.shape, losses.before)}, {choice.bpw:.2f} bits",
            nbytes=round(limits.file_bytes(config, *choice)),
            loss=round(loss, 4),
            measured=False,
        )
        points.append(point)
        chosen.append(choice)
    return points, chosen


def _measured_over_expected(
    c: candidates.Candidates,
    losses: Losses,
    shapes: Sequence[Shape],
    within: Sequence[limits.Limit],
) -> float:
    """The measured loss of one student over its expected one; 1 where none can be measured."""
    nats = MEASURED_AT * math.log(2)
    config = c.run.teacher.config
    students = shape_search.smallest(config, shapes, losses, nats, within=within)
    if not students:
        return 1.0
    (score,) = excess.scores(c, students[:1], losses)
    if not math.isfinite(score):
        return 1.0
    expected = max(losses.expected(students[0]), 1e-9)
    return float(np.clip(score / expected, 1 / 3, 3.0))


def converted_teachers(c: candidates.Candidates) -> Iterable[Point]:
    """The teacher with every matrix in N bits, as `mlx_lm.convert -q --q-bits N` writes it."""
    paths = packed_format.formats_of(c.run.teacher.config, GROUP)
    for bits in CONVERTED:
        formats = dict.fromkeys(paths, packed_format.Format(bits, GROUP))
        student = unwritten.Student(c.run.teacher, c.before, formats=formats, fit=False)
        (lost,) = excess.of_students(c, [student])
        yield Point(
            f"teacher, mlx_lm.convert in {bits} bits",
            student.nbytes,
            round(lost / math.log(2), 4),
            measured=True,
        )


def other_models(c: candidates.Candidates, names: Sequence[str]) -> Iterable[Point]:
    """Other models, folders or hub ids, each with its own tokenizer and chat template."""
    for name in names:
        source = resolve.resolve_model(name)
        cli.say(f"against {source.source}")
        model = compute_type.open_to_compute(source.path, c.run.teacher.precision)
        loss = _loss_of_another(c, model) / math.log(2)
        yield Point(source.path.name, model.nbytes, round(loss, 4), measured=True)


def _loss_of_another(c: candidates.Candidates, model: Checkpoint) -> float:
    """Nats a byte above the teacher, of a model that perhaps has another tokenizer."""
    if c.answers is not None:
        return c.answers.excess(model)
    teacher = c.run.teacher
    windows = c.ranking
    own = token_windows.retokenized(
        windows, load.tokenizer(teacher.path), load.tokenizer(model.path)
    )
    nats = comparison.per_byte(comparison.compare({"model": model}, own)["model", "nll"], own)
    base = comparison.per_byte(
        comparison.compare({"teacher": teacher}, windows)["teacher", "nll"], windows
    )
    return nats - base


def distilled(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Point]:
    """Students of the curve that were trained and rounded for real: finalists.

    Their loss is that on other answers; on text it is KL(teacher || student), as the curve's.
    """
    points = []
    for record, name in zip(records, names, strict=True):
        values = record.get("answers_rounded") or record.get("kl_rounded") or [None]
        if None not in values and "bytes" in record:
            loss = round(float(np.mean(values)), 4)
            points.append(Point(f"distilled: {name}", int(record["bytes"]), loss, measured=True))
    return points


def write_page(
    folder: Path,
    teacher: str,
    on: str,
    points: Sequence[Point],
    *,
    files: Files,
) -> str:
    """Write frontier.json, .svg and .html into a search's folder; return the table as Markdown.

    on: the text of the losses.
    """
    ordered = sorted(points, key=lambda point: -point.nbytes)
    rows = [
        [
            point.name,
            f"{point.nbytes / 1e6:.1f}",
            f"{point.loss:.3f}",
            "measured" if point.measured else "expected",
        ]
        for point in ordered
    ]
    table = text.markdown_table(["", "MB", f"bits per byte of {on} above the teacher", ""], rows)
    result = {"teacher": teacher, "loss_of": on, "points": [asdict(point) for point in ordered]}
    files.replace_text(folder / f"{NAME}.json", json.dumps(result, indent=1))
    caption = (
        NAME,
        f"{teacher}: bytes against loss",
        f"Bits per byte of {on} above the teacher, against megabytes of weights",
    )
    lines = {
        "students, as expected": [_xy(point) for point in ordered if not point.measured],
        "mlx_lm.convert": [_xy(point) for point in ordered if "mlx_lm.convert" in point.name],
        "distilled": [_xy(point) for point in ordered if point.name.startswith("distilled")],
        "others": [_xy(point) for point in ordered if _is_other(point)],
    }
    drawn = {name: values for name, values in lines.items() if values}
    picture = figures.curves(
        caption, ("MB of weights", f"bits per byte of {on} above the teacher"), drawn
    )
    files.replace_text(folder / f"{NAME}.svg", figures.standalone(picture))
    body = f"<h1>{caption[1]}</h1>{picture}{html.markdown(table)}"
    files.replace_text(folder / f"{NAME}.html", html.page(caption[1], body))
    return table


def _xy(point: Point) -> tuple[float, float]:
    return point.nbytes / 1e6, point.loss


def _is_other(point: Point) -> bool:
    return (
        point.measured
        and not point.name.startswith("distilled")
        and "mlx_lm.convert" not in point.name
    )
