"""What came out of a search: which finalist is best and how sure that is, in tables and in one sentence."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mis_mlx.maths.stats import interval
from mis_mlx.models.config import Shape
from mis_mlx.pruning import shape_search
from mis_mlx.reporting import html, text
from mis_mlx.types import Row

OFTEN = 0.1  # share of steps that the guard skips or clips, above which a training is not stable
FORMS = {"layers": "{} layers", "ffn": "FFN {}", "heads": "{} heads", "hidden": "hidden {}", "vocab": "{:,} tokens"}
METRICS = text.metrics("search")


def words(shape: Shape, before: Shape) -> str:
    """What of the teacher's shape is cut: '20 layers, FFN 1280'."""
    cut = [form.format(getattr(shape, a)) for a, form in FORMS.items() if getattr(shape, a) != getattr(before, a)]
    return ", ".join(cut) or "the teacher's own"


def command_line(shape: Shape, before: Shape, teacher: str | None, data: str | None, vocab: str | None = None) -> str:
    """The `distill` that makes this student."""
    parts = ["scripts/mis distill"]
    given = ("teacher", teacher), ("data", data), ("vocab", vocab)
    parts += [f"--{n} {shlex.quote(v)}" for n, v in given if v]
    parts += ["--scenario none"]
    parts += [f"--{a} {getattr(shape, a)}" for a in shape_search.AXES if getattr(shape, a) != getattr(before, a)]
    return " ".join(parts + {64: [], 32: ["--q-group-size 32"], 0: ["--quantize 0"]}[shape_search.group_of(shape)])


def unstable(record: Mapping[str, Any]) -> str:
    """Why a finalist's training was not stable, or nothing."""
    if record["diverged"] or None in record["kl_distilled"] or None in record["nll_distilled"]:
        return "its loss became no number"
    meddled = record["skipped"] + record["clipped"]
    if meddled > OFTEN * record["steps"]:
        return f"the guard had to step in at {meddled} of {record['steps']} steps"
    before, after = (float(np.mean(record[f"kl_{m}"])) for m in ("pruned", "distilled"))
    return f"its KL rose from {before:.3f} to {after:.3f}" if after > before else ""


@dataclass(frozen=True)
class Verdict:
    """best: the stable finalist of least KL after distillation. gap: of the next one above it, (mean, low, high)
    over the same windows. None where there is none."""

    best: int | None
    second: int | None
    gap: tuple[float, float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the best is better by more than the noise, or alone."""
        return self.best is not None and (self.gap is None or self.gap[1] > 0)


def best_candidate(records: Sequence[Mapping[str, Any]]) -> Verdict:
    """Which finalist, by its number in `records`, and how sure that is: the least sure of all comparisons counts."""
    stable = [i for i, r in enumerate(records) if not unstable(r)]
    if not stable:
        return Verdict(None, None, None)
    kl = {i: np.array(records[i]["kl_distilled"]) for i in stable}
    best = min(stable, key=lambda i: kl[i].mean())
    gaps = {i: interval(kl[i] - kl[best]) for i in stable if i != best}
    if not gaps:
        return Verdict(best, None, None)
    second = min(gaps, key=lambda i: gaps[i][1])
    return Verdict(best, second, gaps[second])


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """A finalist for a run's JSON: means in place of windows."""
    lists = {k: v for k, v in record.items() if isinstance(v, list)}
    means = {k: None if None in v else float(np.mean(v)) for k, v in lists.items()}
    return {**record, **means, "unstable": unstable(record)}


def table(records: Sequence[Mapping[str, Any]], names: Sequence[str], teacher_s: float | None) -> str:
    """Markdown: a column for each finalist, means with 95 % intervals. teacher_s: its seconds a token, if timed."""
    rows = []
    for record, name in zip(records, names, strict=True):
        rows.append(Row(name, "params", record["params"] / 1e6))
        rows.append(Row(name, "meddled", record["skipped"] + record["clipped"]))
        if teacher_s and "decode_s" in record:
            rows.append(Row(name, "speed", teacher_s / record["decode_s"]))
        for metric, _, _ in METRICS:
            if isinstance(values := record.get(metric), list) and None not in values:
                rows.append(Row(name, metric, *interval(np.array(values)), len(values)))
    return text.table(rows, names, METRICS)


def sentence(found: Verdict, records: Sequence[Mapping[str, Any]], names: Sequence[str], lines: Sequence[str]) -> str:
    """The recommendation. names, lines: of the finalists, for people, and the commands that make them."""
    best = {} if found.best is None else {**records[found.best], "name": names[found.best], "line": lines[found.best]}
    second = None if found.second is None else names[found.second]
    values = {"found": found, "best": best, "second": second, "why": zip(names, map(unstable, records), strict=True)}
    return html.document("search.md", values)
