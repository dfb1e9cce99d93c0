"""What more steps buy: the default run with more and fewer of them, on its own kinds of text and on
others.

    scripts/mis benchmarks/minutes.py                  # 8, 30, 120 steps: an hour on 2 cores
    scripts/mis benchmarks/minutes.py --iters 300
    scripts/mis benchmarks/minutes.py --iters 2400 --runs runs/night    # 3 hours; stopped, it goes
    on there
    scripts/mis benchmarks/minutes.py --iters 2400 --runs runs/night --questions 100    # 3 minutes
    more
    scripts/mis benchmarks/minutes.py --table

SmolLM2-135M-Instruct, distill's defaults but for the steps, nothing quantized. Judged in bits per
byte above the teacher's: "manual" and "Miś" are the held-out windows of the run itself, the others
the texts of teacher_text.py, which no part of training, calibration or choice of tokens saw.
Finished rows are not run again. Writes benchmarks/results/<machine>/minutes-<seed>.json after every
row. The table's minutes are what two quiet cores would take, by the phases of the stored default
run (distill-default.json).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import teacher_text
from laboratory import bits_per_byte, resumed, start, stored, write

from mis_mlx import cli, distill, evaluate
from mis_mlx.reporting import run_reader
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings import recipe
from mis_mlx.storage import run_folder

OWN = {"manual": "English", "Miś": "Polish"}
EVAL_WINDOWS = 6  # of each other text
TASKS = "grammar-en", "continue"


@dataclass(frozen=True)
class Settings:
    """How much."""

    iters: tuple[int, ...] = (8, 30, 120)
    """steps of distillation, a row each"""
    seed: int = 0
    """of batches and windows"""
    runs: str | None = None
    """folder for the runs' folders, which are then kept: a night's run that was stopped goes on
    there
    """
    questions: int = 0
    """of each of grammar-en and continue, to the students in `runs`; 0: none"""
    table: bool = False
    """print what there is, and make nothing"""


def row(iters: int, seed: int, run: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """{"seconds" by phase, "pruned" and "distilled": bits per byte above the teacher's, by
    text}.
    """
    begun = run_folder.is_run(run)
    distill.run(
        distill.Settings(
            out=str(run), resume=begun, iters=iters, seed=seed, quantize=0, bench_tokens=0
        )
    )
    done = run_reader.read(run)
    found: dict[str, Any] = {
        "seconds": {name: round(seconds, 1) for name, seconds in done.took().items()}
    }
    bits = bits_per_byte(done.table)
    for at, stage in enumerate(("pruned", "distilled"), 1):
        found[stage] = {own: round(bits[text][at] - bits[text][0], 3) for own, text in OWN.items()}
    for name, of in teacher_text.judged(None, run / "model", folders, EVAL_WINDOWS).items():
        found["distilled"][name] = round(of["student"] - of["teacher"], 4)
    return found


def recovered(student: Path, questions: int) -> dict[str, list[float]]:
    """{task: [share that is left of what the teacher has above chance, its 95 % interval]}."""
    done = evaluate.run(
        evaluate.Settings(students=(str(student),), tasks=TASKS, num_questions=questions)
    )
    shares = {}
    for task, by_student in done["recovered"].items():
        shares[task] = [round(value, 3) for value in by_student[student.name]]
    return shares


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, fewest steps first."""
    ordered = sorted(rows.items(), key=lambda item: int(item[0]))
    took = stored("distill-default")["phases"]
    texts = list(ordered[0][1]["distilled"]) if rows else []
    body = []
    for steps, r in ordered:
        minutes = sum(took[name] for name in r["seconds"]) + took["distil"] * (
            int(steps) / recipe.ITERS - 1
        )
        body.append(
            [steps, f"{minutes / 60:.0f}", *(f"{r['distilled'][text]:.3f}" for text in texts)]
        )
    return markdown_table(["steps", "minutes", *texts], body)


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"eval_windows": EVAL_WINDOWS}
    name = f"minutes-{s.seed}"
    rows = resumed(name, given, ["rows"]).get("rows", {})

    def keep(label: str) -> None:
        cli.say(f"{label} steps: {rows[label]}")
        command = "scripts/mis benchmarks/minutes.py" + f" --seed {s.seed}" * bool(s.seed)
        write(name, command, {"given": given, "rows": rows})

    if not s.table:
        with tempfile.TemporaryDirectory() as temp:
            folders = teacher_text.texts(Path(temp), None)
            runs = Path(s.runs or temp)
            for iters in s.iters:
                run = runs / f"run-{iters}-{s.seed}"
                label = str(iters)
                if label not in rows:
                    rows[label] = row(iters, s.seed, run, folders)
                    keep(label)
                if s.questions and "recovered" not in rows[label] and (run / "model").is_dir():
                    rows[label]["recovered"] = recovered(run / "model", s.questions)
                    keep(label)
    print(table(rows))


if __name__ == "__main__":
    start(Settings, main)
