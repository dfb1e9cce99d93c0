"""Evaluate students against their teacher: the recovery table on tasks, or held-out loss, KL and agreement."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows, fingerprint
from mis_mlx.evaluation import answering, comparison, kld, lm_eval_tasks, questions, recovery_table, task_registry
from mis_mlx.evaluation.recovery_table import Outcome
from mis_mlx.hardware import memory
from mis_mlx.models import distributed, load, policy, resolve
from mis_mlx.models.policy import Computing
from mis_mlx.models.stream import Stream
from mis_mlx.planner import estimates, machines
from mis_mlx.reporting import figures, html, progress, text
from mis_mlx.storage.files import DISK, need_place
from mis_mlx.types import MOST, Budget, Checkpoint, Count, MisError, Row, Tokens, Within, duration, gib

Models = Mapping[str, Checkpoint]
LENGTH = 256  # tokens in a window


@dataclass(frozen=True)
class Settings(Computing):
    """Compare any number of models with one teacher that shares their tokenizer."""

    teacher: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    students: tuple[str, ...] = ()
    """model folders"""
    data: str | None = None
    """what the students were distilled on: a folder with train.jsonl and test.jsonl, or a hub data set; default: built
    in"""
    eval_windows: Count = 24
    """held-out windows"""
    max_seq_length: Tokens | None = None
    """tokens in a window; default: 256, with --kld 512"""
    kld: bool = False
    """llama.cpp's quality report instead, with the teacher as reference, over the second half of every window"""
    budget: str | None = None
    """memory this may take, such as 600MiB; default: 5GiB or 75 % of what is there"""
    tasks: tuple[str, ...] = ()
    """builtin, polish-offline, dialects, polish, english, any part of these, lm_eval/ID, or folders of JSONL; without
    any: held-out text"""
    num_questions: Annotated[int, Within(2, MOST)] = 100
    """of each task"""
    out: str | None = None
    """folder for recovery.md, .json, .svg and .html; default: the table on stdout alone"""
    dry_run: bool = False
    """judge all rows, count questions, bytes and time, with --tasks; ask no model"""
    spread: Literal["whole", "layers"] = "whole"
    """of several machines (mlx.launch): each passes its windows and questions through whole models, or through its own
    blocks and sends them on to the next machine, which a model needs that no machine holds alone"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def _print(text: str) -> None:
    """On stdout; of several machines the first one speaks."""
    if distributed.first():
        print(text)


def _kld(models: Models, held_out: Windows, title: str, opened: comparison.Opened) -> dict[str, Any]:
    """Print the report on all models but the first, the reference; the same for the JSON line."""
    held_out = kld.second_half(held_out)
    base, *names = models
    found = kld.against(models[base], {name: models[name] for name in names}, held_out, opened)
    tokens, sha256 = int((held_out.learn > 0).sum()), fingerprint(held_out)
    rows, said = [], dict[str, Any]({"tokens": tokens, "sha256_tokens": sha256})
    for name, figures_ in found.items():
        for metric, (value, error) in figures_.items():
            low, high = (None, None) if error is None else (value - error, value + error)
            rows.append(Row(name, metric, value, low, high, tokens))
            said |= {f"{metric}_{name}": value} | ({} if error is None else {f"{metric}_se_{name}": error})
    _print(f"\n{title}: the {tokens} tokens of their second halves, ± one standard error\n")
    _print(text.table(rows, names, kld.METRICS))
    _print(f"\nsha256 of the tokens: {sha256}")
    return said


def _texts(
    s: Settings, models: Models, limit: Budget, length: int
) -> Iterator[tuple[str, str, Windows, comparison.Opened]]:
    """(name, title, chosen windows) of every held-out text, once the comparison fits; used within the budget.

    And what opens a model for it.
    """
    planned = estimates.compared([estimates.model_of(m) for m in models.values()], s.eval_windows, length)
    estimates.fit(limit, planned)
    # One pass is made of each model: blocks stay in memory only to take the next windows while others work.
    room = estimates.room(limit.limit_bytes, planned.peak_bytes) if s.spread == "layers" else 0
    tokens = s.eval_windows * length

    def opened(model: Checkpoint) -> Stream:
        return machines.opened(model, limit, room, tokens, length, s.spread == "layers")

    tokenizer = load.tokenizer(next(iter(models.values())).path)
    for name, held_out in preparation.prepare(s.data, tokenizer, length).held_out.items():
        chosen = comparison.chosen(held_out, s.eval_windows)
        distributed.same({name: fingerprint(chosen)})
        with memory.limited(limit):
            yield name, f"{name}, {len(chosen.tokens)} windows of {length} tokens", chosen, opened


def _held_out(s: Settings, models: Models, limit: Budget) -> tuple[str, dict[str, Any]]:
    """(Markdown, the same for the JSON line): one table a text."""
    parts, said = [], dict[str, Any]()
    for name, title, chosen, opened in _texts(s, models, limit, s.max_seq_length or LENGTH):
        rows = comparison.rows_of(comparison.together(models, chosen, opened))
        parts.append(f"{title}\n\n{text.table(rows, list(models), comparison.METRICS)}")
        said[name] = {f"{r.metric}_{r.model}": r.value for r in rows}
    return "\n\n".join(parts), said


def _planned(
    s: Settings, wanted: task_registry.Subjects, models: Models, hashes: Mapping[str, str], limit: Budget
) -> dict[str, Any]:
    """Peak and time of what is still to be asked, said aloud; lm-eval's tasks have no estimate of time.

    MisError where something does not fit, or a question cannot be asked.
    """
    shapes = [estimates.model_of(m) for m in models.values()]
    for m, model in zip(shapes, models.values(), strict=True) if wanted.harness else ():
        need = m.shape.layers * m.block_work + m.head_work + estimates.workspace_bytes(m, 2048, 2048)
        limit.need(need, f"lm-eval's tasks need {model.path} whole in memory, which", "give a larger --budget")
    asked = [answering.plan(m, hashes[name], task, limit) for name, m in models.items() for task in wanted.tasks]
    phases = [phase for phase in asked if phase]
    known = f", {len(asked) - len(phases)} of {len(asked)} known from before" if len(phases) < len(asked) else ""
    if wanted.text:
        phases.append(estimates.compared(shapes, s.eval_windows, s.max_seq_length or LENGTH))
        estimates.fit(limit, phases[-1])
    rates = estimates.machine_rates()
    peak = max([0, *(p.peak_bytes for p in phases)])
    seconds = sum(p.seconds(rates) for p in phases) / distributed.size()
    cli.say(f"peak {gib(peak)}, about {duration(seconds)}{known}")
    return {"peak_bytes": peak, "seconds": seconds}


def _outcomes(
    s: Settings, wanted: task_registry.Subjects, models: Models, hashes: Mapping[str, str], limit: Budget
) -> list[Outcome]:
    """Our tasks, model by model."""
    how, found = (limit, s.spread == "layers"), []
    marks = {name: [answering.marks(m, hashes[name], t, *how) for t in wanted.tasks] for name, m in models.items()}
    for at, task in enumerate(wanted.tasks):
        chance = np.array([q.chance for q in task.questions])
        each = {name: marks[name][at] for name in models}
        constant, overlap = questions.constant(task), wanted.known.overlap(task)
        uniform = answering.uniform(next(iter(models.values())), task)
        found.append(Outcome(task.name, task.about, each, chance, constant, overlap, task.sha256, uniform))
    return found


def _harness(s: Settings, ids: tuple[str, ...], models: Models) -> list[Outcome]:
    """lm-eval's tasks, model by model."""
    found = {name: answering.by_harness(model, ids, s.num_questions) for name, model in models.items()}
    made = []
    for task, first in next(iter(found.values())).items():
        marks = {name: f[task].marks for name, f in found.items()}
        made.append(Outcome(task, f"lm-eval {lm_eval_tasks.version()}, {first.metric}", marks, first.chance))
    return made


