"""Results as plain text, for a terminal: Markdown tables, the line of a training step."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from mis_mlx.types import Row, Step, gib

Metrics = Mapping[str, Sequence[str]]  # of a table's lines: {name in rows: (label, number format)}
TABLES: dict[str, Metrics] = json.loads(
    (Path(__file__).parent / "templates" / "tables.json").read_text("utf-8")
)


def step_text(step: Step, budget_bytes: int | None = None, planned_tps: float | None = None) -> str:
    """What the bar shows beside a step: loss, speed and memory of those planned, °C, and the
    guard.
    """
    speed = f"{step.tokens / max(step.seconds, 1e-9):.0f}" + (
        f" of {planned_tps:.0f}" if planned_tps else ""
    )
    used = gib(step.peak_bytes) + (f" of {gib(budget_bytes)}" if budget_bytes else "")
    parts = [f"loss {step.loss:.3f}", f"{speed} tok/s", used]
    if step.reading and step.reading.die_c is not None:
        parts.append(f"{step.reading.die_c:.0f} °C")
    return "  ".join([*parts, step.note] if step.note else parts)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table. words: how many columns hold words, which stand left; the others hold
    numbers.
    """
    lines = ["|" + "".join(f" {cell}".rstrip() + " |" for cell in row) for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * words + "---:|" * (len(head) - words))
    return "\n".join(lines)


def aligned(page: str) -> str:
    """A Markdown page; where stdout is a terminal, its tables' columns stand below each other."""
    lines = list[str]()
    if not sys.stdout.isatty():
        return page
    for is_table, group in groupby(page.splitlines(), key=lambda line: line.startswith("|")):
        if not is_table:
            lines += group
            continue
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in group]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [cell.endswith(":") for cell in cells[1]]
        for row in cells:
            padded = (
                c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
            )
            lines.append(f"| {' | '.join(padded)} |")
        lines[1 - len(cells)] = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join(lines)


def table(rows: Sequence[Row], models: Sequence[str], metrics: Metrics) -> str:
    """Markdown: one line a metric, one column a model."""
    cells = {(r.model, r.metric): r for r in rows}
    lines = []
    for name, (label, form) in metrics.items():
        line = []
        for model in models:
            row = cells.get((model, name))
            text = "–" if row is None else format(row.value, form)
            if row is not None and row.low is not None and row.high is not None:
                text += f" ± {format((row.high - row.low) / 2, form)}"
            line.append(text)
        if any(text != "–" for text in line):
            lines.append([label, *line])
    return markdown_table(["", *models], lines)
