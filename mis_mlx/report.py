"""Write an HTML page about a run, or about several side by side.

The page needs no other file. Each part of it takes the story and a key, with which the ids of its
pictures begin, and leaves out what is unknown. KeyError, TypeError or ValueError where values are
not this version's.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro

from mis_mlx import cli
from mis_mlx.distillation import run_verdict
from mis_mlx.judge import answer_figures, repetition
from mis_mlx.models.architectures import scenarios
from mis_mlx.reporting import axes, figures, html, run_reader, smoothing, timeline
from mis_mlx.reporting.run_reader import Point, Record, RunRecord, Series
from mis_mlx.storage import files, run_folder
from mis_mlx.types import GIB, Count, MisError, duration, evenly, gib

FEW = 5  # steps: a course of fewer is not smoothed
SHOWN = 6  # prompts whose answers are on the page


@dataclass(frozen=True)
class Settings:
    """Reads a run folder and writes RUN/report.html: open it in any browser, or mail it."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders; default: the newest one under runs/"""
    out: str | None = None
    """file to write; default: report.html in the first run folder"""
    watch: bool = False
    """update the page, and reload it in the browser, until the run ends or you press Ctrl-C"""
    every_s: Count = 20
    """seconds between updates"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def _since(story: RunRecord, series: Series, scale: float = 1.0) -> list[Point]:
    """(seconds since the run began, value times `scale`) of each point."""
    return [(wall_s - story.began_s, value * scale) for wall_s, value in series.points()]


def verdict(story: RunRecord, key: str) -> str:
    """What the student costs and loses, a warning first if it repeats itself.

    Of a run that goes on: how far it is.
    """
    if not story.result:
        return _summary(story)
    talks, models = _told(story)
    sentences = run_verdict.sentences(story.result, story.config.get("lose"))
    return html.part("verdict", warning=_warning(talks, models), sentences=sentences)


def summary(story: RunRecord, key: str) -> str:
    """What was done, on what and how long, and with what result; '' while the run goes on."""
    return _summary(story) if story.result else ""


def _summary(story: RunRecord) -> str:
    teacher = story.result.get("teacher") or story.config.get("teacher") or "the default teacher"
    return html.part(
        "summary",
        s=story,
        scenario=scenarios.plain(str(story.config.get("scenario"))),
        teacher=PurePath(str(teacher)).name,
        step=story.steps.series["number"].points()[-1:],
        loss=story.steps.series["loss"].points()[-1:],
        duration=duration,
        gib=gib,
    )


@dataclass(frozen=True)
class Talk:
    """A prompt and its answers: {model: {"text", "ended"}}."""

    prompt: str
    kind: str
    language: str
    answers: dict[str, dict[str, Any]]


def answers(story: RunRecord, key: str) -> str:
    """Answers of teacher and student side by side."""
    talks, models = _told(story)
    return html.part("answers", models=models, talks=_some(talks))


def _told(story: RunRecord) -> tuple[list[Talk], list[str]]:
    """(the prompts that teacher and student have answered, these two models)."""
    talks = _talks(story.answers)
    models: dict[str, None] = {}  # in their order
    for talk in talks:
        models.update(dict.fromkeys(talk.answers))
    # the teacher is the first, the student the last
    names = list(models)
    pair = names[:1] + names[1:][-1:]
    # a torn line lacks one
    return [talk for talk in talks if talk.answers.keys() >= {*pair}], pair


def _talks(rows: Sequence[Record]) -> list[Talk]:
    """Rows of answers.jsonl, which come prompt by prompt, the teacher's first."""
    talks: list[Talk] = []
    for row in rows:
        prompt = str(row["prompt"])
        model = str(row["model"])
        if not talks or talks[-1].prompt != prompt or model in talks[-1].answers:
            talk = Talk(
                prompt=prompt,
                kind=str(row["kind"]),
                language=str(row["language"]),
                answers={},
            )
            talks.append(talk)
        answer = {"text": str(row["text"]), "ended": bool(row["ended"])}
        talks[-1].answers[model] = answer
    return talks


