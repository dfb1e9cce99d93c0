"""The best candidates of a search: trained for a few steps, rounded, measured and judged."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.compute import precision
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import pipeline, strategies
from mis_mlx.judge import comparison
from mis_mlx.maths.optimizer import Diverged
from mis_mlx.maths.stats import LEAST_FOR_INTERVAL, interval
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner import measured_block
from mis_mlx.planner.distillation_spec import spec_of
from mis_mlx.quantization import stage
from mis_mlx.reporting import html, text
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.size_search import candidates, shape_search
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import files, run_folder
from mis_mlx.types import Checkpoint, MisError, Row

FINALISTS = "finalists.jsonl"
OFTEN = 0.1  # share of steps that the guard skips or clips, above which a training is not stable
Record = Mapping[str, Any]  # of a finalist, or of a step


def measured_finalist(c: candidates.Candidates, choice: shape_search.Choice) -> dict[str, Any]:
    """The record of a finalist: distilled for a few steps, rounded and judged; or from the log."""
    folder = c.run.folder / "finalists" / choice.name
    measured = partial(_measured, c, choice, folder)
    record = candidates.logged_or_measured(c.run, FINALISTS, choice.sizes, measured)
    c.run.files.discard(folder)
    return record


def _measured(
    c: candidates.Candidates, choice: shape_search.Choice, folder: Path
) -> dict[str, Any]:
    """Distil and round a finalist in a folder of its own; a training that began there goes on."""
    run = c.run
    reader = c.trimmed_teacher(choice.shape.vocab)
    with files.as_mis_error(run.folder, "the folder of a finalist"):
        run.files.make_folder(folder)
    protocol.sweep(folder, run.files)
    rounding = shape_search.rounding_of(choice)
    pruned_folder = folder / "pruned"
    if pruned_folder.exists():
        pruned = compute_type.open_to_compute(pruned_folder, reader.teacher.precision)
    else:
        pruned = c.prune(choice.shape, pruned_folder)
    own = _own_run(c, choice, folder, rounding)
    trained = _trained(own, pruned, run.folder)
    record: dict[str, Any] = {
        "params": arch.params(pruned.config),
        **guard_report(run_folder.metrics(folder), trained),
    }
    models = {"teacher": reader.teacher, "pruned": pruned}
    if trained:
        out = folder / "model"
        samples = own.pick(run.recipe.num_samples, use=1)
        if not out.exists():
            stage.quantize(
                trained,
                out,
                rounding,
                run.files,
                batches=samples,
                held=own.plan.held_windows("quantize"),
                seed=run.recipe.seed,
            )
        models["distilled"] = trained
        models["rounded"] = compute_type.open_to_compute(out, reader.teacher.precision)
        record["bytes"] = models["rounded"].nbytes
    record |= _judged(c, models, reader.judging)
    return record


def _own_run(
    c: candidates.Candidates,
    choice: shape_search.Choice,
    folder: Path,
    rounding: QuantizationConfig,
) -> pipeline.Run:
    """The search's run as that of one finalist: its folder, plan, teacher and text.

    How it trains is decided once and kept in the folder: a run that was stopped goes on that way.
    """
    run = c.run
    reader = c.trimmed_teacher(choice.shape.vocab)
    teacher = reader.teacher
    student = model_of(
        arch.student_config(teacher.config, choice.shape),
        dtype=precision.usual_dtype(teacher.precision),
    )
    budget_bytes = run.plan.budget_bytes
    job = spec_of(model_of(teacher), student, run.recipe, rounding, copied=True)
    job = measured_block.of_job(job, budget_bytes)
    rates = run.plan.rates
    if not (folder / run_folder.PLAN).exists():
        strategy = strategies.best_plan(job, budget_bytes, rates).strategy
        run.files.replace_text(folder / run_folder.PLAN, json.dumps(strategy))
    strategy = run_folder.stored_settings(folder, run_folder.PLAN)
    plan = strategies.plan_strategy(job, budget_bytes, rates, **strategy)
    return replace(
        run,
        recipe=plan.recipe(run.recipe, teacher),
        folder=folder,
        plan=plan,
        teacher=teacher,
        data=c.training_text(choice.shape.vocab),
    )


def _trained(own: pipeline.Run, pruned: Checkpoint, search: Path) -> Checkpoint | None:
    """The distilled finalist; None where three steps in a row were not numbers.

    search: the folder of the search, which can be resumed; the finalist's own one cannot, so a
    MisError names the former.
    """
    out = own.folder / "distilled"
    try:
        with suppress(Diverged):
            pipeline.distil(own, pruned, out)
            return compute_type.open_to_compute(out, own.teacher.precision)
    except MisError as error:
        sentence = str(error).replace(str(own.folder), str(search))
        raise MisError(sentence) from error.__cause__
    return None


def _judged(
    c: candidates.Candidates,
    models: Mapping[str, Checkpoint],
    judging: Windows,
) -> dict[str, Any]:
    """{"metric_model": bits a byte of every window, or answer} of the teacher and a finalist."""
    record = dict[str, Any]()
    compared = comparison.compare(models, judging)
    for (model, metric), values in compared.items():
        if metric in ("nll", "kl"):
            nats = comparison.nats_of(values, judging)
            bits = nats / judging.text_bytes / math.log(2)
            record[f"{metric}_{model}"] = [candidates.finite_or_none(value) for value in bits]
    if c.answers is None:
        return record
    for model, checkpoint in models.items():
        if model != "teacher":
            bits = c.answers.bits(checkpoint)
            record[f"answers_{model}"] = [candidates.finite_or_none(value) for value in bits]
    return record


def guard_report(steps: Sequence[Record], trained: object) -> dict[str, Any]:
    """What the guard did in a training: steps skipped and clipped, and whether it had to stop it.

    trained: None where it had to.
    """
    notes = [str(record.get("note", "")) for record in steps]
    return {
        "steps": len(notes),
        "skipped": sum("skipped" in note for note in notes),
        "clipped": sum("clipped" in note for note in notes),
        "diverged": trained is None,
    }


def instability(record: Record) -> str:
    """Why a finalist's training was not stable; empty where it was."""
    if record["diverged"] or None in record["kl_distilled"] or None in record["nll_rounded"]:
        return "its loss became NaN or infinite"
    meddled = record["skipped"] + record["clipped"]
    if meddled > OFTEN * record["steps"]:
        return f"the guard had to step in at {meddled} of {record['steps']} steps"
    before = float(np.mean(record["kl_pruned"]))
    after = float(np.mean(record["kl_distilled"]))
    if after > before:
        return f"its KL rose from {before:.3f} to {after:.3f}"
    return ""


