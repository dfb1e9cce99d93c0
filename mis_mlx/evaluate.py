"""Evaluate students against their teacher: the recovery table on tasks, or held-out loss, KL and
agreement.
"""

import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import conversations
from mis_mlx.evaluation import answering, answers, comparison, recovery_table, task_registry
from mis_mlx.evaluation.answer_records import Prompt
from mis_mlx.evaluation.comparison import Models
from mis_mlx.evaluation.recovery_table import Outcome
from mis_mlx.evaluation.task_registry import EvaluationSet
from mis_mlx.hardware import memory
from mis_mlx.models import distributed, load, policy, resolve, stream
from mis_mlx.planner import estimates, machines
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import figures, html, progress, text
from mis_mlx.storage.files import DISK, need_place
from mis_mlx.types import (
    MOST,
    Budget,
    Checkpoint,
    Count,
    MisError,
    Row,
    Tokens,
    Within,
    duration,
    gib,
)

LENGTH = 256  # tokens in a window
Hashes = Mapping[str, str]  # of the models, by name
# name, title, chosen windows, what opens a model
Text = tuple[str, str, token_windows.Windows, comparison.Opened]


@dataclass(frozen=True)
class Settings(cli.Budgeted, policy.Computing):
    """Compare any number of models with one teacher that shares their tokenizer."""

    teacher: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    students: tuple[str, ...] = ()
    """model folders"""
    data: str | None = None
    """what the students were distilled on: a folder with train.jsonl and test.jsonl, or a hub id;
    default: built in
    """
    eval_windows: Count = 24
    """held-out windows"""
    max_seq_length: Tokens | None = None
    """tokens in a window; default: 256, with --kld 512"""
    kld: bool = False
    """llama.cpp's quality report instead, with the teacher as reference, over the second half of
    every window
    """
    tasks: tuple[str, ...] = ()
    """answers, builtin, polish-offline, dialects, polish, english, a part of these, lm_eval/ID,
    folders or .jsonl files of yours; none: held-out text
    """
    num_questions: Annotated[int, Within(2, MOST)] = 100
    """of each task, and prompts of `answers`"""
    out: str | None = None
    """folder for recovery.md, .json, .svg and .html, and answers.jsonl; default: the table on
    stdout alone
    """
    dry_run: bool = False
    """judge all rows, count questions, bytes and time, with --tasks; ask no model"""
    spread: Literal["whole", "layers"] = "whole"
    """of several machines (mlx.launch): each passes its windows and questions through whole models,
    or through its own blocks and sends them on to the next machine, which a model needs that no
    machine holds alone
    """


def _print(words: str) -> None:
    """On stdout; of several machines the first one speaks."""
    if distributed.is_main():
        print(text.aligned(words))


def _kld(
    models: Models, held_out: token_windows.Windows, title: str, opened: comparison.Opened
) -> dict[str, Any]:
    """Print the report on all models but the first, the reference; the same for the JSON line."""
    held_out = comparison.second_half(held_out)
    report = comparison.kld(models, held_out, opened)
    tokens = int((held_out.learn > 0).sum())
    sha256 = token_windows.fingerprint(held_out)
    rows = []
    result = dict[str, Any]({"tokens": tokens, "sha256_tokens": sha256})
    for name, of in report.items():
        for metric, (value, error) in of.items():
            ends = () if error is None else (value - error, value + error)
            rows.append(Row(name, metric, value, *ends))
            result[f"{metric}_{name}"] = value
            if error is not None:
                result[f"{metric}_se_{name}"] = error
    _print(f"\n{title}: the {tokens} tokens of their second halves, ± one standard error\n")
    _print(
        f"{text.table(rows, list(report), text.TABLES['kld'])}\n\nsha256 of the tokens: {sha256}"
    )
    return result


