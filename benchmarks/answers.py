"""What a student answers: the default run with conversations in its text, without them, and what
was tried beside.

    scripts/mis benchmarks/answers.py --seed 0    # then 1 and 2; a row takes a quarter of an hour
    on 2 cores
    scripts/mis benchmarks/answers.py --only "MLX's 4 bits"    # the teacher as mlx_lm.convert packs
    it
    scripts/mis benchmarks/answers.py --table

Students of SmolLM2-135M-Instruct, or of --teacher, by distill's defaults but for what a row says.
All are judged by the held-out prompts (judge/prompts.jsonl, English and Polish apart):
bits per byte above the teacher of the teacher's sampled answers, and of 120 own greedy answers of
96 tokens those that repeat themselves; then by the texts of other kinds of teacher_text.py, and the
run's own held-out text. Finished rows are not made again. Writes
benchmarks/results/<machine>/answers-<seed>.json after every row, and into --said what the models
said.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import teacher_text
from laboratory import bits_per_byte, packed, resumed, start, stored, write

from mis_mlx import cli, distill
from mis_mlx.data import preparation
from mis_mlx.distillation import conversations
from mis_mlx.hardware import memory
from mis_mlx.judge import answers, repetition
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.reporting import run_reader
from mis_mlx.reporting.text import markdown_table
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint

PACKED = "MLX's 4 bits"
# a third of the parameters goes, the default before sizes followed from a loss
THIRD = {"scenario": "redyk"}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "a third less": THIRD,
    "no conversations": {**THIRD, "conversations": 0.0},
    "a quarter": {**THIRD, "conversations": 0.25},
    "three quarters": {**THIRD, "conversations": 0.75},
    "120 steps": {**THIRD, "iters": 120},
    "300 steps": {**THIRD, "iters": 300},
    "more parameters": {"scenario": "none", "vocab": "0.5x", "ffn": 1280, "iters": 60},
    "only tokens": {"scenario": "none", "vocab": "0.5x"},
}
SEEDS = (0, 1, 2)
EVAL_WINDOWS = 6  # of each text of another kind
ALL_PROMPTS = 10_000
FIGURES = ("answers_excess", "loops", "endless", "teacher_logprob")
STAGES = ("distilled", "4-bit")


@dataclass(frozen=True)
class Settings:
    """How much."""

    seed: int = 0
    """of a row's run"""
    teacher: str | None = None
    """default: SmolLM2-135M-Instruct"""
    only: tuple[str, ...] = ("default",)
    """rows, of those in ROWS, and the teacher in MLX's 4 bits"""
    runs: str | None = None
    """folder for the runs' folders, which are then kept; one that is finished there is judged as it
    is
    """
    said: str | None = None
    """file for what the models said, one JSON object a line"""
    table: bool = False
    """print what there is of all seeds, and make nothing"""


def answered(
    teacher: Checkpoint, students: dict[str, Checkpoint], said: str | None
) -> dict[str, dict[str, float]]:
    """{"student, language": {figure: value}} of all held-out prompts."""
    judged = answers.judged(
        {"teacher": teacher, **students}, answers.prompts(ALL_PROMPTS), memory.budget(None)
    )
    if judged is None:
        return {}
    if said:
        with Path(said).open("a", encoding="utf-8") as file:
            for shown in conversations.answer_rows(judged):
                file.write(json.dumps(shown, ensure_ascii=False) + "\n")
    found = dict[str, dict[str, float]]()
    for language, rows in conversations.tables(judged).items():
        for row in rows:
            if row.metric in FIGURES or row.metric == "answers":
                found.setdefault(f"{row.model}, {language}", {})[row.metric] = round(row.value, 4)
    return found