def judging_metric(records: Sequence[Record]) -> str:
    """The numbers that compare finalists: bits a byte on the teacher's answers, or else on text."""
    stable = [record for record in records if not instability(record)]
    on_answers = all("answers_rounded" in record for record in stable)
    return "answers_rounded" if records and on_answers else "nll_rounded"


class Verdict(NamedTuple):
    """best: the stable finalist of fewest bits a byte once rounded. gap: of the next one above it,
    (mean, low, high) over the same windows. None where there is none. clear: the best is better by
    more than the noise, or alone.
    """

    best: int | None
    second: int | None
    gap: tuple[float, float, float] | None
    clear: bool


def best_candidate(records: Sequence[Record]) -> Verdict:
    """Which finalist is best, by its number in `records`, and how sure that is.

    The least sure of all comparisons counts.
    """
    judged = judging_metric(records)
    bits = dict[int | None, np.ndarray]()
    for number, record in enumerate(records):
        if not instability(record):
            bits[number] = np.array(record[judged])
    best = min(bits, key=lambda number: bits[number].mean(), default=None)
    others = [number for number in bits if number != best]
    gaps = {number: interval(bits[number] - bits[best]) for number in others}
    # Where too few windows were read, all intervals are without bounds: then the mean decides.
    second = min(gaps, key=lambda number: (gaps[number][1], gaps[number][0]), default=None)
    gap = gaps.get(second)
    clear = best is not None and (gap is None or gap[1] > 0)
    return Verdict(best, second, gap, clear)


def table(records: Sequence[Record], names: Sequence[str]) -> str:
    """Markdown: a column for each finalist, means over windows with 95 % intervals."""
    rows = []
    for record, name in zip(records, names, strict=True):
        plain = {"params": record["params"] / 1e6}
        plain["meddled"] = record["skipped"] + record["clipped"]
        if "bytes" in record:
            plain["bytes"] = record["bytes"] / 1e6
        rows += [Row(name, metric, value) for metric, value in plain.items()]
        for metric in text.TABLES["search"]:
            values = record.get(metric)
            if isinstance(values, list) and None not in values:
                mean, low, high = interval(np.array(values))
                rows.append(Row(name, metric, mean, low, high=high, n=len(values)))
    return text.table(rows, names, text.TABLES["search"])


def advice(
    verdict: Verdict,
    records: Sequence[Record],
    names: Sequence[str],
    lines: Sequence[str],
) -> str:
    """The recommendation. names, lines: of the finalists, for people; commands that make them."""
    best = dict[str, Any]()
    if verdict.best is not None:
        best = {**records[verdict.best], "name": names[verdict.best], "line": lines[verdict.best]}
    judged = judging_metric(records)
    values = {
        "found": verdict,
        "best": best,
        "second": None if verdict.second is None else names[verdict.second],
        "why": zip(names, map(instability, records), strict=True),
        "count": len(best.get(judged, ())),
        "few": len(best.get(judged, ())) < LEAST_FOR_INTERVAL,
        "unit": "answers" if judged == "answers_rounded" else "windows",
    }
    return html.document("search.md", values)


def means(record: Record) -> dict[str, Any]:
    """A finalist for a run's JSON: means in place of windows."""
    shown = dict(record)
    for name, values in record.items():
        if isinstance(values, list):
            shown[name] = None if None in values else float(np.mean(values))
    return {**shown, "unstable": instability(record)}
