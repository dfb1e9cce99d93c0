"""Write an HTML page about a run.

The page needs no other file. Each part of it takes the story, and leaves out what is unknown.
KeyError, TypeError or ValueError where values are not this version's.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro

from mis_mlx import cli
from mis_mlx.distillation.summary import first_sentences
from mis_mlx.judge import answer_figures, repetition
from mis_mlx.models.architectures import scenarios
from mis_mlx.reporting import charts, html, run_reader
from mis_mlx.reporting.run_reader import Record, RunRecord, points_of
from mis_mlx.storage import files, run_folder
from mis_mlx.types import MisError, duration, evenly, gib

SHOWN = 6  # prompts whose answers are on the page


@dataclass(frozen=True)
class Settings:
    """Reads a run folder and writes RUN/report.html: open it in any browser, or mail it."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """run folder; default: the newest one under runs/"""
    out: str | None = None
    """file to write; default: report.html in the run folder"""


def verdict(story: RunRecord) -> str:
    """What the student costs and loses, a warning first if it repeats itself.

    Of a run that goes on: how far it is.
    """
    if not story.result:
        return _summary(story)
    talks, models = _told(story)
    sentences = first_sentences(story.result, story.config.get("lose"))
    return html.part("verdict", warning=_warning(talks, models), sentences=sentences)


def summary(story: RunRecord) -> str:
    """What was done, on what and how long, and with what result; '' while the run goes on."""
    return _summary(story) if story.result else ""


def _summary(story: RunRecord) -> str:
    teacher = story.result.get("teacher") or story.config.get("teacher") or "the default teacher"
    steps = points_of(story.steps, "number", "loss") or points_of(story.scales, "number", "loss")
    return html.part(
        "summary",
        s=story,
        scenario=scenarios.plain(str(story.config.get("scenario"))),
        teacher=PurePath(str(teacher)).name,
        last=steps[-1] if steps else None,
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


def answers(story: RunRecord) -> str:
    """Answers of teacher and student side by side, to about SHOWN of the prompts.

    As many of each language, spread evenly over its prompts.
    """
    talks, models = _told(story)
    languages = list(dict.fromkeys(talk.language for talk in talks))
    first_turns = [talk for talk in talks if talk.kind != run_folder.LATER]
    chosen: list[Talk] = []
    for language in languages:
        of_language = [talk for talk in first_turns if talk.language == language]
        count = max(1, SHOWN // len(languages))
        chosen += evenly(of_language, count)
    return html.part("answers", models=models, talks=chosen)


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


def recovery(story: RunRecord) -> str:
    """The table of the four models."""
    return html.part("recovery", table=html.markdown(story.table))


def course(story: RunRecord) -> str:
    """Loss of the weights' steps and of the scales'; temperatures."""
    pictures = []
    for key, title, records, planned in (
        ("loss", "Training", story.steps, _planned_speed(story)),
        ("scales", "Scales of the rounded student", story.scales, None),
    ):
        loss = points_of(records, "number", "loss")
        if not loss:
            continue
        speed = []
        for record in records:
            tokens = run_reader.finite(record.get("tokens"))
            seconds = run_reader.finite(record.get("seconds"))
            if tokens and seconds:
                speed.append((0, tokens / seconds))
        values = {
            "loss": loss,
            "speed": speed,
            "planned": planned,
        }
        text = " ".join(html.document("course.md", values).split())
        picture = charts.lines((key, title, text), ("step", "nats per token"), {"loss": loss})
        pictures.append(picture)
    warm = {}
    for name, field in (("die", "die_c"), ("air", "ambient_c")):
        points = points_of(story.air, "wall_s", field)
        if points:
            first_s, _ = points[0]
            warm[name] = [((wall_s - first_s) / 60, value) for wall_s, value in points]
    if warm:
        values = {
            "loss": [],
            "warm": warm,
            "breaks": story.result.get("tea_breaks", 0),
            "causes": sorted(story.result.get("tea_reasons", {})),
        }
        text = " ".join(html.document("course.md", values).split())
        pictures.append(charts.lines(("heat", "Temperature", text), ("minutes", "°C"), warm))
    return html.part("course", pictures=pictures)


def _planned_speed(story: RunRecord) -> float | None:
    """Tokens a second that the plan expects of distillation, if it has that phase."""
    begun = story.begun
    seconds = {plan["phase"]: plan["seconds"] for plan in begun.get("planned", [])}
    if not seconds.get("distil"):
        return None
    return begun["step_tokens"] * begun["iters"] / seconds["distil"]


def cost(story: RunRecord) -> str:
    """Time and memory of every phase, as it was and as planned."""
    took = story.took()
    peaks: dict[str, list[float]] = {}
    for record in story.phases:
        peaks.setdefault(record["phase"], []).append(record["peak_bytes"])
    if "distil" in took:
        peaks["distil"] += [nbytes for _, nbytes in points_of(story.steps, "number", "peak_bytes")]
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


def pruning(story: RunRecord) -> str:
    """Which blocks were removed, and how much of the importance of heads and neurons was kept."""
    report = story.keep.get("report") or {}
    layers = set(story.keep.get("layers", []))
    importance = report.get("block_importance") or {}
    removed = ", ".join(number for number in importance if int(number) not in layers)
    shares = {}
    for axis in ("ffn", "heads"):
        of_blocks = []
        for name, row in (report.get("profile") or {}).items():
            number, _, ending = name.partition("/")
            if ending == axis and int(number) in layers:
                of_blocks.append(row["kept"])
        if of_blocks and min(of_blocks) < 1:
            shares[axis] = f"{min(of_blocks):.0%} to {max(of_blocks):.0%}"
    return html.part("pruning", report=report, removed=removed, shares=shares)


def origins(story: RunRecord) -> str:
    """The command, versions, hashes, settings."""
    words = [str(cli.from_here(Path(sys.executable))), "-m", "mis_mlx", "distill"]
    if story.asked:
        # Some settings are no flags: the file has all that were said.
        words += ["-c", str((story.folder / run_folder.ASKED).absolute())]
    facts = dict(story.origin)
    rates = story.begun.get("rates") or {}
    if "device" in rates:
        facts["machine"] = rates["device"]
    command = ""
    if story.begun:
        command = shlex.join(words)
    return html.part("origins", command=command, facts=facts, config=story.config)


# in the page's order
OF_RUN = (verdict, answers, summary, recovery, course, cost, pruning, origins)


def render(story: RunRecord) -> str:
    """The page."""
    parts = [html.part("heading", text=story.name)]
    parts += [_part(make, story) for make in OF_RUN]
    parts.append(html.part("missing", lines=story.missing))
    return html.page(f"{story.name}: mis_mlx", "".join(parts))


def _part(make: Callable[[RunRecord], str], story: RunRecord) -> str:
    """A part of the page, or a sentence where a file holds what this version does not write."""
    from jinja2 import UndefinedError

    try:
        return make(story)
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
    """The command: read, draw, write."""
    if settings.run is None:
        configs = list(Path("runs").glob(f"*/{run_folder.CONFIG}"))
        if not configs:
            raise MisError(
                "There is no run under runs/: name a run folder, or make one with distill"
            )
        folder = max(configs, key=lambda path: path.stat().st_mtime).parent
    else:
        folder = Path(settings.run)
    out = Path(settings.out) if settings.out else folder / "report.html"
    files.need_place("--out", out, "file")
    story = run_reader.read(folder)
    files.DISK.make_folder(out.absolute().parent)
    page = render(story)
    files.DISK.replace_text(out, page)
    cli.say(f"{out}: open it in a browser")
    missing = [f"{story.name}: {text}" for text in story.missing]
    return {"report": str(out), "bytes": len(page.encode()), "missing": missing}


if __name__ == "__main__":
    cli.main(Settings, run)