def _hashes(models: Models) -> dict[str, str]:
    """Of every model; MisError where another machine has another one."""
    found = {name: answering.sha256(model) for name, model in models.items()}
    distributed.same(found)
    return found


def _examined(s: Settings, models: Models, limit: Budget) -> dict[str, Any]:
    """The recovery table, printed and written."""
    began = time.monotonic()
    wanted = task_registry.find(s.tasks, s.num_questions, s.data)
    if wanted.harness:
        lm_eval_tasks.check(wanted.harness)
    for task in wanted.tasks:
        cli.say(f"{task.name}: {len(task.questions)} questions; {task.about}")
    distributed.same({task.name: task.sha256 for task in wanted.tasks})
    hashes = _hashes(models)
    planned = _planned(s, wanted, models, hashes, limit)
    if s.dry_run:
        asked = {task.name: len(task.questions) for task in wanted.tasks}
        return {"questions": asked, "lm_eval": list(wanted.harness), **planned}
    if s.out and distributed.first():
        figures.need()
        DISK.make_folder(Path(s.out))
    found = _outcomes(s, wanted, models, hashes, limit)
    found += _harness(s, wanted.harness, models) if wanted.harness else []
    text, held_out = _held_out(s, models, limit) if wanted.text else ("", {})
    page = recovery_table.markdown(found, text)
    _print(f"\n{page}\n")
    said = {"tasks": [o.json() for o in found], "held_out": held_out}
    if s.out and distributed.first():
        _write(Path(s.out), found, page, {"sha256": hashes, **said})
    recovered = {o.task: {name: o.recovered(name) for name in list(models)[1:]} for o in found}
    cli.say(
        f"{sum(len(o.chance) for o in found)} questions, {len(models)} models, {duration(time.monotonic() - began)}"
    )
    return {"recovered": recovered, "held_out": held_out} | ({"out": s.out} if s.out else {})


