"""The parts of a run's page: what was done, what it cost, how it went. From a `Story`, in words, tables and pictures.

A part that a story says nothing of is left out. One whose values are not what this version writes raises KeyError,
TypeError or ValueError, and whoever puts the page together says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mis_mlx.reporting import figures, html
from mis_mlx.reporting.metrics_log import Point
from mis_mlx.reporting.run_reader import Story
from mis_mlx.types import GIB, duration, gib

MODELS = ("teacher", "pruned", "distilled", "4-bit")


def _since(story: Story, points: Sequence[Point], scale: float = 1.0) -> list[Point]:
    return [(x - story.began_s, y * scale) for x, y in points]


def _range(points: Sequence[Point], form: str = ".3f") -> str:
    """'from A to B, between C and D', in words for who cannot see the picture."""
    values = [y for _, y in points]
    ends = f"from {format(values[0], form)} to {format(values[-1], form)}"
    return f"{ends}, between {format(min(values), form)} and {format(max(values), form)}"


def summary(story: Story, key: str) -> str:
    """Two sentences: what was done, and what came of it; or how far it is."""
    r, begun = story.result, story.begun
    teacher = PurePath(str(r.get("teacher") or story.config.get("teacher") or "the default teacher")).name
    device = (begun.get("rates") or {}).get("device", "an unknown machine")
    done, iters = story.steps.series["number"].extremes, story.config.get("iters", "?")
    if not story.ended:
        at = f"step {done[1]:.0f} of {iters}" if done else "no step yet"
        loss = story.steps.series["loss"].last
        said = f"; the last training loss is {loss[1]:.3f} nats a token" if loss else ""
        text = f"A student of {teacher} is being made on {device}. It is at {at}{said}."
        return f'<p class="lead">{html.escape(text)}</p>'
    params = f"{r['params_teacher'] / 1e6:.1f} to {r['params_student'] / 1e6:.1f} million parameters"
    bits = ""
    if r.get("nll_quantized"):
        bits = f" and quantized to {8e6 * r['bytes_4-bit'] / r['params_student']:.1f} bits a weight, all counted,"
    first = (
        f"{teacher} was pruned from {params} (scenario {story.config.get('scenario')}), distilled on "
        f"{r['tokens']:,} tokens{bits} in {duration(r['seconds'])} on {device}, with {gib(r['peak_bytes'])} of memory "
        "at the peak."
    )
    second = (
        f"Held-out loss went from {r['nll_pruned']:.3f} after pruning to {r['nll_student']:.3f} nats a token; "
        f"the teacher has {r['nll_teacher']:.3f}"
        + (f", so {r['gap_closed']:.1%} of the gap is closed" if r.get("gap_closed") is not None else "")
        + (f", and the quantized student {r['nll_quantized']:.3f}." if r.get("nll_quantized") else ".")
    )
    return f'<p class="lead">{html.escape(f"{first} {second}")}</p>'


def recovery(story: Story, key: str) -> str:
    """The table of the four models."""
    return html.section("Recovery", html.markdown(story.table)) if story.table else ""


def course(story: Story, key: str) -> str:
    """Loss with temperature and tea breaks, memory, speed: over time."""
    steps, air = story.steps, story.air
    loss = _since(story, steps.series["loss"].points())
    if not loss:
        return ""
    panels: dict[str, Mapping[str, Sequence[Point]]] = {"loss, nats a token": {"loss": loss}}
    words = [f"Training loss {_range(loss)}, {steps.series['loss'].count:,} steps logged."]
    warm = {"die": air.series["die_c"].points(), "air": air.series["ambient_c"].points()}
    if any(warm.values()):
        panels["°C"] = {name: _since(story, points) for name, points in warm.items()}
        words += [f"{n.capitalize()} {_range(points, '.1f')} °C." for n, points in panels["°C"].items() if points]
    else:
        words.append("No temperature was measured.")
    breaks = [(p.start_s - story.began_s, p.end_s - story.began_s) for p in air.pauses]
    causes = ", ".join(sorted({p.cause for p in air.pauses}))
    words.append(f"Tea breaks: {len(breaks)}{f' ({causes}), shaded' if breaks else ''}.")
    if steps.restarts:
        words.append(f"Taken up again {len(steps.restarts)} times, dotted.")
    numbers = [] if steps.restarts else _since(story, steps.series["number"].points())
    first = figures.over_time(
        f"{key}loss", "Loss, temperature, tea breaks", " ".join(words), panels, shaded=breaks,
        marks=[x - story.began_s for x in steps.restarts], steps=numbers,
    )  # fmt: skip
    memory, speed = (
        _since(story, steps.series[n].points(), s) for n, s in (("peak_bytes", 1 / GIB), ("tokens_per_s", 1.0))
    )
    budget = story.begun.get("budget_bytes") or story.result.get("budget_bytes")
    more = []
    if memory:
        limit = {f"budget {gib(budget)}": budget / GIB} if budget else {}
        text = f"Peak memory of MLX in each step {_range(memory, '.2f')} GiB; the budget is "
        text += gib(budget) if budget else "not known"
        more.append(
            figures.over_time(f"{key}memory", "Memory", f"{text}.", {"GiB": {"peak": memory}}, limits=limit, low=0)
        )
    if speed:
        planned = _planned_speed(story)
        limit = {f"planned {planned:.0f}": planned} if planned else {}
        text = f"Tokens trained on a second {_range(speed, '.0f')}; the plan's rate for this machine is "
        text += f"{planned:.0f}." if planned else "not known."
        more.append(
            figures.over_time(
                f"{key}speed", "Speed", text, {"tokens a second": {"measured": speed}}, limits=limit, low=0
            )
        )
    return html.section("How it went", html.figures(first, *more))


def _planned_speed(story: Story) -> float | None:
    seconds = {p["phase"]: p["seconds"] for p in story.begun.get("planned", [])}.get("distil")
    return story.begun["step_tokens"] * story.begun["iters"] / seconds if seconds else None


def cost(story: Story, key: str) -> str:
    """Time and memory of every phase beside what was planned; decoding beside what memory allows."""
    took: dict[str, float] = {}
    peak: dict[str, float] = {}
    for p in story.phases:  # a phase that was killed and taken up again has two lines
        took[p["phase"]] = took.get(p["phase"], 0.0) + p["seconds"]
        peak[p["phase"]] = max(peak.get(p["phase"], 0.0), p["peak_bytes"])
    if "distil" in took and (most := story.steps.series["peak_bytes"].extremes):
        peak["distil"] = max(peak["distil"], most[1])
    planned = {p["phase"]: p for p in story.begun.get("planned", [])}
    names = [*planned, *(n for n in took if n not in planned)]
    shown = []
    if names:
        rows = {n: [took.get(n), planned[n]["seconds"] if n in planned else None] for n in names}
        said = "; ".join(f"{n} {_of(rows[n], duration)}" for n in names)
        more = " Timing and texts of the models are in no plan." if "measure" in took else ""
        shown.append(figures.bars(f"{key}time", "Time of each phase", f"Took (planned): {said}.{more}", "seconds", rows,
                                  ["took", "planned"]))  # fmt: skip
        rows = {n: [peak.get(n), planned[n]["peak_bytes"] if n in planned else None] for n in names}
        said = "; ".join(f"{n} {_of(rows[n], gib)}" for n in names)
        rows = {n: [v / GIB if v is not None else None for v in row] for n, row in rows.items()}
        budget = story.begun.get("budget_bytes")
        limit = ("budget", budget / GIB) if budget else None
        shown.append(figures.bars(f"{key}peak", "Memory of each phase", f"MLX's peak (planned, all): {said}.", "GiB",
                                  rows, ["used", "planned"], limit))  # fmt: skip
    shown.append(_decoding(story, key))
    return html.section("What it cost", html.figures(*filter(None, shown)))


def _of(pair: Sequence[float | None], form: Callable[[float], str]) -> str:
    took, planned = ("–" if v is None else form(v) for v in pair)
    return f"{took} ({planned})"


def _decoding(story: Story, key: str) -> str:
    """Tokens a second beside the most that reading all weights from memory once a token allows."""
    r, rates = story.result, story.begun.get("rates") or {}
    rows: dict[str, Sequence[float | None]] = {}
    for name in MODELS:
        if (measured := r.get(f"decode_tps_{name}")) is None:
            continue
        params = r["params_teacher"] if name == "teacher" else r["params_student"]
        nbytes = r["bytes_4-bit"] * 1e6 if name == "4-bit" else params * (2 if rates.get("gpu") else 4)
        rows[name] = [measured, rates["memory_bytes_per_s"] / nbytes if rates else None]
    if not rows:
        return ""
    said = "; ".join(f"{n} {_of(pair, '{:.1f}'.format)}" for n, pair in rows.items())
    text = f"Measured (the most that {rates.get('memory_bytes_per_s', 0) / 1e9:.0f} GB/s of memory allow"
    text += f", {rates.get('source', 'unknown')}): {said} tokens a second."
    return figures.bars(f"{key}decode", "Decoding", text, "tokens a second", rows, ["measured", "roofline"])


def samples(story: Story, key: str) -> str:
    """What the models write after the same words, side by side."""
    prompts = list(dict.fromkeys((s["language"], s["prompt"]) for s in story.samples))
    parts = []
    for language, prompt in prompts:
        said = {
            str(s["model"]): str(s["text"]) for s in story.samples if (s["language"], s["prompt"]) == (language, prompt)
        }
        parts.append(f"<h3>{html.escape(f'{language}: “{prompt} …”')}</h3>")
        parts.append(html.texts(said))
    return html.section("What they write", *parts, '<p class="note">Greedy, cut off at the same number of tokens.</p>'
                        if parts else "")  # fmt: skip


def origins(story: Story, key: str) -> str:
    """The command, versions, hashes, settings."""
    flags: Mapping[str, Any] = story.begun.get("flags") or {}
    given = [part for name, value in flags.items() for part in _flag(name, value)]
    parts = []
    if story.begun:
        command = shlex.join(["python", "-m", "mis_mlx.distill", *given])
        parts.append(f"<pre>{html.escape(command)}</pre>")
    facts = [[name, str(value)] for name, value in story.origin.items()]
    facts += (
        [[f"checkpoint of step {story.checkpoint.get('step')}", str(story.checkpoint.get("sha256"))]]
        if story.checkpoint
        else []
    )
    facts += [["machine", str(v)] for k, v in (story.begun.get("rates") or {}).items() if k == "device"]
    if facts:
        parts.append(html.table(["", "version or hash"], facts, facts=True))
    if story.config:
        rows = [[name, str(value)] for name, value in story.config.items()]
        parts.append(
            f"<details><summary>All settings</summary>{html.table(['setting', 'value'], rows, facts=True)}</details>"
        )
    return html.section("To do it again", *parts)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]
