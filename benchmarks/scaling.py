"""How cost grows: seconds, memory, and bytes read and written of every phase, and what the plan
said of them.

    scripts/mis benchmarks/scaling.py
    scripts/mis benchmarks/scaling.py --table

Models of random weights, of SmolLM2-135M's shape but for `parameters`, where the shapes are of 0.5
and 1.5 B models with 152 thousand tokens, and of a 7 B model packed in 4 bits, which is cut and
rounded, not trained. Along each axis all else is as in the cell that they share: 4 windows of 128
tokens for each use, two steps of two windows, 2 GiB (of 1.5 B 3 and of 7 B 8, for their heads in
float32). `budget`: from what forces parts to what holds all. `tokens`: of a window.

Every cell is one process; before each phase the system is told to count the process's largest
resident set anew (Linux). Bytes are those that the process asked the system for, whether from the
disk or the page cache. A slope is that of a line through the logarithms: 1 where twice as much
costs twice as much. Writes benchmarks/results/<machine>/scaling.json after every cell, and a
picture of seconds against parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import laboratory
import numpy as np
import psutil
import streaming
from planned import HALF, when_tokens_are_chosen

from mis_mlx import cli, distill
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.pipeline import Run
from mis_mlx.hardware import memory
from mis_mlx.reporting.text import markdown_table

SMALL = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
MIDDLE = {
    **HALF,
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "head_dim": 128,
}
LARGE = {
    **MIDDLE,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SHAPES = {"135M": SMALL, "0.5B": HALF, "1.5B": MIDDLE, "7B": LARGE}
SHARED: dict[str, Any] = {
    "budget": "2GiB",
    "max_seq_length": 128,
    "iters": 2,
    "save_every": 2,
    "num_samples": 4,
    "reconstruct_samples": 4,
    "eval_windows": 3,
    "bench_tokens": 0,
    "q_iters": 0,
}
UNTRAINED = {"train": "none", "reconstruct_samples": 0, "q_method": "round"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "135M": ("135M", {}),
    **{f"135M, {size}": ("135M", {"budget": size}) for size in ("600MiB", "1GiB", "5GiB")},
    **{f"135M, windows of {n}": ("135M", {"max_seq_length": n}) for n in (64, 256, 512)},
    "0.5B": ("0.5B", {}),
    "1.5B": ("1.5B", {"reconstruct_samples": 0, "budget": "3GiB"}),
    "7B, untrained": ("7B", {**UNTRAINED, "budget": "8GiB"}),
}
AXES: dict[str, dict[str, float]] = {
    "parameters": {"135M": 135e6, "0.5B": 494e6, "1.5B": 1.54e9, "7B, untrained": 7.1e9},
    "budget": {"135M, 600MiB": 600, "135M, 1GiB": 1024, "135M": 2048, "135M, 5GiB": 5120},
    "tokens": {
        "135M, windows of 64": 64,
        "135M": 128,
        "135M, windows of 256": 256,
        "135M, windows of 512": 512,
    },
}
COUNTED = "seconds", "peak_bytes", "read_bytes", "written_bytes"


@dataclass(frozen=True)
class Settings:
    """What of it."""

    table: bool = False
    """print and draw what there is, and make nothing"""
    work: str | None = None
    """one cell, set by the program itself: its name, the teacher's folder and the run's"""


def cell(name: str, teacher: str, out: str) -> None:
    """Run it, and print {"mode", "phases": {phase: {"taken", "planned"}}}, each with what `COUNTED`
    names.
    """
    phases = dict[str, Any]()
    plain = Run.phase
    mode = list[str]()
    me = psutil.Process()
    starts = dict[str, Any]()

    def start(label: str) -> None:
        memory.give_back()  # as the phase itself does before anything else
        laboratory.count_anew()
        starts[label] = train_loop.CLOCK.monotonic(), me.io_counters()

    @contextmanager
    def phase(course: Run, label: str) -> Iterator[None]:
        if label not in starts:
            start(label)
        began, before = starts[label]
        with plain(course, label):
            yield
        seconds = train_loop.CLOCK.monotonic() - began
        after = me.io_counters()
        moved = after.read_chars - before.read_chars, after.write_chars - before.write_chars
        taken = seconds, laboratory.largest() - course.account.peak.before_bytes, *moved
        plan = next(p for p in course.plan.phases if p.name == label)
        planned = (
            plan.seconds(course.plan.rates),
            course.plan.needed_bytes(plan),
            plan.read_bytes,
            plan.written_bytes,
        )
        mode[:] = [course.plan.mode]
        phases[label] = {
            "taken": dict(zip(COUNTED, taken, strict=True)),
            "planned": dict(zip(COUNTED, planned, strict=True)),
        }

    Run.phase = phase  # type: ignore[method-assign,assignment]
    when_tokens_are_chosen(partial(start, "prune"))
    with redirect_stdout(sys.stderr):
        asked = distill.Settings(teacher=teacher, out=out, **SHARED)
        distill.run(asked.with_values(**CASES[name][1]))
    print(json.dumps({"mode": mode[0], "phases": phases}))


def measured(name: str, temp: Path) -> dict[str, Any]:
    """A cell, in a process of its own, with its model, which is gone after it."""
    shape = CASES[name][0]
    with tempfile.TemporaryDirectory(dir=temp) as place:
        teacher = streaming.synthetic(
            Path(place) / "teacher", SHAPES[shape], 4 if shape == "7B" else 0
        )
        work = json.dumps([name, str(teacher), str(Path(place) / "run")])
        line = [sys.executable, __file__, f"--work={work}"]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))


def slope(across: list[float], up: list[float]) -> float:
    """Of the line through the logarithms of both."""
    return float(np.polyfit(np.log(across), np.log(up), 1)[0])


def along(axis: str, cells: dict[str, Any]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """{phase: (place on the axis, what it took and what was planned)}."""
    found = dict[str, list[tuple[float, dict[str, Any]]]]()
    for name, at in AXES[axis].items():
        for label, both in cells[name]["phases"].items() if name in cells else ():
            found.setdefault(label, []).append((at, both))
    return found


def tables(cells: dict[str, Any]) -> str:
    """Markdown: every phase of every cell, then the slopes."""
    lines = []
    host_gradients = []
    for name, one in cells.items():
        for label, both in one["phases"].items():
            pairs = [
                f"{both['taken'][k] / unit:,.0f} ({both['planned'][k] / unit:,.0f})"
                for k, unit in zip(COUNTED, (1, 1e6, 1e6, 1e6), strict=True)
            ]
            lines.append([name, one["mode"], label, *pairs])
    for axis in AXES:
        for label, points in along(axis, cells).items():
            if len(points) > 2:
                across = [at for at, _ in points]
                shown = []
                for key in COUNTED[:3]:
                    taken = slope(across, [max(1e-3, p["taken"][key]) for _, p in points])
                    planned = slope(across, [max(1e-3, p["planned"][key]) for _, p in points])
                    shown.append(f"{taken:.2f} ({planned:.2f})")
                host_gradients.append([axis, label, *shown])
    head = [
        "",
        "way",
        "phase",
        "s (planned)",
        "peak, MB (planned)",
        "read, MB (planned)",
        "written, MB (planned)",
    ]
    return "\n\n".join(
        [
            markdown_table(head, lines),
            markdown_table(["axis", "phase", "s", "peak", "read"], host_gradients),
        ]
    )


def draw(cells: dict[str, Any], axes: Any) -> None:
    """Seconds of phases against parameters, measured as points, planned as lines."""
    for at, (label, points) in enumerate(along("parameters", cells).items()):
        across = [x / 1e6 for x, _ in points]
        axes.plot(
            across, [p["taken"]["seconds"] for _, p in points], "o", color=f"C{at}", label=label
        )
        axes.plot(
            across, [p["planned"]["seconds"] for _, p in points], "-", color=f"C{at}", alpha=0.5
        )
    laboratory.logarithmic(
        axes, "million parameters of the teacher", "seconds: measured (points), planned (lines)"
    )


def main(s: Settings) -> None:
    """All cells that are not there yet."""
    if s.work:
        return cell(*json.loads(s.work))
    given = {"shared": SHARED}
    cells = laboratory.resumed("scaling", given, ["cells"]).get("cells", {})
    with tempfile.TemporaryDirectory() as temp:
        for name in [n for n in CASES if n not in cells and not s.table]:
            hot = laboratory.busy(name)
            cells[name] = {**measured(name, Path(temp)), "hot": hot}
            cli.say(f"{name}: {cells[name]}")
            laboratory.write(
                "scaling", "scripts/mis benchmarks/scaling.py", {"given": given, "cells": cells}
            )
    print(tables(cells))
    laboratory.picture("scaling", lambda axes: draw(cells, axes))
    return None


if __name__ == "__main__":
    laboratory.start(Settings, main)
