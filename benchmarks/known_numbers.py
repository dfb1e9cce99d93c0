"""Numbers that others know, of a teacher and its student: IFEval, BLiMP; and our own grammar and
tools.

    scripts/mis benchmarks/known_numbers.py --run runs/NAME --ifeval FILE --blimp FILE
    scripts/mis benchmarks/known_numbers.py --run runs/NAME --ifeval FILE --ifeval-step 8
    scripts/mis benchmarks/known_numbers.py --teacher FOLDER --name NAME --run FOLDER --blimp FILE
    scripts/mis scripts/render.py     # puts the default teacher's into docs/results.md

--run is a finished run of distill, or a folder whose `model` is what `quantize` wrote. The files
are for measuring only and no part of this repository (docs/evaluation.md says where they come
from). --models and --measures name a part of both. IFEval is strict and loose, at the level of
prompts and of instructions; answers are greedy, of 512 tokens at most. Beside them stand
`grammar-en`, and what the student's own judge says: bits per byte of the teacher's answers above
the teacher, and how many answers repeat themselves. For a model whose template knows tools,
`--measures tool-calls tool-rounds` asks --tool-prompts of each (docs/evaluation.md says which).
Packed weights are judged as float32.

All 541 prompts take about half an hour of one core for one model, all 6,699 pairs about 10 minutes.
A step of 8 asks every eighth. Answers are kept, so the same command goes on after a stop, and a
smaller step asks only what is new. Writes benchmarks/results/<machine>/known_numbers.json after
every figure; with --name, known_numbers-<name>.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from laboratory import packed, resumed, start, write

from mis_mlx import cli
from mis_mlx.hardware import memory
from mis_mlx.judge import answers, repetition
from mis_mlx.judge.tasks import (
    answering,
    instructions,
    questions,
    task_answers,
    task_registry,
    tool_tasks,
)
from mis_mlx.judge.tasks.questions import Task
from mis_mlx.maths import stats
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.settings import recipe
from mis_mlx.types import Checkpoint, Count, MisError

RESULT = "known_numbers"
PACKED = "teacher, MLX's 4 bits"
ROUNDED = "4-bit"
# Columns of the run; None: the teacher, whole or as mlx_lm.convert packs it.
MODELS: dict[str, str | None] = {
    "teacher": None,
    "distilled": "distilled",
    ROUNDED: "model",
    PACKED: None,
}
MEASURES = ("grammar-en", "blimp", "ifeval", "answers")
TOOLS = (tool_tasks.CALLS, tool_tasks.ROUNDS)
CARD = 29.9  # IFEval of SmolLM2-135M-Instruct by its model card, percent
GRAMMAR = "grammar-en"
ALL_QUESTIONS = 100_000


@dataclass(frozen=True)
class Settings:
    """What is measured, on what."""

    run: str | None = None
    """folder of a finished run of distill; its students are measured"""
    teacher: str | None = None
    """default: SmolLM2-135M-Instruct"""
    name: str | None = None
    """what to call another teacher in the results"""
    label: str = ROUNDED
    """what to call the row of the run's rounded student, where several runs have one"""
    ifeval: str | None = None
    """file of IFEval's prompts, .jsonl"""
    blimp: str | None = None
    """file of BLiMP's pairs, .jsonl"""
    ifeval_step: Count = 1
    """ask every n-th prompt"""
    blimp_step: Count = 1
    """ask every n-th pair"""
    models: tuple[str, ...] = tuple(MODELS)
    """which, of those in MODELS"""
    measures: tuple[str, ...] = MEASURES
    """which, of those in MEASURES and TOOLS"""
    tool_prompts: Count = 400
    """of each of TOOLS; of rounds, as many conversations as these make, or all"""


def opened(name: str, s: Settings, place: Path) -> tuple[Checkpoint, float]:
    """(a model, its weights in MB on disk). place: an empty folder for a packed teacher."""
    source = resolve.resolve_model(s.teacher).path
    part = MODELS[name]
    if part is not None:
        if s.run is None:
            raise MisError(f"--run is not given, which holds the model {name!r}: name a run")
        student = compute_type.open_to_compute(Path(s.run) / part)
        return student, student.nbytes / 1e6
    if name != PACKED:
        teacher = compute_type.open_to_compute(source)
        return teacher, teacher.nbytes / 1e6
    rounded = compute_type.open_to_compute(packed(source, place / "packed"))
    # The same numbers as float32 weights: MLX's 4-bit kernels are ten times slower on a CPU.
    load.mlx_lm("convert").convert(
        str(rounded.path), str(place / "wide"), dequantize=True, dtype="float32"
    )
    return compute_type.open_to_compute(place / "wide"), rounded.nbytes / 1e6


