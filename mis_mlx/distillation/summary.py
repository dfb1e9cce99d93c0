"""What came out of a run: one dictionary for machines, one page of tables for people."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mis_mlx.evaluation import comparison
from mis_mlx.models import arch, mlx_generate, model_writer, policy
from mis_mlx.planner.phases import MemoryPlan
from mis_mlx.pruning import select
from mis_mlx.reporting import html, text
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, Row

LOSSES = (("nll", "nats/token"), ("bpb", "bits per byte"))  # the second where models read different tokens


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
        "nll_teacher": main.get(("teacher", "nll")),  # none where the student reads other tokens
        "nll_pruned": main.get(("pruned", "nll")),
        "nll_student": main.get(("distilled", "nll")),
        "nll_quantized": main.get(("4-bit", "nll")),
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


def page(models: Mapping[str, Checkpoint], sizes: list[Row], quality: Mapping[str, list[Row]], length: int) -> str:
    """Markdown: sizes and speeds, then one table a text; `length` is the tokens of a held-out window."""
    names = list(models)
    parts = [text.table(sizes, names, (("params", "parameters, millions", ".1f"), *mlx_generate.METRICS))]
    for name, rows in quality.items():
        head = f"{name}, {rows[0].n} windows of {length} tokens held out, ± 95 %"
        parts.append(head + "\n\n" + text.table(rows, names, comparison.METRICS))
        metric, unit = next((m, u) for m, u in LOSSES if any(r.metric == m for r in rows))
        loss = {r.model: r.value for r in rows if r.metric == metric}
        parts += [comparison.ACROSS] if metric == "bpb" else []
        if loss["distilled"] > loss["pruned"]:
            parts.append(
                f"**On {name} distillation made the student worse**: {loss['distilled']:.3f} {unit}, where it had "
                f"{loss['pruned']:.3f} as pruned. Train longer (--iters), on such text (--data), or take `pruned/`."
            )
    if not policy.keeps_packed() and "4-bit" in models:
        parts.append(
            "The 4-bit loss is computed from the de-quantized weights, which are the same numbers; speeds are those "
            "of stock mlx-lm with float32 activations, 4-bit kernels included."
        )
    return "\n\n".join([*parts, won(models, sizes, quality)])


def won(models: Mapping[str, Checkpoint], sizes: list[Row], quality: Mapping[str, list[Row]]) -> str:
    """A sentence: what the student gained over the teacher, and what it costs."""
    size, *_, last = ({r.metric: r.value for r in sizes if r.model == name} for name in models)
    fast = {r.model: r.value for r in sizes if r.metric == "decode_tps"}
    said = f"{1 - last['params'] / size['params']:.0%} fewer parameters"
    said += f", {size['bytes']:.1f} -> {last['bytes']:.1f} MB" if "bytes" in size else ""
    said += f", decodes {fast['distilled'] / fast['teacher']:.1f}x as fast unquantized" if len(fast) > 2 else ""
    for name, rows in quality.items():
        metric, unit = next((m, u) for m, u in reversed(LOSSES) if any(r.metric == m for r in rows))
        loss = {r.model: r.value for r in rows if r.metric == metric}
        said += f"; {name} {loss['distilled'] - loss['teacher']:+.3f} {unit}"
        said += f", 4 bits add {loss['4-bit'] - loss['distilled']:.3f}" if "4-bit" in loss else ""
    return f"The student against its teacher: {said}."


def next_steps(folder: Path) -> str:
    """What to do with a finished run: lines to paste."""
    here, paths = Path.cwd(), (Path(sys.executable), folder.absolute())
    python, run = (path.relative_to(here) if path.is_relative_to(here) else path for path in paths)
    return html.document("next.md", {"python": python, "run": shlex.quote(str(run))})
