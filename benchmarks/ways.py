"""What each way of training gives and takes: the same student, repaired and distilled alike, by its
way or its budget.

    scripts/mis benchmarks/ways.py                     # 10 to 30 minutes a row on 2 quiet cores
    scripts/mis benchmarks/ways.py --rows blocks 1GiB  # of these rows alone
    scripts/mis benchmarks/ways.py --teacher gemma-3-270m
    scripts/mis benchmarks/ways.py --table

A row is a way (`--train`) under the default budget, or a budget, which chooses the way. Everything
else is distill's default, but that nothing is quantized or timed, and that the scenario is redyk
for any teacher. Peaks are of MLX's arrays; what the process held more than before the run is beside
them in the JSON. Gaps closed are in bits per byte of the held-out texts. Finished rows are not run
again. Writes benchmarks/results/<machine>/ways-<teacher>.json after every row.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laboratory import bits_per_byte, count_anew, resumed, write

from mis_mlx import cli, distill
from mis_mlx.reporting import run_reader
from mis_mlx.reporting.text import markdown_table

WAYS = ("resident", "blocks", "lora", "sharded")
BUDGETS = ("5GiB", "2GiB", "1GiB", "600MiB")


@dataclass(frozen=True)
class Settings:
    """How much."""

    rows: tuple[str, ...] = BUDGETS
    """budgets, and ways: resident, blocks, lora, sharded"""
    teacher: str | None = None
    """default: SmolLM2-135M-Instruct"""
    iters: int | None = None
    """steps of distillation; default: distill's own"""
    seed: int = 0
    """of text, batches and adapters"""
    table: bool = False
    """print what there is, and make nothing"""


def row(s: Settings, name: str, out: Path) -> dict[str, Any]:
    """One run."""
    flags: dict[str, Any] = {"train": name} if name in WAYS else {"budget": name}
    count_anew()
    began = time.process_time()
    flags |= {"scenario": "redyk", "quantize": 0, "bench_tokens": 0}
    result = distill.run(
        distill.Settings(teacher=s.teacher, iters=s.iters, seed=s.seed, out=str(out), **flags)
    )
    run = run_reader.read(out)
    phases = {p["phase"]: p for p in run.phases}
    found = {
        "way": result["mode"],
        "budget_bytes": result["budget_bytes"],
        "peak_bytes": max(p["peak_bytes"] for p in phases.values()),
        "process_peak_bytes": result["peak_bytes"],
        "peaks": {name: p["peak_bytes"] for name, p in phases.items()},
        "cpu_seconds": round(time.process_time() - began, 1),
        "seconds": {name: round(p["seconds"], 1) for name, p in phases.items()},
    }
    return found | {"bits_per_byte": bits_per_byte(run.table)}


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    texts = list(next(iter(rows.values()))["bits_per_byte"]) if rows else []
    head = ["", "way", "MLX's peak, MB", "of budget", "minutes", "of one core"]
    head += [f"{text}, gap closed" for text in texts]
    body = []
    for name, r in rows.items():
        size = [f"{r['peak_bytes'] / 1e6:,.0f}", f"{r['peak_bytes'] / r['budget_bytes']:.2f}"]
        minutes = [f"{sum(r['seconds'].values()) / 60:.1f}", f"{r['cpu_seconds'] / 60:.1f}"]
        gaps = []
        for text in texts:
            teacher, pruned, distilled = r["bits_per_byte"][text]
            gaps.append(f"{(pruned - distilled) / (pruned - teacher):.1%}")
        body.append([name, r["way"], *size, *minutes, *gaps])
    return markdown_table(head, body)


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    name = f"ways-{Path(s.teacher).name if s.teacher else 'default'}" + (
        f"-{s.seed}" if s.seed else ""
    )
    given = {"iters": s.iters, "seed": s.seed}
    rows = resumed(name, given, ["rows"]).get("rows", {})
    for wanted in () if s.table else s.rows:
        if wanted not in rows:
            with tempfile.TemporaryDirectory() as temp:
                rows[wanted] = row(s, wanted, Path(temp) / "run")
            command = "scripts/mis benchmarks/ways.py" + (
                f" --teacher {s.teacher}" if s.teacher else ""
            )
            command += f" --seed {s.seed}" * bool(s.seed)
            write(name, command, {"given": given, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main(cli.parse(Settings))