def _write(out: Path, found: list[Outcome], page: str, said: dict[str, Any]) -> None:
    picture = recovery_table.figure(found)
    if picture:
        DISK.replace_text(out / "recovery.svg", figures.standalone(picture, html.LIGHT))
        page += "\n\n![Recovered](recovery.svg)"
    DISK.replace_text(out / "recovery.md", page + "\n")
    DISK.replace_text(out / "recovery.json", json.dumps(said, ensure_ascii=False, indent=1) + "\n")
    body = "<h1>The recovery table</h1>" + html.markdown(page.partition("\n\n![")[0]) + html.figures(picture)
    DISK.replace_text(out / "recovery.html", html.page("The recovery table", body))


def run(settings: Settings) -> dict[str, Any]:
    """The command: the recovery table where tasks are named, else one table a text."""
    s = settings
    cli.check_ranges(s)
    policy.use(s.compute_dtype)
    if s.out and distributed.first():
        need_place("--out", s.out)
    if s.kld and s.tasks:
        raise MisError("--kld and --tasks are two reports: give one of them")
    if s.kld and not s.students:
        raise MisError("--kld compares two models, there is only the teacher: name the other with --students")
    found = resolve.find(s.teacher)
    models = {"teacher": load.open_checkpoint(found.path)}
    for name, folder in zip(resolve.labels(s.students, ("teacher",)), s.students, strict=True):
        models[name] = load.open_checkpoint(folder)
        comparison.same_vocabulary(models["teacher"], models[name])
    limit = memory.budget(None if s.budget is None else cli.parse_bytes(s.budget))
    with progress.run("evaluate"):
        return {"teacher": str(found.path), "students": list(s.students), **_compared(s, models, limit)}


def _compared(s: Settings, models: Models, limit: Budget) -> dict[str, Any]:
    if s.tasks:
        return _examined(s, models, limit)
    if distributed.size() > 1:
        _hashes(models)
    if not s.kld:
        text, said = _held_out(s, models, limit)
        _print(f"\n{text}")
        return said
    texts = _texts(s, models, limit, s.max_seq_length or 512)
    return {name: _kld(models, chosen, title, opened) for name, title, chosen, opened in texts}


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