def row(label: str, s: Settings, run: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Figures of one run's student, as distilled and rounded."""
    if (run / run_folder.RESULT).is_file():
        done = run_folder.stored_settings(run, run_folder.RESULT)
    else:
        asked = distill.Settings(
            out=str(run), teacher=s.teacher, seed=s.seed, bench_tokens=0, eval_prompts=0
        )
        done = distill.run(asked.with_values(**ROWS[label]))
    teacher = compute_type.open_to_compute(Path(done["teacher"]))
    folders_of = {"distilled": run / "distilled", "4-bit": run / "model"}
    students = {name: compute_type.open_to_compute(folder) for name, folder in folders_of.items()}
    found: dict[str, Any] = {"params": done["params_student"], "bytes": done["bytes_4-bit"]}
    read = run_reader.read(run)
    found["seconds"] = {name: round(seconds, 1) for name, seconds in read.took().items()}
    found["held out"] = bits_per_byte(read.table)
    found["answers"] = answered(teacher, students, s.said)
    for name, folder in folders_of.items():
        bits = teacher_text.judged(s.teacher, folder, folders, EVAL_WINDOWS)
        found[f"other kinds, {name}"] = {
            text: round(of["student"] - of["teacher"], 4) for text, of in bits.items()
        }
    return found


def packed_row(s: Settings, place: Path) -> dict[str, Any]:
    """The teacher as mlx_lm.convert packs it."""
    source = resolve.resolve_model(s.teacher).path
    teacher = compute_type.open_to_compute(source)
    rounded = compute_type.open_to_compute(packed(source, place / "packed"))
    # The same numbers as float32 weights: MLX's 4-bit kernels are ten times slower on a CPU.
    load.mlx_lm("convert").convert(
        str(rounded.path), str(place / "4-bit"), dequantize=True, dtype="float32"
    )
    model = compute_type.open_to_compute(place / "4-bit")
    return {"bytes": rounded.nbytes / 1e6, "answers": answered(teacher, {"4-bit": model}, s.said)}


def mean(found: dict[str, float]) -> float:
    """Of the texts of other kinds."""
    return sum(found.values()) / len(found)


def table(teacher: str | None) -> str:
    """Markdown: a line a row and stage, seeds beside each other."""
    stores = [stored(name_of(seed, teacher)).get("rows", {}) for seed in SEEDS]
    lines = list[list[str]]()
    for label in [*ROWS, PACKED]:
        rows = [rows[label] for rows in stores if label in rows]
        for stage in STAGES if rows else ():
            cells = [_cells(of, stage) for of in rows]
            if any(cells):
                columns = [
                    ", ".join(filter(None, column))
                    for column in zip(*filter(None, cells), strict=True)
                ]
                lines.append([f"{label}, {stage}", *columns])
    head = [
        "",
        "MB",
        "answers above the teacher",
        "loops, %",
        "Polish answers",
        "other kinds",
        "documentation",
    ]
    return markdown_table(head, lines)


def _cells(found: dict[str, Any], stage: str) -> list[str]:
    """What one row's student has, as text; [] where this stage was not judged."""
    english = found["answers"].get(f"{stage}, English")
    if english is None:
        return []
    polish = found["answers"].get(f"{stage}, Polish", {})
    kinds = found.get(f"other kinds, {stage}")
    documentation = ""
    if "held out" in found:
        bits = found["held out"]["English"]
        documentation = f"{bits[2 + STAGES.index(stage)] - bits[0]:.3f}"
    nbytes = found["bytes"] if stage == "4-bit" else found["params"] * 2 / 1e6
    return [
        f"{nbytes:.1f}",
        f"{english['answers_excess']:.3f}",
        f"{english['loops']:.0f}",
        f"{polish['answers_excess']:.3f}" if polish else "",
        f"{mean(kinds):.3f}" if kinds else "",
        documentation,
    ]


def name_of(seed: int, teacher: str | None) -> str:
    """The result file's."""
    return f"answers-{Path(teacher).name}-{seed}" if teacher else f"answers-{seed}"


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    if s.table:
        print(table(s.teacher))
        return
    given = {
        "eval_windows": EVAL_WINDOWS,
        "shares": preparation.SHARES,
        "loops_version": repetition.VERSION,
    }
    name = name_of(s.seed, s.teacher)
    rows = resumed(name, given, ["rows"]).get("rows", {})
    command = f"scripts/mis benchmarks/answers.py --seed {s.seed}" + (
        f" --teacher {s.teacher}" if s.teacher else ""
    )
    with tempfile.TemporaryDirectory() as temp:
        missing = [label for label in s.only if label not in rows]
        folders = teacher_text.texts(Path(temp), s.teacher, with_answers=False) if missing else {}
        for label in missing:
            run = Path(s.runs or temp) / f"{label.replace(' ', '-')}-{s.seed}"
            rows[label] = (
                packed_row(s, Path(temp)) if label == PACKED else row(label, s, run, folders)
            )
            cli.say(f"{label}: {rows[label]}")
            write(name, command, {"given": given, "rows": rows})
    print(table(s.teacher))


if __name__ == "__main__":
    start(Settings, main)
