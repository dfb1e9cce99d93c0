"""The best candidates of a search, once they have learned for a few steps and are rounded:
measured, and judged.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import candidates, pipeline
from mis_mlx.evaluation import comparison
from mis_mlx.evaluation.speed import rounds
from mis_mlx.maths.optimizer import Diverged
from mis_mlx.maths.stats import interval
from mis_mlx.models import arch, load, mlx_generate
from mis_mlx.planner import estimates, phases
from mis_mlx.planner.recipe import spec_of
from mis_mlx.pruning import limits, shape_search
from mis_mlx.quantization import stage
from mis_mlx.reporting import html, text
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import files, run_folder
from mis_mlx.types import Checkpoint, MisError, Row

FINALISTS = "finalists.jsonl"
OFTEN = 0.1  # share of steps that the guard skips or clips, above which a training is not stable
TOKENS = 16  # decoded for one timing
ROUNDS = 3  # of timings, the quickest counts


def final(c: candidates.Candidates, choice: shape_search.Choice) -> dict[str, Any]:
    """The record of a finalist: distilled for a few steps and rounded, judged all along; from the
    log if there.
    """
    sub = c.run.folder / "finalists" / choice.name
    record = candidates.once(c.run, FINALISTS, choice.sizes, lambda: _measured(c, choice, sub))
    c.run.files.discard(sub)
    return record


def _measured(c: candidates.Candidates, choice: shape_search.Choice, sub: Path) -> dict[str, Any]:
    """Distil and round a finalist in the folder `sub`; a training that has begun there goes on in
    its own way.
    """
    run = c.run
    reader = c.reader(choice.shape.vocab)
    with files.reported(run.folder, "the folder of a finalist"):
        run.files.make_folder(sub)
    protocol.sweep(sub, run.files)
    folder = sub / "pruned"
    how = shape_search.rounding_of(choice)
    seen = reader.teacher
    pruned = load.open_checkpoint(folder) if folder.exists() else c.prune(choice.shape, folder)
    small = estimates.model_of(arch.student_config(seen.config, choice.shape))
    job = spec_of(estimates.model_of(seen), small, run.recipe, how, copied=True)
    if not (sub / run_folder.PLAN).exists():
        way = phases.make(job, run.plan.budget_bytes, run.plan.rates).way
        run.files.replace_text(sub / run_folder.PLAN, json.dumps(way))
    plan = phases.one(
        job,
        run.plan.budget_bytes,
        run.plan.rates,
        **run_folder.stored_settings(sub, run_folder.PLAN),
    )
    own = replace(
        run,
        recipe=plan.recipe(run.recipe, seen),
        folder=sub,
        plan=plan,
        teacher=seen,
        data=reader.train,
    )
    # where three steps in a row were no numbers
    out = sub / "distilled"
    trained = None
    try:
        with suppress(Diverged):
            pipeline.distil(own, pruned, out)
            trained = load.open_checkpoint(out)
    except MisError as error:  # what can be resumed is the search, not the finalist's own folder
        raise MisError(str(error).replace(str(sub), str(run.folder))) from error.__cause__
    record: dict[str, Any] = {
        "params": arch.params(pruned.config),
        **guarded(run_folder.metrics(sub), trained),
    }
    models = {"teacher": seen, "pruned": pruned}
    if trained:
        out = sub / "model"
        samples = own.pick(run.recipe.num_samples, 1)
        if not out.exists():
            stage.quantize(
                trained.path,
                out,
                how,
                run.files,
                samples,
                plan.held_windows("quantize"),
                run.recipe.seed,
            )
        models |= {"distilled": trained, "rounded": load.open_checkpoint(out)}
        record["bytes"] = models["rounded"].nbytes
    record |= _judged(c, models, reader.judging)
    if c.settings.timed_at and trained:
        times = {name: timed(trained.path, *at) for name, at in c.settings.timed_at.items()}
        record["seconds"] = {
            name: each.seconds(choice.shape.layers) for name, each in times.items()
        }
    return record


def _judged(
    c: candidates.Candidates,
    models: Mapping[str, Checkpoint],
    judging: Windows,
) -> dict[str, list[float | None]]:
    """{"metric_model": a value a window, or an answer}, in bits a byte, of the teacher and the
    stages of a finalist.
    """
    found = dict[str, list[float | None]]()
    for (model, metric), values in comparison.compare(models, judging).items():
        if metric in ("nll", "kl"):
            bits = comparison.nats_of(values, judging) / judging.text_bytes / math.log(2)
            found[f"{metric}_{model}"] = [candidates.finite(value) for value in bits]
    if c.answers is None:
        return found
    for model, checkpoint in models.items():
        if model != "teacher":
            found[f"answers_{model}"] = [
                candidates.finite(value) for value in c.answers.bits(checkpoint)
            ]
    return found


def guarded(steps: Sequence[Mapping[str, Any]], trained: object) -> dict[str, Any]:
    """What the guard did in a training: steps skipped and clipped, and whether it had to stop
    it.
    """
    notes = [str(r.get("note", "")) for r in steps]
    skipped, clipped = (sum(word in note for note in notes) for word in ("skipped", "clipped"))
    return {
        "steps": len(notes),
        "skipped": skipped,
        "clipped": clipped,
        "diverged": trained is None,
    }


def timed(folder: Path, cached: int, prompt: int) -> limits.Timing:
    """Seconds of a token, with `cached` tokens in the KV cache, or of a prompt of so many tokens up
    to the first one (prompt 0: of a token), by the quickest of some, stock mlx-lm. Half of the
    blocks, timed too, say what one takes.
    """
    model, tokenizer = mlx_generate.open_model(folder)
    ids = mlx_generate.prompt_ids(
        tokenizer, "In the evening the wind came down from the pass.", prompt or 8
    )
    layers = model.model.layers

    def quickest(count: int) -> float:
        model.model.layers = layers[:count]
        try:
            cache = mlx_generate.filled_cache(model, cached)
            stamps, _ = rounds.clocked(
                mlx_generate.greedy(model, ids, 1 if prompt else TOKENS, cache)
            )
        finally:
            model.model.layers = layers
        return stamps[0] if prompt else min(b - a for a, b in pairwise(stamps))

    total = len(layers)
    half = max(1, len(layers) // 2)
    # In turn, so that a slow spell hits both.
    whole, part = map(
        min, zip(*((quickest(total), quickest(half)) for _ in range(ROUNDS)), strict=True)
    )
    # all that there is: one block, or a machine too busy to tell half of the blocks from all
    block = whole / total
    if part < whole and half < total:
        block = min((whole - part) / (total - half), block)
    return limits.Timing(
        block,
        max(0.0, whole - total * block),
        min(block, _attention_seconds(model, cached, prompt)),
    )


def _attention_seconds(model: Any, cached: int, prompt: int) -> float:
    """What queries take for the keys and values that a block sees, the mean of all blocks: those of
    a prompt, in mlx-lm's parts, or of a token.
    """
    s = model.shape
    dtype = model.model.norm.weight.dtype

    def part(queries: int, keys: int) -> float:
        q, k = (
            mx.zeros((1, *sizes, s.head_dim), dtype)
            for sizes in ((s.heads, queries), (s.kv_heads, keys))
        )
        mx.eval(q, k)
        began = time.perf_counter()
        mx.eval(
            mx.fast.scaled_dot_product_attention(
                q, k, k, scale=1.0, mask="causal" if prompt else None
            )
        )
        return time.perf_counter() - began

    starts = range(0, prompt, rounds.PREFILL)
    parts = [
        (min(rounds.PREFILL, prompt - at), min(at + rounds.PREFILL, prompt)) for at in starts
    ] or [(1, cached + 1)]
    sees = [load.window(model.args, block) or cached + prompt + 1 for block in model.model.layers]
    times = {
        w: sum(min(part(n, min(k, n + w - 1)) for _ in range(ROUNDS)) for n, k in parts)
        for w in set(sees)
    }
    return sum(times[w] for w in sees) / len(sees)


def unstable(record: Mapping[str, Any]) -> str:
    """Why a finalist's training was not stable, or nothing."""
    if record["diverged"] or None in record["kl_distilled"] or None in record["nll_rounded"]:
        return "its loss became no number"
    meddled = record["skipped"] + record["clipped"]
    if meddled > OFTEN * record["steps"]:
        return f"the guard had to step in at {meddled} of {record['steps']} steps"
    before, after = (float(np.mean(record[f"kl_{m}"])) for m in ("pruned", "distilled"))
    return f"its KL rose from {before:.3f} to {after:.3f}" if after > before else ""


