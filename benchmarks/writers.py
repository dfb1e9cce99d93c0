"""What the writer of a student's conversations is worth, and how many of them: scales that learn.

    scripts/mis benchmarks/writers.py --work FOLDER            # ten minutes a row on 2 busy cores
    scripts/mis benchmarks/writers.py --work FOLDER --seeds 0 1 2 --only teacher:240 itself:240

SmolLM2-135M-Instruct, whole, is rounded to 3 bits in groups of 64 by mlx_lm.convert, which looks at
no text. Then its scales learn from the teacher for the usual 20 steps, on the built-in text with
the usual share of conversations. All rows have the same integers, prompts and steps. They differ by
who wrote the answers: the teacher, the rounded student itself, another model's folder, or nobody,
who leaves the conversations out. Judged by the teacher's answers to 60 other prompts, by loops in
24 own answers, and by a little held-out text.

Finished rows are not made again. Writes benchmarks/results/<machine>/writers.json after every row.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laboratory
import mlx.core as mx
from laboratory import packed, resumed, start, unpacked, write

from mis_mlx import cli
from mis_mlx.data import preparation, prompts
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.judge import answer_figures, answers, comparison, repetition
from mis_mlx.judge.judgement import TeacherAnswers
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings.recipe import TUNE_ITERS
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint

BITS = 3
LENGTH = 256
JUDGING = 60  # prompts
LOOPING = 24  # of these prompts that a student answers in its own words
TEXT_WINDOWS = 4  # of held-out text
ROUNDED = "rounded"  # the row without any step
NOBODY = "nobody"
ROWS = (ROUNDED, NOBODY, "teacher:240", "itself:240", "teacher:48", "teacher:96")


@dataclass(frozen=True)
class Settings:
    """Which rows."""

    work: str = "runs/writers"
    """folder for models and answers"""
    seeds: tuple[int, ...] = (0,)
    """of the windows that steps visit"""
    only: tuple[str, ...] = ROWS
    """rows, as WRITER:ANSWERS; a writer is teacher, itself, or a model's folder"""
    windows: int = 2
    """of a step, 256 tokens each"""


@dataclass(frozen=True)
class Place:
    """What all rows share."""

    work: Path
    teacher: Checkpoint
    rounded: Checkpoint
    judging: TeacherAnswers
    held_out: Windows
    windows: int


def text(teacher: Checkpoint, answered: Path | None) -> preparation.Data:
    """The built-in text, with the conversations of a file or with none."""
    share = None if answered else 0.0
    source = preparation.Source(None, answers=answered, share=share)
    return preparation.prepare(source, load.tokenizer(teacher.path), LENGTH)


def rounded(teacher: Checkpoint, out: Path) -> Checkpoint:
    """The teacher in BITS bits, made unless it is there."""
    if not out.exists():
        packed(teacher.path, out, bits=BITS)
        # mlx_lm writes another one, whose post-processor differs
        shutil.copy(teacher.path / "tokenizer.json", out)
    return compute_type.open_to_compute(out)


def as_floats(folder: Path, out: Path) -> Checkpoint:
    """The same numbers as float32 weights, which a CPU computes with ten times faster."""
    if not out.exists():
        unpacked(folder, out)
    return compute_type.open_to_compute(out)


def answers_of(place: Place, writer: str, count: int) -> Path:
    """The file of `count` answers of a writer, made unless it is there."""
    out = place.work / f"answers-{Path(writer).name}-{count}.jsonl"
    if out.exists():
        return out
    asked = prompts.train(count)
    if writer == "teacher":  # what ships with the package is the default teacher's
        first = {prompt.turns[0] for prompt in asked}
        shipped = run_folder.records(preparation.ANSWERS)
        kept = [row for row in shipped if row["messages"][0]["content"] in first]
        teacher_answers.write_rows(out, kept)
        return out
    model = compute_type.open_to_compute(writer) if Path(writer).is_dir() else None
    if model is None:
        model = as_floats(place.rounded.path, place.work / "rounded-floats")
    how = teacher_answers.WritingSettings(asked)
    teacher_answers.write(model, how, out, memory.budget(None))
    return out


