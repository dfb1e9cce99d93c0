"""Write the reference in docs/python-api.md, below its marker, and a page for each function in
docs/python-api/, from the docstrings.

    scripts/mis scripts/python_api.py             # after a flag or a docstring changed
    scripts/mis scripts/python_api.py --check     # exit 1 where a page is not what the code says

The text above the marker is left alone. A page of docs/python-api/ that is no function's goes.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import mis_mlx
from mis_mlx import Function, Result, cli, flag_help
from mis_mlx.__main__ import commands
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Checkpoint, TensorAt

DOCS = Path(__file__).resolve().parents[1] / "docs"
OVERVIEW = "python-api.md"
FOLDER = "python-api"  # of the functions' pages
MARKER = "<!-- reference -->\n"
WIDTH = 120
NAMES = {"INT": "int", "FLOAT": "float", "TEXT": "str", "FILE": "str"}


@dataclass(frozen=True)
class Settings:
    """What to do."""

    check: bool = False
    """write nothing; exit 1 when the page is not what the code says"""


def kind(hint: Any) -> str:
    """A type for people: 'int', 'str, ...', 'affine, mxfp4 or nvfp4'."""
    shown = flag_help.metavar(hint)
    if shown.startswith("{"):
        *first, last = shown.strip("{}").split(",")
        return f"{', '.join(first)} or {last}" if first else last
    if shown.startswith("["):
        return f"list of {NAMES[shown.strip('[] .')]}"
    return NAMES.get(shown, "bool")


def keywords(settings: type) -> str:
    """A table with a row for each keyword of a function, in the order of --help-all."""
    hints = get_type_hints(settings, include_extras=True)
    about = flag_help.docs(settings)
    defaults = {}
    for field in fields(settings):
        defaults[field.name] = default_of(field)
    names = list[str]()
    for _, group in flag_help.grouped(settings):
        names += group
    names += sorted(flag_help.quiet(settings) - flag_help.internal(settings))
    rows = []
    for name in names:
        if name == "config":  # a file of flags, which only a command reads
            continue
        meaning = about.get(name, "").replace("|", "\\|")
        rows.append([f"`{name}`", kind(hints[name]), defaults[name], meaning])
    return markdown_table(["keyword", "type", "default", "meaning"], rows, words=4)


def default_of(field: Field[Any]) -> str:
    """What a keyword is when nobody gives it: Python's spelling, or that somebody has to."""
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "needed" if field.default_factory is MISSING else ""


def sentences(thing: Any) -> str:
    """A docstring on one line."""
    return " ".join((inspect.getdoc(thing) or "").split())


def reference() -> str:
    """Everything below the marker of the overview."""
    listed = commands()
    parts = ["## Functions\n"]
    rows = []
    for name in mis_mlx.FUNCTIONS:
        rows.append([f"[`mis_mlx.{name}(...)`]({FOLDER}/{name}.md)", listed[name]])
    parts += [markdown_table(["function", "what it does"], rows, words=2) + "\n"]
    titles = {
        "Calling a function": Function.__call__,
        "`mis_mlx.Result`": Result,
        "`mis_mlx.open(folder)`": mis_mlx.open,
        "`mis_mlx.MisError`": mis_mlx.MisError,
    }
    members = {"folder": Result.folder}
    for part in (Checkpoint, TensorAt):
        members[part.__name__] = part
    below = {Result: ["folder"], mis_mlx.open: ["Checkpoint", "TensorAt"]}
    for title, thing in titles.items():
        parts += [f"## {title}\n", f"{sentences(thing)}\n"]
        parts += [f"`{name}`: {sentences(members[name])}\n" for name in below.get(thing, ())]
    return "\n".join(parts)


def function_page(name: str) -> str:
    """The page of one function."""
    settings = getattr(mis_mlx, name).Settings
    calling = f"[Calling a function](../{OVERVIEW}#calling-a-function)"
    parts = [
        f"# `mis_mlx.{name}(...)`\n",
        f"{commands()[name]} {sentences(settings)}\n",
        f"`mis_mlx {name}` does the same in a terminal. {calling} says what is returned and\n"
        "raised.\n",
        keywords(settings) + "\n",
    ]
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """{path below docs/: what has to stand there}."""
    head, _, _ = (DOCS / OVERVIEW).read_text(encoding="utf-8").partition(MARKER)
    result = {OVERVIEW: f"{head}{MARKER}\n{reference()}"}
    for name in mis_mlx.FUNCTIONS:
        result[f"{FOLDER}/{name}.md"] = function_page(name)
    return result


def main(s: Settings) -> None:
    """Write the pages, or say which are old."""
    wanted = pages()
    there = [OVERVIEW, *(f"{FOLDER}/{path.name}" for path in (DOCS / FOLDER).glob("*.md"))]
    old = [name for name in there if name not in wanted]
    for name, text in wanted.items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(name)
    if s.check and old:
        names = ", ".join(sorted(old))
        sys.exit(f"not what the code says: {names}: scripts/mis scripts/python_api.py writes them")
    for name in old:
        path = DOCS / name
        if name in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        elif not s.check:
            path.unlink()


if __name__ == "__main__":
    main(cli.parse(Settings))
