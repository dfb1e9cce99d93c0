"""Compare students with their teacher on answers, tasks and text."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import conversations
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge import answers, comparison, recovery_table
from mis_mlx.judge.comparison import Models, comparison_cost
from mis_mlx.judge.prompts import Prompt
from mis_mlx.judge.recovery_table import Outcome
from mis_mlx.judge.tasks import answering, examination, task_registry, tool_tasks
from mis_mlx.judge.tasks.examination import Hashes
from mis_mlx.judge.tasks.task_registry import EvaluationSet
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner import estimates
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import html, progress, text
from mis_mlx.storage.files import DISK, need_place
from mis_mlx.types import (
    MOST,
    Budget,
    Checkpoint,
    Count,
    MisError,
    Off,
    Row,
    Tokens,
    Within,
    duration,
    gib,
)

LENGTH = 256  # tokens in a window


@dataclass(frozen=True)
class Settings(cli.Budgeted):
    """Compares any number of models with one teacher that shares their tokenizer."""

    teacher: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    students: tuple[str, ...] = ()
    """model folders"""
    data: str | None = None
    """text that the students were distilled on: a folder with train.jsonl and test.jsonl, or a hub
    id; default: built-in text
    """
    eval_windows: Count = 24
    """held-out windows"""
    max_seq_length: Tokens = LENGTH
    """tokens per window"""
    tasks: tuple[str, ...] = ()
    """answers, tools, builtin, dialects, one of their tasks, your own folders or .jsonl files;
    without --tasks: held-out text
    """
    num_questions: Annotated[int, Within(2, MOST)] = 100
    """questions per task, and prompts for `answers`"""
    apply_chat_template: Annotated[
        bool, Off("ask questions with options as plain text, also of chat models")
    ] = True
    """ask questions with options through the chat template of a model that has one, with each
    option as the reply
    """
    out: str | None = None
    """folder for recovery.md and .json, and answers.jsonl; default: print the table only"""
    dry_run: bool = False
    """with --tasks: check all rows, count questions, bytes and time, and stop before any model
    answers
    """


def _held_out(
    s: Settings,
    models: Models,
    seen: Checkpoint,
    limit: Budget,
) -> tuple[str, dict[str, Any]]:
    """(Markdown, the same for the JSON line), one table for each text.

    seen: the teacher with its students' vocabulary. MisError where the comparison does not fit.
    """
    parts = []
    result = dict[str, Any]()
    teacher = models["teacher"]
    tokenizer = load.tokenizer(seen.path)
    length = s.max_seq_length
    shapes = [model_of(model) for model in models.values()]
    planned = comparison_cost(shapes, s.eval_windows, length).beside(shapes[0].text_bytes)
    estimates.require_fit(limit, planned)
    for name, held_out in preparation.prepare(s.data, tokenizer, length).held_out.items():
        chosen = comparison.spread_windows(held_out, s.eval_windows)
        title = f"{name}, {len(chosen.tokens)} windows of {length} tokens"
        own = None
        if seen is not teacher:
            # Students of a trimmed vocabulary are compared with the trimmed teacher.
            own = token_windows.retokenized(chosen, tokenizer, load.tokenizer(teacher.path))
            title = f"{title}. {comparison.ACROSS}"
        with memory.limited(limit):
            rows = comparison.held_out_rows(models, seen, chosen, own)
        table = text.table(rows, list(models), text.TABLES["held-out"])
        parts.append(f"{title}\n\n{table}")
        result[name] = {f"{row.metric}_{row.model}": row.value for row in rows}
    return "\n\n".join(parts), result


class _Answered(NamedTuple):
    """The models' answers to held-out prompts.

    page: Markdown, a table for each language. result: the same for JSON.
    """

    judgement: answers.Judgement
    page: str
    result: dict[str, Any]


def _answered(
    prompts: list[Prompt],
    models: Models,
    hashes: Hashes,
    limit: Budget,
) -> _Answered | None:
    """All models' answers to held-out prompts.

    None where there are no prompts. MisError where no prompt suits all models.
    """
    if not prompts:
        return None
    with memory.limited(limit):
        judgement = answers.judged(models, prompts, limit, hashes=hashes)
    if judgement is None:
        raise MisError(
            "no prompt fits the chat templates of all these models: leave out a student, or the "
            "task `answers`"
        )
    result: dict[str, Any] = {
        "prompts": len(judgement.answers.prompts),
        "all": _values(judgement.rows),
    }
    by_language = conversations.tables(judgement)
    for language, rows in by_language.items():
        result[language] = _values(rows)
    names = list(judgement.models)
    tables = list[dict[str, Any]]()
    for language, rows in (by_language or {"all languages": judgement.rows}).items():
        table = text.table(rows, names, text.TABLES["answers"])
        tables.append({"language": language, "prompts": rows[0].n, "table": table})
    values = {"answers": tables, "verdict": "", "lead": "", "dialogue": "", "expectation": ""}
    return _Answered(judgement, html.document("answers.md", values), result)


def _values(rows: list[Row]) -> dict[str, float]:
    """{metric_model: value}."""
    return {f"{row.metric}_{row.model}": round(row.value, 4) for row in rows}


def _plan(
    s: Settings,
    wanted: EvaluationSet,
    models: Models,
    hashes: Hashes,
    *,
    seen: Checkpoint,
    limit: Budget,
    prompts: list[Prompt],
) -> dict[str, Any]:
    """Peak and time of all that is still to be asked; said aloud.

    seen: the teacher with its students' vocabulary. MisError where something does not fit.
    """
    shapes = [model_of(model) for model in models.values()]
    asked = list[StageCost | None]()
    for name, model in models.items():
        for task in wanted.tasks:
            asked.append(answering.plan(model, hashes[name], task, limit))
    if prompts:
        asked.append(answers.plan(models, prompts, limit, hashes))
    for task in wanted.tasks:
        if task.kind in tool_tasks.KINDS:
            count, length = tool_tasks.right_calls(task, load.tokenizer(seen.path)).tokens.shape
            comparing = comparison_cost(shapes, count, length).beside(shapes[0].text_bytes)
            estimates.require_fit(limit, comparing)
            asked.append(comparing)
    phases = [phase for phase in asked if phase]
    known = ""
    if len(phases) < len(asked):
        known = f", {len(asked) - len(phases)} of {len(asked)} reused from an earlier run"
    if wanted.text:
        comparing = comparison_cost(shapes, s.eval_windows, s.max_seq_length)
        comparing = comparing.beside(shapes[0].text_bytes)
        phases.append(comparing)
        estimates.require_fit(limit, comparing)
    rates = estimates.machine_rates()
    peak = 0
    if phases:
        arrays = max(phase.peak_bytes for phase in phases)
        peak = memory.needed_bytes(arrays)
    seconds = sum(phase.seconds(rates) for phase in phases)
    cli.say(f"peak {gib(peak)}, about {duration(seconds)}{known}")
    return {"peak_bytes": peak, "seconds": seconds}


def _examine(
    s: Settings,
    models: Models,
    seen: Checkpoint,
    hashes: Hashes,
    *,
    limit: Budget,
) -> dict[str, Any]:
    """The tasks: judge the rows, plan, ask all models, print and write the recovery table."""
    began = time.monotonic()
    wanted = task_registry.find(s.tasks, s.num_questions, s.data)
    if not s.apply_chat_template:
        wanted = wanted._replace(tasks=tuple(task.as_text() for task in wanted.tasks))
    for task in wanted.tasks:
        cli.say(f"{task.name}: {len(task.questions)} questions; {task.about}")
    prompts = answers.prompts(s.num_questions) if wanted.answers else []
    plan = _plan(s, wanted, models, hashes, seen=seen, limit=limit, prompts=prompts)
    if s.dry_run:
        counts = {task.name: len(task.questions) for task in wanted.tasks}
        if prompts:
            counts[task_registry.ANSWERS] = len(prompts)
        return {"questions": counts, **plan}
    if s.out:
        DISK.make_folder(Path(s.out))
    answered = _answered(prompts, models, hashes, limit)
    outcomes = list(examination.outcomes(wanted, models, hashes, limit, seen=seen))
    tables = ""
    held_out = dict[str, Any]()
    if wanted.text:
        tables, held_out = _held_out(s, models, seen, limit)
    page = recovery_table.markdown(outcomes, tables)
    if answered:
        page = f"{answered.page}\n\n{page}".strip()
    print(text.aligned(f"\n{page}\n"))
    if s.out:
        result = {
            "sha256": hashes,
            "tasks": [outcome.json() for outcome in outcomes],
            "held_out": held_out,
        }
        _write(Path(s.out), outcomes, page, result, answered=answered)
    count = sum(len(outcome.chance) for outcome in outcomes)
    if answered:
        count += len(prompts)
    cli.say(f"{count} questions, {len(models)} models, {duration(time.monotonic() - began)}")
    return _summary(s, models, outcomes, answered) | {"held_out": held_out}


def _summary(
    s: Settings,
    models: Models,
    outcomes: list[Outcome],
    answered: _Answered | None,
) -> dict[str, Any]:
    """The JSON line, without the figures of held-out text."""
    _, *students = models
    summary: dict[str, Any] = {"answers": answered.result} if answered else {}
    summary["recovered"] = {}
    accuracies = {}
    for outcome in outcomes:
        recovered = {name: outcome.recovered(name) for name in students}
        summary["recovered"][outcome.task] = recovered
        if outcome.levels:
            accuracies[outcome.task] = {
                name: levels.json() for name, levels in outcome.levels.items()
            }
    if accuracies:
        summary["instructions"] = accuracies
    if s.out:
        summary["out"] = s.out
    return summary


def _write(
    out: Path,
    outcomes: list[Outcome],
    page: str,
    result: dict[str, Any],
    *,
    answered: _Answered | None,
) -> None:
    """The files of --out."""
    if answered:
        result["answers"] = answered.result
        conversations.write_answers(answered.judgement, out)
    lines = json.dumps(result, ensure_ascii=False, indent=1)
    DISK.replace_text(out / "recovery.md", page + "\n")
    DISK.replace_text(out / "recovery.json", lines + "\n")


def run(settings: Settings) -> dict[str, Any]:
    """The command: the recovery table where tasks are named, else one table for each text."""
    s = settings
    cli.check_ranges(s)
    if s.out:
        need_place("--out", s.out)
    if (s.out or s.dry_run) and not s.tasks:
        flag = "--out" if s.out else "--dry-run"
        raise MisError(f"{flag} needs --tasks: name some, such as --tasks text")
    limit = memory.budget(s.budget_bytes)
    names = ("teacher", *resolve.labels(s.students, ("teacher",)))
    folders = [resolve.resolve_model(s.teacher).path, *map(Path, s.students)]
    models = {}
    for name, folder in zip(names, folders, strict=True):
        checkpoint = load.open_checkpoint(folder)
        estimates.require_tokenizer(limit, model_of(checkpoint))
        models[name] = estimates.settle_precision(limit, checkpoint)
    teacher, *students = models.values()
    with progress.run("evaluate"), vocabulary.shared(teacher, students) as seen:
        if s.tasks:
            # Kept answers are found by the hash.
            hashes = {name: answering.sha256(model) for name, model in models.items()}
            result = _examine(s, models, seen, hashes, limit=limit)
        else:
            tables, result = _held_out(s, models, seen, limit)
            print(text.aligned(f"\n{tables}"))
        return {"teacher": str(teacher.path), "students": list(s.students), **result}


if __name__ == "__main__":
    cli.main(Settings, run)