def learned(place: Place, train: Windows, seed: int, out: Path) -> None:
    """Write `out`: the rounded student after its steps on these windows."""
    laboratory.tuned(
        place.rounded.path,
        out,
        taught_by=place.teacher,
        train=train,
        q_iters=TUNE_ITERS,
        seed=seed,
        batch_size=place.windows,
    )


def judged(place: Place, student: Checkpoint) -> dict[str, Any]:
    """The figures of a student, in bits per byte above the teacher, and its loops."""
    cost = answers.bits(student, place.judging)
    own = answers.prompts(LOOPING)
    said = answers.greedy(student, own, memory.budget(None))
    teacher = place.judging.as_model
    rows = answer_figures.rows_of("student", cost, said, teacher_bits=teacher.bits)
    by_metric = {row.metric: row for row in rows}
    excess = by_metric["answers_excess"]
    models = {"teacher": place.teacher, "student": student}
    compared = comparison.rows_of(comparison.compare(models, place.held_out), place.held_out)
    found: dict[str, Any] = {
        "excess": round(excess.value, 4),
        "low": round(excess.low or 0.0, 4),
        "high": round(excess.high or 0.0, 4),
        "loops": round(by_metric["loops"].value * len(said) / 100),
        "endless": round(by_metric["endless"].value * len(said) / 100),
    }
    for row in compared:
        if row.model == "student":
            found[f"text, {row.metric}"] = round(row.value, 4)
    mx.clear_cache()
    return found


def row(place: Place, label: str, seed: int) -> dict[str, Any]:
    """Everything that is stored of a row."""
    began = time.monotonic()
    found: dict[str, Any] = {}
    if label == ROUNDED:
        student = as_floats(place.rounded.path, place.work / "rounded-floats")
    else:
        file = None
        if label != NOBODY:
            writer, _, count = label.rpartition(":")
            file = answers_of(place, writer, int(count))
            found["conversations"] = len(run_folder.records(file))
            found["writing_seconds"] = round(time.monotonic() - began)
        out = place.work / "learned"
        train = text(place.teacher, file).train
        learned(place, train, seed, out)
        student = as_floats(out, place.work / "learned-floats")
    found |= judged(place, student)
    for name in ("learned", "learned-floats"):
        shutil.rmtree(place.work / name, ignore_errors=True)
    return {**found, "seconds": round(time.monotonic() - began)}


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    work = Path(s.work)
    work.mkdir(parents=True, exist_ok=True)
    teacher = compute_type.open_to_compute(resolve.resolve_model().path)
    given = {
        "bits": BITS,
        "steps": TUNE_ITERS,
        "windows": s.windows,
        "prompts": JUDGING,
        "own_answers": LOOPING,
        "text_windows": TEXT_WINDOWS,
        "loops_version": repetition.VERSION,
    }
    rows = resumed("writers", given, ["rows"]).get("rows", {})
    held_out = text(teacher, None).held_out["English"]
    judging = answers.teacher_answers(teacher, answers.prompts(JUDGING), memory.budget(None))
    place = Place(
        work=work,
        teacher=teacher,
        rounded=rounded(teacher, work / "rounded"),
        judging=judging,
        held_out=comparison.spread_windows(held_out, TEXT_WINDOWS),
        windows=s.windows,
    )
    for seed in s.seeds:
        for label in s.only:
            name = label if label == ROUNDED else f"{label}, {seed}"
            if name not in rows:
                rows[name] = row(place, label, seed)
                cli.say(f"{name}: {rows[name]}")
                write(
                    "writers", "scripts/mis benchmarks/writers.py", {"given": given, "rows": rows}
                )
    lines = []
    for name, of in rows.items():
        interval = f"{of['excess']:.3f} ({of['low']:.3f} to {of['high']:.3f})"
        lines.append([name, str(of.get("conversations", "")), interval, str(of["loops"])])
    head = [
        "who answers, seed",
        "conversations",
        "answers above the teacher",
        f"loops of {LOOPING}",
    ]
    print(markdown_table(head, lines, words=1))


if __name__ == "__main__":
    start(Settings, main)
