"""Report: one self-contained HTML page of a run, or of several side by side; --watch renders it
while a run goes on.

Each part of it takes the story and a key, with which the ids of its pictures begin; what nothing is
known of is left out. KeyError, TypeError or ValueError where values are not this version's.
"""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro

from mis_mlx import cli
from mis_mlx.evaluation import answer_figures
from mis_mlx.reporting import figures, html, run_reader
from mis_mlx.reporting.run_reader import RunRecord, Series
from mis_mlx.storage import files, run_folder
from mis_mlx.types import GIB, Count, MisError, duration, gib

SHOWN = 6  # prompts whose answers are on the page
LATER = "second turn"  # kind of prompts that say little without the turns before


@dataclass(frozen=True)
class Settings:
    """Reads a run folder, writes RUN/report.html: open it in any browser, or mail it."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders; default: the newest one under runs/"""
    out: str | None = None
    """file to write; default: report.html in the first run folder"""
    watch: bool = False
    """write it anew while the run goes on, and let the browser open it anew; until the run ends, or
    Ctrl-C
    """
    every_s: Count = 20
    """seconds between two looks"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def _since(story: RunRecord, series: Series, scale: float = 1.0) -> list[tuple[float, float]]:
    return [(x - story.began_s, y * scale) for x, y in series.points()]


def summary(story: RunRecord, key: str) -> str:
    """Two sentences: what was done, and what came of it; or how far it is."""
    teacher = PurePath(
        str(story.result.get("teacher") or story.config.get("teacher") or "the default teacher")
    ).name
    step, loss = (story.steps.series[name].points()[-1:] for name in ("number", "loss"))
    return html.part(
        "summary", s=story, teacher=teacher, step=step, loss=loss, duration=duration, gib=gib
    )


@dataclass(frozen=True)
class Talk:
    """A prompt of some kind, in a language, and by model what each answers to it: {"text",
    "ended"}.
    """

    prompt: str
    kind: str
    language: str
    answers: dict[str, dict[str, Any]]


def answers(story: RunRecord, key: str) -> str:
    """What teacher and student answer to some prompts, side by side; before that whether the
    student repeats itself.
    """
    talks = _talks(story.answers)
    models = list(dict.fromkeys(model for talk in talks for model in talk.answers))
    pair = models[:1] + models[1:][-1:]
    # a torn line lacks one
    talks = [talk for talk in talks if all(name in talk.answers for name in pair)]
    return html.part("answers", verdict=_verdict(talks, pair), models=pair, talks=_some(talks))


def _talks(rows: Sequence[Mapping[str, Any]]) -> list[Talk]:
    """Rows of answers.jsonl, which come prompt by prompt, the teacher's first."""
    talks = list[Talk]()
    for row in rows:
        prompt = str(row["prompt"])
        model = str(row["model"])
        if not talks or talks[-1].prompt != prompt or model in talks[-1].answers:
            talks.append(Talk(prompt, str(row["kind"]), str(row["language"]), {}))
        talks[-1].answers[model] = {"text": str(row["text"]), "ended": bool(row["ended"])}
    return talks


