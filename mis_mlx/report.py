"""Report: one self-contained HTML page of a run, or of several side by side; --watch renders it while a run goes on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from mis_mlx import cli
from mis_mlx.reporting import figures, html, run_reader, sections
from mis_mlx.storage import files, run_folder
from mis_mlx.types import Count, MisError


@dataclass(frozen=True)
class Settings:
    """Reads a run folder, writes RUN/report.html: open it in any browser, or mail it."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """run folders; default: the newest one under runs/"""
    out: str | None = None
    """file to write; default: report.html in the first run folder"""
    watch: bool = False
    """write it anew while the run goes on, and let the browser open it anew; until the run ends, or Ctrl-C"""
    every_s: Count = 20
    """seconds between two looks"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def render(stories: Sequence[run_reader.RunRecord], every_s: int | None = None) -> str:
    """The page. every_s: how often a browser is to open it anew."""
    names = [s.name for s in stories]
    names = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]  # no two alike
    parts = [html.part("heading", text=" and ".join(names))]
    if len(stories) > 1:
        parts.append(_part("comparison", partial(sections.comparison, stories, names)))
    for number, (name, story) in enumerate(zip(names, stories, strict=True)):
        if len(stories) > 1:
            parts.append(html.part("heading", text=name))
        parts += [_part(make.__name__, partial(make, story, f"r{number}-")) for make in sections.OF_RUN]
        parts.append(html.part("missing", lines=story.missing))
    return html.page(f"{', '.join(names)}: mis_mlx", "".join(parts), every_s)


def _part(name: str, make: Callable[[], str]) -> str:
    """A part of the page, or a sentence where a file holds what this version does not write."""
    from jinja2 import UndefinedError

    try:
        return make()
    except (UndefinedError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        text = f"The part “{name}” is missing: a file is of another version ({type(error).__name__}: {error})."
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
            raise MisError("There is no run under runs/: name a run folder, or make one with distill")
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
        cli.say(f"{out}: {', '.join(f'{o.steps.lines} steps of {o.name}' for o in stories)}; Ctrl-C ends the watch")
        time.sleep(s.every_s)
    missing = [f"{one.name}: {text}" for one in stories for text in one.missing]
    return {"report": str(out), "bytes": len(page.encode()), "runs": len(stories), "missing": missing}


if __name__ == "__main__":
    cli.main(Settings, run)