def percent(marks: Sequence[float] | np.ndarray) -> dict[str, float]:
    """{"mean", "low", "high"} of marks, in percent, 95 % over questions; few say from 0 to 100."""
    mean, low, high = np.clip(stats.interval(100 * np.asarray(marks)), 0, 100)
    return {"mean": round(mean, 2), "low": round(low, 2), "high": round(high, 2)}


def chosen(model: Checkpoint, task: Task, step: int) -> dict[str, Any]:
    """How often a model finds the right option, of every `step`-th question."""
    numbers = range(0, len(task.questions), step)
    records = answering.asked(
        model, answering.sha256(model), task, limit=memory.budget(None), numbers=numbers
    )
    marks = [answering.mark_of(task, number, records[number]) for number in numbers]
    return {"questions": len(marks), **percent(marks)}


def followed(model: Checkpoint, task: Task, step: int) -> dict[str, Any]:
    """IFEval's accuracies in percent, of every `step`-th prompt.

    "mean", with its interval, is the published number: that of both strict accuracies.
    """
    numbers = range(0, len(task.questions), step)
    records = answering.asked(
        model, answering.sha256(model), task, limit=memory.budget(None), numbers=numbers
    )
    texts = [records[number]["text"] for number in numbers]
    counts = [len(task.questions[number].instructions) for number in numbers]
    strictly = [int(records[number]["followed"]) for number in numbers]
    loosely = [
        int(count) for count in task_answers.count_followed(task, numbers, texts, loosely=True)
    ]
    strict = instructions.levels(strictly, counts)
    loose = instructions.levels(loosely, counts)
    return {
        "questions": len(counts),
        "instructions": sum(counts),
        "prompt_strict": round(100 * strict.prompt_strict, 2),
        "inst_strict": round(100 * strict.inst_strict, 2),
        **percent(instructions.marks(strictly, counts)),
        "prompt_loose": round(100 * loose.prompt_strict, 2),
        "inst_loose": round(100 * loose.inst_strict, 2),
        "mean_loose": round(100 * loose.mean, 2),
    }


def called(model: Checkpoint, s: Settings, name: str) -> dict[str, Any]:
    """How often a model calls the right tools, rightly, in percent; of rounds, until it fails.

    Of the first prompts; answers to more of them, or to fewer, are kept together. "above_teacher":
    the difference from the teacher on the same prompts, in points.
    """
    (task,) = tool_tasks.tasks([name], ALL_QUESTIONS)
    (first,) = tool_tasks.tasks([name], s.tool_prompts)
    numbers = range(len(first.questions))

    def calls_of(asked: Checkpoint) -> list[tool_tasks.Calls]:
        sha256 = answering.sha256(asked)
        records = answering.asked(asked, sha256, task, limit=memory.budget(None), numbers=numbers)
        return [records[number]["calls"] for number in numbers]

    calls = calls_of(model)
    marks = tool_tasks.marks(first, calls)
    figure: dict[str, Any] = {"questions": len(numbers), **percent(marks)}
    teacher = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path)
    if model.path != teacher.path:
        above = 100 * (marks - tool_tasks.marks(first, calls_of(teacher)))
        figure["above_teacher"] = [round(value, 2) for value in stats.interval(above)]
    return {**figure, "shares": tool_tasks.shares(first, calls)}


def judged(model: Checkpoint, s: Settings) -> dict[str, Any]:
    """The model's answers to our held-out prompts beside the teacher's; {} without a template."""
    teacher = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path)
    models = {"teacher": teacher}
    if model.path != teacher.path:
        models["student"] = model
    name = list(models)[-1]
    prompts = answers.prompts(recipe.EVAL_PROMPTS)
    judgement = answers.judged(
        models, prompts, memory.budget(None), hashes={name: answering.sha256(model)}
    )
    if judgement is None:
        return {}
    figures: dict[str, Any] = {"questions": len(judgement.answers.prompts)}
    for row in judgement.rows:
        if row.model == name and row.metric in ("answers", "answers_excess", "loops"):
            figures[row.metric] = round(row.value, 4)
    return figures


