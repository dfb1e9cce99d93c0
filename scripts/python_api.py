"""Write the reference in docs/python-api.md, below its marker, from the docstrings of the
functions.

    scripts/mis scripts/python_api.py             # after a flag or a docstring changed
    scripts/mis scripts/python_api.py --check     # exit 1 where the page is not what the code says

The text above the marker is left alone.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import mis_mlx
from mis_mlx import Function, Result, cli, flag_help
from mis_mlx.__main__ import commands
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Checkpoint, TensorAt

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python-api.md"
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


def keywords(settings: type, known: dict[str, Any]) -> str:
    """A row for each keyword of a function, in the order of --help; those that a function before
    has with the same meaning, of `known`, by name alone.
    """
    hints = get_type_hints(settings, include_extras=True)
    about = flag_help.docs(settings)
    defaults = {f.name: (f.default_factory, f.default) for f in fields(settings)}
    names = [name for _, group in flag_help.grouped(settings) for name in group] + sorted(
        flag_help.quiet(settings)
    )
    rows = []
    same = []
    for name in names:
        if name == "config":  # a file of flags, which only a command reads
            continue
        meant = str(hints[name]), *defaults[name], about.get(name)
        if known.get(name) == meant:
            same.append(f"`{name}`")
            continue
        known[name] = meant
        default = defaults[name][1]
        shown = (
            "needed"
            if default is defaults[name][0] is MISSING
            else ""
            if default is MISSING
            else f"`{default!r}`"
        )
        rows.append(
            [f"`{name}`", kind(hints[name]), shown, about.get(name, "").replace("|", "\\|")]
        )
    text = markdown_table(["keyword", "type", "default", "meaning"], rows, words=4)
    return text + (f"\n\nAnd as above: {', '.join(same)}." if same else "")


def described(name: str, thing: Any, title: str) -> str:
    """A heading and a docstring, filled to the width of the page."""
    return f"## {title}\n\n{' '.join((inspect.getdoc(thing) or '').split())}\n"


def reference() -> str:
    """Everything below the marker."""
    parts = [described("call", Function.__call__, "Calling a function")]
    parts += [described("Result", Result, "`mis_mlx.Result`")]
    parts += [f"`folder`: {' '.join((inspect.getdoc(Result.folder) or '').split())}\n"]
    parts += [described("open", mis_mlx.open, "`mis_mlx.open(folder)`")]
    parts += [
        f"`{one.__name__}`: {' '.join((inspect.getdoc(one) or '').split())}\n"
        for one in (Checkpoint, TensorAt)
    ]
    parts += [described("MisError", mis_mlx.MisError, "`mis_mlx.MisError`")]
    listed = commands()
    known = dict[str, Any]()
    for name in mis_mlx.FUNCTIONS:
        settings = getattr(mis_mlx, name).Settings
        parts += [f"## `mis_mlx.{name}(...)`\n", f"{listed[name]} {inspect.getdoc(settings)}\n"]
        parts += [keywords(settings, known) + "\n"]
    return "\n".join(parts)


def main(s: Settings) -> None:
    """Write the page, or say that it is old."""
    before = PAGE.read_text(encoding="utf-8")
    head, _, old = before.partition(MARKER)
    if (new := reference()) == old.strip("\n") + "\n":
        return
    if s.check:
        sys.exit(
            f"{PAGE.name} is not what the code says: scripts/mis scripts/python_api.py writes it"
        )
    PAGE.write_text(f"{head}{MARKER}\n{new}", encoding="utf-8")


if __name__ == "__main__":
    main(cli.parse(Settings))