def _texts(
    s: Settings, models: Models, tokenizer: Any, limit: Budget, length: int
) -> Iterator[Text]:
    """Every held-out text, used within the budget, if it fits."""
    planned = estimates.compared(
        [estimates.model_of(m) for m in models.values()], s.eval_windows, length
    )
    estimates.fit(limit, planned)
    # One pass is made of each model: blocks stay in memory only to take the next windows while
    # others work.
    room = estimates.room(limit.limit_bytes, planned.peak_bytes) if s.spread == "layers" else 0

    def opened(model: Checkpoint) -> stream.Stream:
        return machines.opened(
            model, limit, room, s.eval_windows * length, length, s.spread == "layers"
        )

    for name, held_out in preparation.prepare(s.data, tokenizer, length).held_out.items():
        chosen = comparison.chosen(held_out, s.eval_windows)
        distributed.check_same({name: token_windows.fingerprint(chosen)})
        with memory.limited(limit):
            yield name, f"{name}, {len(chosen.tokens)} windows of {length} tokens", chosen, opened


def _held_out(
    s: Settings, models: Models, seen: Checkpoint, limit: Budget
) -> tuple[str, dict[str, Any]]:
    """(Markdown, the same for the JSON line): one table a text. seen: the teacher with its
    students' vocabulary.
    """
    parts = []
    said = dict[str, Any]()
    teacher = models["teacher"]
    tokenizer = load.tokenizer(seen.path)
    for name, title, chosen, opened in _texts(
        s, models, tokenizer, limit, s.max_seq_length or LENGTH
    ):
        rows = comparison.rows_of(
            comparison.together({**models, "teacher": seen}, chosen, opened), chosen
        )
        if seen is not teacher:
            own = token_windows.reread(chosen, tokenizer, load.tokenizer(teacher.path))
            rows = comparison.across(
                rows, comparison.together({"teacher": teacher}, own, opened), own
            )
            title = f"{title}. {comparison.ACROSS}"
        parts.append(f"{title}\n\n{text.table(rows, list(models), text.TABLES['held-out'])}")
        said[name] = {f"{r.metric}_{r.model}": r.value for r in rows}
    return "\n\n".join(parts), said


class _Answered(NamedTuple):
    """What models answered. page: Markdown, a table a language. told: the same for JSON."""

    judgement: answers.Judgement
    page: str
    told: dict[str, Any]


def _answered(
    prompts: list[Prompt], models: Models, hashes: Hashes, limit: Budget
) -> _Answered | None:
    """What all models answer to held-out prompts, on the first machine; None on others, and where
    nobody is asked.
    """
    if not prompts or not distributed.is_main():
        return None
    with memory.limited(limit):
        judgement = answers.judged(models, prompts, limit, hashes=hashes)
    if judgement is None:
        raise MisError(
            "the chat templates of these models share no prompt: leave a student out, or --tasks "
            "answers"
        )
    names = list(judgement.said)
    told: dict[str, Any] = {
        "prompts": len(judgement.answers.prompts),
        "all": _values(judgement.rows),
    }
    by_language = conversations.tables(judgement)
    told |= {language: _values(rows) for language, rows in by_language.items()}
    tables = list[dict[str, Any]]()
    for language, rows in (by_language or {"all languages": judgement.rows}).items():
        table = text.table(rows, names, text.TABLES["answers"])
        tables.append({"language": language, "prompts": rows[0].n, "table": table})
    values = {"answers": tables, "verdict": "", "dialogue": "", "expectation": ""}
    return _Answered(judgement, html.document("answers.md", values), told)


def _values(rows: list[Row]) -> dict[str, float]:
    """{metric_model: value}."""
    return {f"{row.metric}_{row.model}": round(row.value, 4) for row in rows}


