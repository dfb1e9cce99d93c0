"""What carries over to text of other kinds: the default, the first edition's default, and
Minitron's recipe.

    scripts/mis benchmarks/carried.py --seed 0    # then 1 and 2: 40 minutes each, one core
    scripts/mis benchmarks/carried.py --table

SmolLM2-135M-Instruct less a third, 30 steps, nothing quantized. `default`: distill without flags.
`first edition`: its default of 2026-11-25, scenario gazda, all tokens, and the built-in text of
then, without what a model wrote. `Minitron`: GÓRAL's shape, neurons by activation, blocks by 1 -
cosine, no repair, 3e-4 (benchmarks/recovery.py), on the default's text. Judged in bits per byte
above the teacher's, on the texts of teacher_text.py and on the held-out parts of the built-in text.
Finished rows are not run again. Writes benchmarks/results/<machine>/carried-<seed>.json after every
row.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import teacher_text
from laboratory import resumed, start, stored, write

from mis_mlx import cli, distill
from mis_mlx.data import preparation
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings import recipe

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "first edition": {"scenario": "gazda", "conversations": 0.0},
    "Minitron": {
        "scenario": "goral",
        "importance": "activation",
        "reconstruct_samples": 0,
        "learning_rate": 3e-4,
        "iters": recipe.ITERS,
    },
}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """How much."""

    seed: int = 0
    only: tuple[str, ...] = tuple(ROWS)
    """of `default`, `first edition` and `Minitron`"""
    eval_windows: int = 6
    """of each text"""
    table: bool = False
    """print what there is of all seeds, and make nothing"""


def row(label: str, s: Settings, run: Path, folders: dict[str, Path | None]) -> dict[str, Any]:
    """{"params", "bits": {text: bits per byte above the teacher's}} of one student."""
    asked = distill.Settings(
        out=str(run), seed=s.seed, quantize=0, bench_tokens=0, eval_windows=3, **ROWS[label]
    )
    preparation.TEXT_SHARES = teacher_text.SHARES["before" if label == "first edition" else "now"]
    done = distill.run(asked)
    preparation.TEXT_SHARES = teacher_text.SHARES["now"]
    bits = teacher_text.judged(None, run / "model", folders, s.eval_windows)
    excess = {text: round(of["student"] - of["teacher"], 4) for text, of in bits.items()}
    return {"params": done["params_student"], "bits": excess}


def mean(row: dict[str, Any]) -> float:
    """Of the texts that neither the training text nor the teacher's answers are."""
    own = teacher_text.ANSWERS, teacher_text.BUILT_IN
    six = [value for text, value in row["bits"].items() if not text.startswith(own)]
    return sum(six) / len(six)


def table() -> str:
    """Markdown: every text, seeds beside each other."""
    seeds = [stored(f"carried-{seed}").get("rows") for seed in SEEDS]
    found = [rows for rows in seeds if rows]
    measured = set().union(*found)
    labels = [label for label in ROWS if label in measured]

    def cells(value: Any) -> list[str]:
        made = []
        for label in labels:
            of_seeds = [f"{value(rows[label]):.3f}" for rows in found if label in rows]
            made.append(", ".join(of_seeds))
        return made

    texts = list(found[0][labels[0]]["bits"]) if found else []
    body = [[text, *cells(lambda row, text=text: row["bits"][text])] for text in texts]
    return markdown_table(["", *labels], [*body, ["mean of the six", *cells(mean)]])


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"eval_windows": s.eval_windows}
    name = f"carried-{s.seed}"
    rows = resumed(name, given, ["rows"]).get("rows", {})
    with tempfile.TemporaryDirectory() as temp:
        missing = () if s.table else [label for label in s.only if label not in rows]
        folders = (
            {**teacher_text.texts(Path(temp), None), teacher_text.BUILT_IN: None} if missing else {}
        )
        for label in missing:
            rows[label] = row(label, s, Path(temp) / label.replace(" ", "-"), folders)
            cli.say(
                f"{label}: {mean(rows[label]):.3f} bits per byte above the teacher, {rows[label]}"
            )
            write(
                name,
                f"scripts/mis benchmarks/carried.py --seed {s.seed}",
                {"given": given, "rows": rows},
            )
    print(table())


if __name__ == "__main__":
    start(Settings, main)