def judging_metric(records: Sequence[Mapping[str, Any]]) -> str:
    """By which numbers finalists are compared: bits a byte on the teacher's answers, or else on
    text.
    """
    on_answers = all("answers_rounded" in record for record in records if not unstable(record))
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


def best_candidate(records: Sequence[Mapping[str, Any]]) -> Verdict:
    """Which finalist, by its number in `records`, and how sure that is: the least sure of all
    comparisons counts.
    """
    stable = [i for i, record in enumerate(records) if not unstable(record)]
    judged = judging_metric(records)
    bits: dict[int | None, np.ndarray] = {i: np.array(records[i][judged]) for i in stable}
    best = min(bits, key=lambda i: bits[i].mean(), default=None)
    gaps = {i: interval(bits[i] - bits[best]) for i in bits if i != best}
    second = min(gaps, key=lambda i: gaps[i][1], default=None)
    gap = gaps.get(second)
    return Verdict(best, second, gap, best is not None and (gap is None or gap[1] > 0))


def table(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], speeds: Mapping[str, float]
) -> str:
    """Markdown: a column for each finalist, means over windows with 95 % intervals. speeds: the
    teacher's seconds.
    """
    rows = []
    for record, name in zip(records, names, strict=True):
        plain = {
            flag: speeds[flag] / seconds for flag, seconds in record.get("seconds", {}).items()
        }
        plain |= {
            "params": record["params"] / 1e6,
            "meddled": record["skipped"] + record["clipped"],
        }
        plain |= {"bytes": record["bytes"] / 1e6} if "bytes" in record else {}
        rows += [Row(name, metric, value) for metric, value in plain.items()]
        for metric in text.TABLES["search"]:
            if isinstance(values := record.get(metric), list) and None not in values:
                rows.append(Row(name, metric, *interval(np.array(values)), len(values)))
    return text.table(rows, names, text.TABLES["search"])


def advice(
    found: Verdict, records: Sequence[Mapping[str, Any]], names: Sequence[str], lines: Sequence[str]
) -> str:
    """The recommendation. names, lines: of the finalists, for people, and the commands that make
    them.
    """
    best = (
        {}
        if found.best is None
        else {**records[found.best], "name": names[found.best], "line": lines[found.best]}
    )
    second = None if found.second is None else names[found.second]
    judged = judging_metric(records)
    values = {
        "found": found,
        "best": best,
        "second": second,
        "why": zip(names, map(unstable, records), strict=True),
        "count": len(best.get(judged, ())),
        "unit": "answers" if judged == "answers_rounded" else "windows",
    }
    return html.document("search.md", values)


def means(record: Mapping[str, Any]) -> dict[str, Any]:
    """A finalist for a run's JSON: means in place of windows."""
    each = {
        k: None if None in v else float(np.mean(v))
        for k, v in record.items()
        if isinstance(v, list)
    }
    return {**record, **each, "unstable": unstable(record)}