def _plan(
    s: Settings,
    wanted: EvaluationSet,
    models: Models,
    hashes: Hashes,
    limit: Budget,
    prompts: list[Prompt],
) -> dict[str, Any]:
    """Peak and time of what is still to be asked, but lm-eval's; said aloud. MisError where
    something does not fit.
    """
    shapes = [estimates.model_of(m) for m in models.values()]
    for m, model in zip(shapes, models.values(), strict=True) if wanted.harness else ():
        need = (
            m.shape.layers * m.block_work + m.head_work + estimates.workspace_bytes(m, 2048, 2048)
        )
        limit.need(
            need,
            f"lm-eval's tasks need {model.path} whole in memory, which",
            "give a larger --budget",
        )
    asked = [
        answering.plan(m, hashes[name], task, limit)
        for name, m in models.items()
        for task in wanted.tasks
    ]
    if prompts:
        asked.append(answers.plan(models, prompts, limit, hashes))
    phases = [phase for phase in asked if phase]
    known = (
        f", {len(asked) - len(phases)} of {len(asked)} known from before"
        if len(phases) < len(asked)
        else ""
    )
    if wanted.text:
        phases.append(estimates.compared(shapes, s.eval_windows, s.max_seq_length or LENGTH))
        estimates.fit(limit, phases[-1])
    rates = estimates.machine_rates()
    peak = max([0, *(p.peak_bytes for p in phases)])
    seconds = sum(p.seconds(rates) for p in phases) / distributed.size()
    cli.say(f"peak {gib(peak)}, about {duration(seconds)}{known}")
    return {"peak_bytes": peak, "seconds": seconds}


def _outcomes(
    s: Settings, wanted: EvaluationSet, models: Models, hashes: Hashes, limit: Budget
) -> Iterator[Outcome]:
    """Our tasks, then lm-eval's; each model is asked all of them before the next one."""
    layers = s.spread == "layers"
    tasks = wanted.tasks
    marks = {
        name: [answering.scores(m, hashes[name], t, limit, layers) for t in tasks]
        for name, m in models.items()
    }
    for at, task in enumerate(tasks):
        by_model = {name: marks[name][at] for name in models}
        levels = {
            name: found for name, sha in hashes.items() if (found := answering.levels(sha, task))
        }
        yield Outcome(
            task=task.name,
            about=task.about,
            marks=by_model,
            chance=answering.chance(task),
            constant=answering.best_constant(task),
            overlap=wanted.known.overlap(task),
            sha256=task.sha256,
            uniform=answering.uniform(models["teacher"], task),
            levels=levels or None,
        )
    if wanted.harness:
        theirs = [
            answering.by_harness(m, hashes[name], wanted.harness, s.num_questions)
            for name, m in models.items()
        ]
        for rows in zip(*theirs, strict=True):
            about = f"lm-eval {importlib.metadata.version('lm_eval')}, {rows[0]['metric']}"
            by_model = {
                name: np.array(row["marks"]) for name, row in zip(models, rows, strict=True)
            }
            yield Outcome(rows[0]["task"], about, by_model, np.array(rows[0]["chance"]))


def _examine(
    s: Settings, models: Models, seen: Checkpoint, hashes: Hashes, limit: Budget
) -> dict[str, Any]:
    began = time.monotonic()
    wanted = task_registry.find(s.tasks, s.num_questions, s.data)
    if wanted.harness:
        answering.check_harness(wanted.harness)
    for task in wanted.tasks:
        cli.say(f"{task.name}: {len(task.questions)} questions; {task.about}")
    distributed.check_same({task.name: task.sha256 for task in wanted.tasks})
    prompts = answers.prompts(s.num_questions) if wanted.answers else []
    plan = _plan(s, wanted, models, hashes, limit, prompts)
    if s.dry_run:
        counts = {task.name: len(task.questions) for task in wanted.tasks}
        if prompts:
            counts[task_registry.ANSWERS] = len(prompts)
        return {"questions": counts, "lm_eval": list(wanted.harness), **plan}
    if s.out and distributed.is_main():
        figures.need()
        DISK.make_folder(Path(s.out))
    answered = _answered(prompts, models, hashes, limit)
    outcomes = list(_outcomes(s, wanted, models, hashes, limit))
    tables, held_out = _held_out(s, models, seen, limit) if wanted.text else ("", {})
    page = recovery_table.markdown(outcomes, tables)
    if answered:
        page = f"{answered.page}\n\n{page}".strip()
    _print(f"\n{page}\n")
    if s.out and distributed.is_main():
        result = {"sha256": hashes, "tasks": [o.json() for o in outcomes], "held_out": held_out}
        _write(Path(s.out), outcomes, page, result, answered)
    count = sum(len(o.chance) for o in outcomes) + (len(prompts) if answered else 0)
    cli.say(f"{count} questions, {len(models)} models, {duration(time.monotonic() - began)}")
    return _summary(s, models, outcomes, answered) | {"held_out": held_out}


