"""Results as plain text, for a terminal: Markdown tables, the line of a training step."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from mis_mlx.types import Row, Step, gib

Metrics = Mapping[str, Sequence[str]]  # of a table's lines: {name in rows: (label, number format)}
TABLES: dict[str, Metrics] = json.loads(
    (Path(__file__).parent / "templates" / "tables.json").read_text("utf-8")
)


def step_text(step: Step, budget_bytes: int | None = None) -> str:
    """What the bar shows of a training step: loss, tokens/s, memory, °C, and the guard's note.

    Memory stands with its budget, where that is given.
    """
    speed = f"{step.tokens / max(step.seconds, 1e-9):.0f}"
    memory = gib(step.peak_bytes)
    if budget_bytes:
        memory += f" of {gib(budget_bytes)}"
    parts = [f"loss {step.loss:.3f}", f"{speed} tok/s", memory]
    if step.reading and step.reading.die_c is not None:
        parts.append(f"{step.reading.die_c:.0f} °C")
    if step.note:
        parts.append(step.note)
    return "  ".join(parts)


def markdown_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: int = 1,
) -> str:
    """A Markdown table. words: how many columns, the first ones, hold words; the others numbers."""
    lines = []
    for row in (head, *rows):
        line = "|"
        for cell in row:
            line += f" {cell}".rstrip() + " |"
        lines.append(line)
    numbers = len(head) - words
    rule = "---|" * words + "---:|" * numbers
    lines.insert(1, "|" + rule)
    return "\n".join(lines)


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def aligned(page: str) -> str:
    """A Markdown page; on a terminal, its tables' columns are aligned."""
    if not sys.stdout.isatty():
        return page
    lines: list[str] = []
    blocks = groupby(page.splitlines(), key=lambda line: line.startswith("|"))
    for is_table, group in blocks:
        block = list(group)
        lines += _aligned_table(block) if is_table else block
    return "\n".join(lines)


def _aligned_table(lines: Sequence[str]) -> list[str]:
    """A Markdown table whose cells are padded to the width of their column."""
    cells = [cells_of(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [cell.endswith(":") for cell in cells[1]]
    aligned = []
    for row in cells:
        padded = []
        for cell, width, is_number in zip(row, widths, right, strict=True):
            padded.append(cell.rjust(width) if is_number else cell.ljust(width))
        aligned.append(f"| {' | '.join(padded)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    aligned[1] = f"|{rule}|"
    return aligned


def plus_minus(low: float, high: float, form: str) -> str:
    """ " ± half the interval" in the format `form`, or " (too few)" where nothing is known."""
    half = (high - low) / 2
    if math.isinf(half):
        return " (too few)"
    return f" ± {format(half, form)}"


def table(rows: Sequence[Row], models: Sequence[str] | Mapping[str, str], metrics: Metrics) -> str:
    """Markdown: one line a metric, one column a model. models: perhaps with their labels."""
    head = list(models.values() if isinstance(models, Mapping) else models)
    cells = {(row.model, row.metric): row for row in rows}
    lines = []
    for metric, (label, form) in metrics.items():
        line = [label]
        for model in models:
            row = cells.get((model, metric))
            if row is None:
                line.append("–")
                continue
            text = format(row.value, form)
            if row.low is not None and row.high is not None:
                text += plus_minus(row.low, row.high, form)
            line.append(text)
        if any(text != "–" for text in line[1:]):
            lines.append(line)
    return markdown_table(["", *head], lines)
