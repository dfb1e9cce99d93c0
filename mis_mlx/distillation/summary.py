"""What came out of a run: one dictionary for machines, one page of tables for people."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mis_mlx.evaluation import comparison
from mis_mlx.models import arch, model_writer, policy
from mis_mlx.planner.phases import MemoryPlan
from mis_mlx.pruning import select
from mis_mlx.reporting import html, text
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, Row

LOSSES = (("nll", "nats/token"), ("bpb", "bits per byte"))  # the second where models read different tokens

NAMES = {"teacher": "teacher", "pruned": "pruned", "student": "distilled", "quantized": "4-bit"}  # in the JSON: a model


def result(
    folder: Path, models: Mapping[str, Checkpoint], sizes: list[Row], quality: Mapping[str, list[Row]]
) -> dict[str, Any]:
    """The run's JSON. `models`: teacher, pruned, distilled and perhaps 4-bit; the first text of `quality` counts."""
    main = {(r.model, r.metric): r.value for r in next(iter(quality.values()))}
    loss = "nll" if ("teacher", "nll") in main else "bpb"  # which is the same share of the gap
    steps = run_folder.metrics(folder)
    tokens, seconds = (sum(r[key] for r in steps) for key in ("tokens", "seconds"))
    gap = main["pruned", loss] - main["teacher", loss]
    keep = model_writer.read_keep(models["pruned"].path)
    report = {k: v for k, v in keep.report.items() if k not in select.BULKY} if keep else {}
    return {
        "teacher": str(models["teacher"].path),
        "student": str(folder / "model"),
        "run": str(folder),
        "params_teacher": arch.params(models["teacher"].config),
        "params_student": arch.params(models["distilled"].config),
        **{f"nll_{key}": main.get((name, "nll")) for key, name in NAMES.items()},  # none where it reads other tokens
        **{f"bits_per_byte_{name}": main.get((name, "bpb")) for name in models},
        "gap_closed": (main["pruned", loss] - main["distilled", loss]) / gap if gap else None,
        "kl_pruned": main["pruned", "kl"],
        "kl_student": main["distilled", "kl"],
        "top1_student": main["distilled", "top1"],
        **{f"{r.metric}_{r.model}": round(r.value, 3) for r in sizes if r.metric != "params"},
        "tokens": tokens,
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        **report,
    }


def begun(plan: MemoryPlan, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a run promises at its start: bytes and seconds of every phase, this machine's rates, and what was asked."""
    seconds = {p.name: round(p.seconds(plan.rates), 3) for p in plan.phases}
    return {
        "flags": dict(flags),
        "planned": [{"phase": p.name, "seconds": seconds[p.name], "peak_bytes": p.peak_bytes} for p in plan.phases],
        "mode": plan.mode,
        "budget_bytes": plan.budget_bytes,
        "step_tokens": plan.job.step,
        "iters": plan.job.iters,
        "rates": asdict(plan.rates),
    }


def _texts(quality: Mapping[str, list[Row]], losses: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For templates: every text, with each model's loss by the first measure that it has."""
    texts = []
    for name, rows in quality.items():
        metric, unit = next((m, u) for m, u in losses if any(r.metric == m for r in rows))
        loss = {r.model: r.value for r in rows if r.metric == metric}
        texts.append({"name": name, "windows": rows[0].n, "metric": metric, "unit": unit, "loss": loss})
    return texts


def page(models: Mapping[str, Checkpoint], sizes: list[Row], quality: Mapping[str, list[Row]], length: int) -> str:
    """Markdown: sizes and speeds, then one table a text; `length` is the tokens of a held-out window."""
    names, texts = list(models), _texts(quality, LOSSES)
    for each in texts:
        each["table"] = text.table(quality[each["name"]], names, text.TABLES["held-out"])
    values = {"sizes": text.table(sizes, names, text.TABLES["sizes"]), "texts": texts, "length": length}
    values |= {"across": comparison.ACROSS, "dequantized": not policy.keeps_packed() and "4-bit" in models}
    return html.document("table.md", {**values, "won": won(models, sizes, quality)})


def won(models: Mapping[str, Checkpoint], sizes: list[Row], quality: Mapping[str, list[Row]]) -> str:
    """A sentence: what the student gained over the teacher, and what it costs."""
    teacher, *_, student = ({r.metric: r.value for r in sizes if r.model == name} for name in models)
    fast = {r.model: r.value for r in sizes if r.metric == "decode_tps"}
    values = {"teacher": teacher, "student": student, "fast": fast, "texts": _texts(quality, LOSSES[::-1])}
    return html.document("won.md", values)


def next_steps(folder: Path) -> str:
    """What to do with a finished run: lines to paste."""
    here, paths = Path.cwd(), (Path(sys.executable), folder.absolute())
    python, run = (path.relative_to(here) if path.is_relative_to(here) else path for path in paths)
    return html.document("next.md", {"python": python, "run": shlex.quote(str(run))})