def _some(talks: Sequence[Talk]) -> list[Talk]:
    """About SHOWN of the prompts: as many of each language, spread evenly over its prompts."""
    languages = list(dict.fromkeys(talk.language for talk in talks))
    first_turns = [talk for talk in talks if talk.kind != run_folder.LATER]
    chosen: list[Talk] = []
    for language in languages:
        of_language = [talk for talk in first_turns if talk.language == language]
        count = max(1, SHOWN // len(languages))
        chosen += evenly(of_language, count)
    return chosen


def _warning(talks: Sequence[Talk], models: Sequence[str]) -> str:
    """The sentence on a student that repeats itself more than its teacher, else ''."""
    if len(models) < 2:
        return ""
    loops = []
    for name in models:
        texts = [talk.answers[name]["text"] for talk in talks]
        loops.append(sum(map(repetition.loops, texts)))
    teacher, student = loops
    allowed = answer_figures.MORE_LOOPS * len(talks)
    if 100 * (student - teacher) <= allowed:
        return ""
    values = {"student": student, "teacher": teacher, "count": len(talks)}
    return html.document("loops.md", values).replace("**", "")


def recovery(story: RunRecord, key: str) -> str:
    """The table of the four models."""
    return html.part("recovery", table=html.markdown(story.table))


def course(story: RunRecord, key: str) -> str:
    """Loss with temperature and tea breaks, speed, memory: over time, in one picture."""
    air = story.air
    series = story.steps.series
    loss = _since(story, series["loss"])
    if not loss:
        return ""
    panels: dict[str, axes.Lines] = {"loss, nats per token": {"each step": loss}}
    width = 0
    if len(loss) >= FEW:
        mean, width = smoothing.smoothed(loss)
        panels["loss, nats per token"] = {"each step": loss, "smoothed": mean}
    warm = {
        "die": _since(story, air.series["die_c"]),
        "air": _since(story, air.series["ambient_c"]),
    }
    if any(warm.values()):
        panels["°C"] = warm
    speed = _since(story, series["tokens_per_s"])
    if speed:
        panels["tokens/s"] = {"speed": speed}
    memory = _since(story, series["peak_bytes"], 1 / GIB)
    if memory:
        panels["GiB"] = {"memory": memory}
    breaks = []
    causes = set()
    for start, end, cause in air.pauses:
        breaks.append((start - story.began_s, end - story.began_s))
        causes.add(cause)
    budget = story.begun.get("budget_bytes") or story.result.get("budget_bytes")
    values = {
        "loss": loss,
        "width": width,
        "count": series["loss"].count,
        "warm": warm,
        "breaks": breaks,
        "speed": speed,
        "causes": sorted(causes),
        "planned": _known("{:.0f}".format, _planned_speed(story)),
        "memory": memory,
        "budget": _known(gib, budget),
    }
    words = " ".join(html.document("course.md", values).split())
    caption = (f"{key}course", "Loss, temperature, tea breaks, speed, memory", words)
    picture = timeline.over_time(
        caption, panels, shaded=breaks, faint={"each step"} if width else ()
    )
    return html.part("course", pictures=[picture])


def _planned_speed(story: RunRecord) -> float | None:
    """Tokens a second that the plan expects of distillation, if it has that phase."""
    begun = story.begun
    seconds = {plan["phase"]: plan["seconds"] for plan in begun.get("planned", [])}
    if not seconds.get("distil"):
        return None
    return begun["step_tokens"] * begun["iters"] / seconds["distil"]


def cost(story: RunRecord, key: str) -> str:
    """Time and memory of every phase, as it was and as planned."""
    took = story.took()
    peaks: dict[str, list[float]] = {}
    for record in story.phases:
        peaks.setdefault(record["phase"], []).append(record["peak_bytes"])
    if "distil" in took:
        points = story.steps.series["peak_bytes"].points()
        peaks["distil"] += [nbytes for _, nbytes in points]
    planned = {plan["phase"]: plan for plan in story.begun.get("planned", [])}
    rows = []
    for name in dict.fromkeys([*planned, *took]):
        plan = planned.get(name, {})
        row = [
            name,
            _known(duration, took.get(name)),
            _known(duration, plan.get("seconds")),
            _known(gib, max(peaks.get(name, ()), default=None)),
            _known(gib, plan.get("peak_bytes")),
        ]
        rows.append(row)
    return html.part("cost", phases=rows)


def _known(form: Callable[[float], str], value: float | None) -> str:
    return "–" if value is None else form(value)


def pruning(story: RunRecord, key: str) -> str:
    """Which blocks, heads and neurons were kept, and how important they are."""
    report = story.keep.get("report") or {}
    layers = set(story.keep.get("layers", []))
    pictures = []
    importance = report.get("block_importance") or {}
    blocks = {int(number): float(value) for number, value in importance.items()}
    if blocks:
        kept = {}
        removed = {}
        for number, value in blocks.items():
            if number in layers:
                kept[number] = value
            else:
                removed[number] = value
        listed = ", ".join(map(str, removed)) or "none"
        text = (
            f"1 − cosine of each of the {len(blocks)} blocks: how far it turns the hidden states. "
            f"Removed: {listed}."
        )
        caption = (f"{key}blocks", "Blocks", text)
        groups = {"kept": kept, "removed": removed}
        pictures.append(figures.columns(caption, ("block", "1 − cosine"), groups))
    shares = {}
    for axis in ("ffn", "heads"):
        of_blocks = []
        for name, row in (report.get("profile") or {}).items():
            number, _, ending = name.partition("/")
            if ending == axis and int(number) in layers:
                of_blocks.append(row["kept"])
        if of_blocks and min(of_blocks) < 1:
            shares[axis] = f"{min(of_blocks):.0%} to {max(of_blocks):.0%}"
    return html.part("pruning", report=report, pictures=pictures, shares=shares)


def samples(story: RunRecord, key: str) -> str:
    """What the models write after the same words, side by side."""
    texts: dict[str, dict[str, str]] = {}
    for sample in story.samples:
        prompt = f"{sample['language']}: “{sample['prompt']} …”"
        by_model = texts.setdefault(prompt, {})
        by_model[str(sample["model"])] = str(sample["text"])
    return html.part("samples", texts=texts)


def origins(story: RunRecord, key: str) -> str:
    """The command, versions, hashes, settings."""
    words = ["python", "-m", "mis_mlx.distill"]
    for name, value in (story.begun.get("flags") or {}).items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += map(str, values)
    facts = dict(story.origin)
    rates = story.begun.get("rates") or {}
    if "device" in rates:
        facts["machine"] = rates["device"]
    command = ""
    if story.begun:
        command = shlex.join(words)
    return html.part("origins", command=command, facts=facts, config=story.config)


def comparison(stories: Sequence[RunRecord], names: list[str]) -> str:
    """Several runs side by side: losses in one picture, numbers, settings that differ.

    Beside a number stands its difference to the first run's.
    """
    losses = {}
    ends = []
    for name, story in zip(names, stories, strict=True):
        series = story.steps.series["loss"]
        points = _since(story, series)
        losses[name] = smoothing.smoothed(points)[0] if len(points) >= FEW else points
        if points:
            _, last = points[-1]
            ends.append(f"{name} ends at {last:.3f}")
    picture = ""
    if ends:
        text = f"Training loss of {len(losses)} runs: {'; '.join(ends)}."
        caption = ("all-loss", "Loss of all runs", text)
        picture = timeline.over_time(caption, {"loss, nats per token": losses})
    results = []
    for story in stories:
        results.append({k: v for k, v in story.result.items() if type(v) in (int, float)})
    numbers = []
    for name, values in _by_key(results).items():
        cells = [_cell(value, values[0]) for value in values]
        numbers.append([name, *cells])
    configs = [story.config for story in stories]
    settings = []
    for name, values in _by_key(configs).items():
        texts = [str(value) for value in values]
        if len(set(texts)) > 1:
            settings.append([name, *texts])
    return html.part(
        "comparison",
        picture=picture,
        names=names,
        numbers=numbers,
        settings=settings,
    )


def _by_key(mappings: Sequence[Record]) -> dict[str, list[Any]]:
    """{key of any of them: its value in each of them, a dash where there is none}."""
    keys: dict[str, None] = {}
    for mapping in mappings:
        keys.update(dict.fromkeys(mapping))
    values = {}
    for key in keys:
        values[key] = [mapping.get(key, "–") for mapping in mappings]
    return values


def _cell(value: Any, first: Any) -> str:
    """A number, and by how much it differs from the first run's; a dash for anything else."""
    if type(value) not in (int, float):
        return "–"
    form = "," if type(value) is int else ",.4g"
    if type(first) not in (int, float) or value == first:
        return format(value, form)
    return f"{value:{form}} ({value - first:+{form}})"


# in the page's order
OF_RUN = (verdict, answers, samples, summary, recovery, course, cost, pruning, origins)


def render(stories: Sequence[RunRecord], every_s: int | None = None) -> str:
    """The page. every_s: how often a browser is to open it anew, in seconds."""
    names = []
    folders = [story.name for story in stories]
    for number, name in enumerate(folders, 1):
        # no two alike
        names.append(name if folders.count(name) == 1 else f"{name} ({number})")
    parts = [html.part("heading", text=" and ".join(names))]
    if len(stories) > 1:
        parts.append(_part(comparison, stories, names))
    for number, (name, story) in enumerate(zip(names, stories, strict=True)):
        if len(stories) > 1:
            parts.append(html.part("heading", text=name))
        key = f"r{number}-"
        parts += [_part(make, story, key) for make in OF_RUN]
        parts.append(html.part("missing", lines=story.missing))
    title = f"{', '.join(names)}: mis_mlx"
    return html.page(title, "".join(parts), every_s)


def _part(make: Callable[..., str], *values: Any) -> str:
    """A part of the page, or a sentence where a file holds what this version does not write."""
    from jinja2 import UndefinedError

    try:
        return make(*values)
    except (
        UndefinedError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        text = (
            f"The part “{make.__name__}” is missing: a file comes from another version "
            f"({type(error).__name__}: {error})."
        )
        return html.part("note", text=text)


def run(settings: Settings) -> dict[str, Any]:
    """The command: read, draw, write; again and again when watching."""
    cli.check_ranges(settings)
    folders = [Path(name) for name in settings.run]
    if not folders:
        configs = list(Path("runs").glob(f"*/{run_folder.CONFIG}"))
        if not configs:
            raise MisError(
                "There is no run under runs/: name a run folder, or make one with distill"
            )
        newest = max(configs, key=lambda path: path.stat().st_mtime)
        folders = [newest.parent]
    out = folders[0] / "report.html"
    if settings.out:
        out = Path(settings.out)
    files.need_place("--out", out, "file")
    while True:
        stories = [run_reader.read(folder) for folder in folders]
        going = settings.watch and not all(story.result for story in stories)
        files.DISK.make_folder(out.absolute().parent)
        page = render(stories, settings.every_s if going else None)
        files.DISK.replace_text(out, page)
        if not going:
            break
        progress = ", ".join(f"{story.steps.lines} steps of {story.name}" for story in stories)
        cli.say(f"{out}: {progress}; Ctrl-C ends the watch")
        time.sleep(settings.every_s)
    cli.say(f"{out}: open it in a browser")
    missing = []
    for story in stories:
        missing += [f"{story.name}: {text}" for text in story.missing]
    return {
        "report": str(out),
        "bytes": len(page.encode()),
        "runs": len(stories),
        "missing": missing,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