def measuring(s: Settings) -> dict[str, Callable[[Checkpoint], dict[str, Any]]]:
    """{measure: what takes it of a model}, of those asked for. MisError where a file is missing."""
    files = {"ifeval": s.ifeval, "blimp": s.blimp}
    for name, file in files.items():
        if name in s.measures and file is None:
            raise MisError(f"--{name} is not given: name its file, or leave it out of --measures")
    own = ("answers", *TOOLS)
    wanted = [str(files.get(name) or name) for name in s.measures if name not in own]
    asked = task_registry.find(wanted, ALL_QUESTIONS).tasks if wanted else ()
    by_name = {Path(file).stem: name for name, file in files.items() if file}
    task_of = {by_name.get(task.name, task.name): task for task in asked}
    steps = {"ifeval": s.ifeval_step, "blimp": s.blimp_step, GRAMMAR: 1}

    def of_task(name: str) -> Callable[[Checkpoint], dict[str, Any]]:
        measure = followed if task_of[name].kind == "instructions" else chosen
        return lambda model: measure(model, task_of[name], steps[name])

    def of_tools(name: str) -> Callable[[Checkpoint], dict[str, Any]]:
        return lambda model: called(model, s, name)

    measures: dict[str, Callable[[Checkpoint], dict[str, Any]]] = {}
    for name in s.measures:
        if name in TOOLS:
            measures[name] = of_tools(name)
        elif name in task_of:
            measures[name] = of_task(name)
        else:
            measures[name] = lambda model: judged(model, s)
    return measures


def check_names(s: Settings) -> None:
    """MisError where a model or a measure is unknown."""
    for flag, given, known in (
        ("models", s.models, tuple(MODELS)),
        ("measures", s.measures, (*MEASURES, *TOOLS)),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise MisError(f"--{flag} names {unknown[0]!r}: known are {', '.join(known)}")


def command(s: Settings, rows: Mapping[str, Any]) -> str:
    """What makes all of these rows' figures, without this machine's paths."""
    measures = [name for name in (*MEASURES, *TOOLS) if any(name in row for row in rows.values())]
    words = "scripts/mis benchmarks/known_numbers.py --run runs/NAME"
    if s.name:
        words += f" --teacher FOLDER --name {s.name}"
    if s.label in rows and s.label != ROUNDED:
        words += " --label LABEL"
    steps = {"ifeval": s.ifeval_step, "blimp": s.blimp_step}
    for name in steps:
        if name in measures:
            words += f" --{name} FILE"
    for name, step in steps.items():
        if step > 1:
            words += f" --{name}-step {step}"
    if measures != list(MEASURES):
        words += f" --measures {' '.join(measures)}"
    if set(TOOLS) & set(measures):
        words += f" --tool-prompts {s.tool_prompts}"
    return words


def main(s: Settings) -> None:
    """Every figure that is not there yet."""
    check_names(s)
    result = f"{RESULT}-{s.name}" if s.name else RESULT
    measures = measuring(s)
    given = {
        "max_tokens": questions.INSTRUCTION_TOKENS,
        "ifeval_step": s.ifeval_step,
        "blimp_step": s.blimp_step,
        "loops_version": repetition.VERSION,
    }
    card = {} if s.name else {"card": CARD}
    rows: dict[str, Any] = resumed(result, given, ["rows"]).get("rows", {})
    for name in s.models:
        label = s.label if name == ROUNDED else name
        missing = [measure for measure in s.measures if measure not in rows.get(label, {})]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as temp:
            model, megabytes = opened(name, s, Path(temp))
            for measure in missing:
                row = rows.setdefault(label, {"mb": round(megabytes, 1)})
                row[measure] = measures[measure](model)
                cli.say(f"{label}, {measure}: {row[measure]}")
                write(result, command(s, rows), {"given": given, **card, "rows": rows})


if __name__ == "__main__":
    start(Settings, main)