def _some(talks: Sequence[Talk]) -> list[Talk]:
    """SHOWN of the prompts: each language has as many, spread evenly over its prompts, as far as
    there are.
    """
    languages = list(dict.fromkeys(talk.language for talk in talks))
    chosen = list[Talk]()
    for language in languages:
        of_language = [talk for talk in talks if talk.language == language and talk.kind != LATER]
        count = max(1, SHOWN // len(languages))
        every = max(1, len(of_language) // count)
        chosen += of_language[::every][:count]
    return chosen


def _verdict(talks: Sequence[Talk], models: Sequence[str]) -> str:
    """The sentence on a student that repeats itself more than its teacher; '' where it does not."""
    if len(models) < 2:
        return ""
    teacher, student = (
        sum(answer_figures.loops(talk.answers[name]["text"]) for talk in talks) for name in models
    )
    if 100 * (student - teacher) <= answer_figures.MORE_LOOPS * len(talks):
        return ""
    values = {"student": student, "teacher": teacher, "count": len(talks)}
    return html.document("loops.md", values).replace("**", "")


def recovery(story: RunRecord, key: str) -> str:
    """The table of the four models."""
    return html.part("recovery", table=html.markdown(story.table))


def course(story: RunRecord, key: str) -> str:
    """Loss with temperature and tea breaks, speed, memory: over time, in one picture."""
    steps = story.steps
    air = story.air
    loss = _since(story, steps.series["loss"])
    if not loss:
        return ""
    panels: dict[str, figures.Lines] = {"loss, nats a token": {"loss": loss}}
    warm = {n: _since(story, air.series[c]) for n, c in (("die", "die_c"), ("air", "ambient_c"))}
    if any(warm.values()):
        panels["°C"] = warm
    breaks = [(start - story.began_s, end - story.began_s) for start, end, _ in air.pauses]
    if speed := _since(story, steps.series["tokens_per_s"]):
        panels["tokens/s"] = {"speed": speed}
    planned_s = {p["phase"]: p["seconds"] for p in story.begun.get("planned", [])}.get("distil")
    planned = story.begun["step_tokens"] * story.begun["iters"] / planned_s if planned_s else None
    if memory := _since(story, steps.series["peak_bytes"], 1 / GIB):
        panels["GiB"] = {"memory": memory}
    budget = story.begun.get("budget_bytes") or story.result.get("budget_bytes")
    values = {
        "loss": loss,
        "count": steps.series["loss"].count,
        "warm": warm,
        "breaks": breaks,
        "speed": speed,
        "causes": sorted({cause for _, _, cause in air.pauses}),
        "planned": _known("{:.0f}".format, planned),
        "memory": memory,
        "budget": _known(gib, budget),
    }
    words = " ".join(html.document("course.md", values).split())
    caption = f"{key}course", "Loss, temperature, tea breaks, speed, memory", words
    return html.part("course", pictures=[figures.over_time(caption, panels, shaded=breaks)])


def cost(story: RunRecord, key: str) -> str:
    """Time and memory of every phase beside what was planned."""
    took = story.took()
    peak = {name: max(p["peak_bytes"] for p in story.phases if p["phase"] == name) for name in took}
    if "distil" in took:
        peak["distil"] = max(
            [peak["distil"], *(nbytes for _, nbytes in story.steps.series["peak_bytes"].points())]
        )
    planned = {p["phase"]: p for p in story.begun.get("planned", [])}
    rows = []
    for name in dict.fromkeys([*planned, *took]):
        plan = planned.get(name, {})
        times = [_known(duration, took.get(name)), _known(duration, plan.get("seconds"))]
        rows.append(
            [name, *times, _known(gib, peak.get(name)), _known(gib, plan.get("peak_bytes"))]
        )
    return html.part("cost", phases=rows)


def _known(form: Callable[[float], str], value: float | None) -> str:
    return "–" if value is None else form(value)


def pruning(story: RunRecord, key: str) -> str:
    """Which blocks, heads and neurons were kept, and how important they are."""
    report = story.keep.get("report") or {}
    layers = set(story.keep.get("layers", []))
    pictures = []
    if blocks := {int(i): float(v) for i, v in (report.get("block_importance") or {}).items()}:
        removed = {i: v for i, v in blocks.items() if i not in layers}
        groups = {"kept": {i: v for i, v in blocks.items() if i in layers}, "removed": removed}
        text = f"1 − cosine of each of the {len(blocks)} blocks: how far it turns the stream. "
        text += f"Removed: {', '.join(map(str, removed)) or 'none'}."
        pictures.append(
            figures.columns((f"{key}blocks", "Blocks", text), ("block", "1 − cosine"), groups)
        )
    shares = {}
    for axis in ("ffn", "heads"):
        rows = {
            k.split("/")[0]: v
            for k, v in (report.get("profile") or {}).items()
            if k.endswith(f"/{axis}")
        }
        kept = [rows[i]["kept"] for i in rows if int(i) in layers]
        if kept and min(kept) < 1:
            shares[axis] = f"{min(kept):.0%} to {max(kept):.0%}"
    return html.part("pruning", report=report, pictures=pictures, shares=shares)


def samples(story: RunRecord, key: str) -> str:
    """What the models write after the same words, side by side."""
    texts: dict[str, dict[str, str]] = {}
    for sample in story.samples:
        prompt = f"{sample['language']}: “{sample['prompt']} …”"
        texts.setdefault(prompt, {})[str(sample["model"])] = str(sample["text"])
    return html.part("samples", texts=texts)


def origins(story: RunRecord, key: str) -> str:
    """The command, versions, hashes, settings."""
    words = ["python", "-m", "mis_mlx.distill"]
    for name, value in (story.begun.get("flags") or {}).items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    rates = story.begun.get("rates") or {}
    facts = {**story.origin, **({"machine": rates["device"]} if "device" in rates else {})}
    return html.part(
        "origins",
        command=shlex.join(words) if story.begun else "",
        facts=facts,
        config=story.config,
    )


def comparison(stories: Sequence[RunRecord], names: list[str]) -> str:
    """Several runs side by side: losses on one picture, numbers and their difference to the first
    run's, settings.
    """
    losses = {n: _since(s, s.steps.series["loss"]) for n, s in zip(names, stories, strict=True)}
    picture = ""
    if ends := "; ".join(
        f"{n} ends at {points[-1][1]:.3f}" for n, points in losses.items() if points
    ):
        text = f"Training loss of {len(losses)} runs: {ends}."
        picture = figures.over_time(
            ("all-loss", "Loss of all runs", text), {"loss, nats a token": losses}
        )
    known = dict.fromkeys(
        k for s in stories for k, v in s.result.items() if type(v) in (int, float)
    )
    numbers = [
        [k, *(_cell(s.result.get(k), stories[0].result.get(k)) for s in stories)] for k in known
    ]
    known = dict.fromkeys(k for s in stories for k in s.config)
    settings = [[k, *(str(s.config.get(k, "–")) for s in stories)] for k in known]
    settings = [row for row in settings if len(set(row[1:])) > 1]
    return html.part("comparison", picture=picture, names=names, numbers=numbers, settings=settings)


def _cell(value: Any, first: Any) -> str:
    """A number, and by how much it differs from the first run's; a dash for anything else."""
    if type(value) not in (int, float):
        return "–"
    form = "," if type(value) is int else ",.4g"
    if type(first) not in (int, float) or value == first:
        return format(value, form)
    return f"{value:{form}} ({value - first:+{form}})"


# in the page's order
OF_RUN = (summary, answers, recovery, course, cost, pruning, samples, origins)


def render(stories: Sequence[RunRecord], every_s: int | None = None) -> str:
    """The page. every_s: how often a browser is to open it anew."""
    names = [s.name for s in stories]
    # no two alike
    names = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    parts = [html.part("heading", text=" and ".join(names))]
    if len(stories) > 1:
        parts.append(_part("comparison", partial(comparison, stories, names)))
    for number, (name, story) in enumerate(zip(names, stories, strict=True)):
        if len(stories) > 1:
            parts.append(html.part("heading", text=name))
        parts += [_part(make.__name__, partial(make, story, f"r{number}-")) for make in OF_RUN]
        parts.append(html.part("missing", lines=story.missing))
    return html.page(f"{', '.join(names)}: mis_mlx", "".join(parts), every_s)


def _part(name: str, make: Callable[[], str]) -> str:
    """A part of the page, or a sentence where a file holds what this version does not write."""
    from jinja2 import UndefinedError

    try:
        return make()
    except (
        UndefinedError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        text = (
            f"The part “{name}” is missing: a file is of another version "
            f"({type(error).__name__}: {error})."
        )
        return html.part("note", text=text)


def run(settings: Settings) -> dict[str, Any]:
    """The command: read, draw, write; again and again when watching."""
    s = settings
    figures.need()
    cli.check_ranges(s)
    folders = [Path(name) for name in s.run]
    if not folders:
        configs = list(Path("runs").glob(f"*/{run_folder.CONFIG}"))
        if not configs:
            raise MisError(
                "There is no run under runs/: name a run folder, or make one with distill"
            )
        folders = [max(configs, key=lambda path: path.stat().st_mtime).parent]
    out = Path(s.out) if s.out else folders[0] / "report.html"
    files.need_place("--out", out, "file")
    while True:
        stories = [run_reader.read(folder) for folder in folders]
        going = s.watch and not all(one.result for one in stories)
        files.DISK.make_folder(out.absolute().parent)
        page = render(stories, s.every_s if going else None)
        files.DISK.replace_text(out, page)
        if not going:
            break
        cli.say(
            f"{out}: {', '.join(f'{o.steps.lines} steps of {o.name}' for o in stories)}; Ctrl-C "
            f"ends the watch"
        )
        time.sleep(s.every_s)
    missing = [f"{one.name}: {text}" for one in stories for text in one.missing]
    return {
        "report": str(out),
        "bytes": len(page.encode()),
        "runs": len(stories),
        "missing": missing,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