def _summary(
    s: Settings, models: Models, outcomes: list[Outcome], answered: _Answered | None
) -> dict[str, Any]:
    """What the JSON line tells, but for held-out text."""
    students = list(models)[1:]
    told: dict[str, Any] = {"answers": answered.told} if answered else {}
    told["recovered"] = {o.task: {name: o.recovered(name) for name in students} for o in outcomes}
    if any(o.levels for o in outcomes):
        told["instructions"] = {o.task: _accuracies(o) for o in outcomes if o.levels}
    return told | ({"out": s.out} if s.out else {})


def _accuracies(outcome: Outcome) -> dict[str, dict[str, float]]:
    """{model: IFEval's two accuracies and their mean}, for the JSON line."""
    return {name: levels.json() for name, levels in (outcome.levels or {}).items()}


def _write(
    out: Path,
    outcomes: list[Outcome],
    page: str,
    result: dict[str, Any],
    answered: _Answered | None,
) -> None:
    if answered:
        result["answers"] = answered.told
        conversations.keep(answered.judgement, out, DISK)
    picture = recovery_table.figure(outcomes)
    title = "The recovery table"
    body = f"<h1>{title}</h1>" + html.markdown(page) + html.part("figures", pictures=[picture])
    if picture:
        DISK.replace_text(out / "recovery.svg", figures.standalone(picture))
        page += "\n\n![Recovered](recovery.svg)"
    DISK.replace_text(out / "recovery.md", page + "\n")
    DISK.replace_text(
        out / "recovery.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n"
    )
    DISK.replace_text(out / "recovery.html", html.page(title, body))


def run(settings: Settings) -> dict[str, Any]:
    """The command: the recovery table where tasks are named, else one table a text."""
    s = settings
    cli.check_ranges(s)
    policy.use(s.compute_dtype)
    if s.out and distributed.is_main():
        need_place("--out", s.out)
    if (s.out or s.dry_run) and not s.tasks:
        raise MisError(
            f"{'--out' if s.out else '--dry-run'} goes with --tasks: name some, such as --tasks "
            f"text"
        )
    if s.kld and s.tasks:
        raise MisError("--kld and --tasks are two reports: give one of them")
    if s.kld and not s.students:
        raise MisError(
            "--kld compares two models, there is only the teacher: name the other with --students"
        )
    teacher = resolve.resolve_model(s.teacher).path
    names = "teacher", *resolve.labels(s.students, ("teacher",))
    models = dict(
        zip(names, map(load.open_checkpoint, [teacher, *map(Path, s.students)]), strict=True)
    )
    limit, (_, *students) = memory.budget(s.budget_bytes), models.values()
    estimates.settle_precision(limit, *models.values())
    with progress.run("evaluate"), vocabulary.shared(models["teacher"], students) as seen:
        hashed = models if s.tasks or distributed.size() > 1 else {}
        hashes = {name: answering.sha256(model) for name, model in hashed.items()}
        distributed.check_same(hashes)
        if s.tasks:
            result = _examine(s, models, seen, hashes, limit)
        elif s.kld:
            texts = _texts(s, models, load.tokenizer(seen.path), limit, s.max_seq_length or 512)
            if seen is not models["teacher"]:
                cli.say(comparison.ACROSS)
            models["teacher"] = seen
            result = {
                name: _kld(models, chosen, title, opened) for name, title, chosen, opened in texts
            }
        else:
            tables, result = _held_out(s, models, seen, limit)
            _print(f"\n{tables}")
        return {"teacher": str(teacher), "students": list(s.students), **result}


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
