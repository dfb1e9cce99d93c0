"""--help and --help-all of a command: its settings as flags, in groups, with what their docstrings
say.
"""

import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from mis_mlx.types import FILE_ONLY

# Titles and the commands or flags under them, in this order; flags that no group names come last.
GROUPS = json.loads((Path(__file__).parent / "help.json").read_text("utf-8"))
INDENT = 30
NARROW = 60
WORDS = {int: "INT", float: "FLOAT", str: "TEXT"}


def quiet(kind: type) -> frozenset[str]:
    """The settings that are no flags: a YAML file and Python may give them."""
    hints = get_type_hints(kind, include_extras=True)
    listed = getattr(kind, "FILE_ONLY", frozenset[str]())
    return listed | {
        name for name, hint in hints.items() if FILE_ONLY in getattr(hint, "__metadata__", ())
    }


def docs(kind: type) -> dict[str, str]:
    """{field: the string under it in the source}, of the class and those it is made of."""
    texts = dict[str, str]()
    for one in reversed(kind.__mro__[:-1]):
        texts |= {
            p.arg_name: " ".join((p.description or "").split())
            for p in parse_from_object(one).params
        }
    return texts


def metavar(hint: Any) -> str:
    """What stands behind a flag: 'INT', '{4,0}'; nothing behind a switch."""
    kind = get_origin(hint)
    inner = get_args(hint)
    if kind is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if kind in (Annotated, Union, UnionType):
        return metavar(next(i for i in inner if i is not NoneType))
    return f"[{metavar(inner[0])} ...]" if kind is tuple else WORDS.get(hint, "")


def grouped(kind: Any) -> Iterator[tuple[str, list[str]]]:
    """(title, names) of the groups that have flags."""
    file_only = quiet(kind)
    rest = [f.name for f in fields(kind) if f.name not in file_only]
    for title, names in GROUPS["flags"].items():
        if mine := [name for name in names.split() if name in rest]:
            yield title, mine
            rest = [name for name in rest if name not in mine]
    if rest:
        yield "this command's own", rest


def text(kind: Any, prog: str, every: bool) -> str:
    """The help. every: with the flags that the class lists as `RARE`."""
    hints = get_type_hints(kind, include_extras=True)
    about = docs(kind)
    width = shutil.get_terminal_size().columns
    rare = frozenset[str]() if every else getattr(kind, "RARE", frozenset[str]())
    defaults = {f.name: f.default for f in fields(kind)}
    lines = [f"usage: {prog} [flags]", "", *textwrap.wrap(inspect.getdoc(kind) or "", width)]
    for title, names in grouped(kind):
        if shown := [name for name in names if name not in rare]:
            lines += ["", title]
        for name in shown:
            default = defaults[name]
            said = about.get(name, "")
            if default is MISSING:
                said += "" if "default:" in said else " (needed)"
            elif default is True:
                said += " (this turns it off)"
            elif default is not None and default is not False and "default:" not in said.lower():
                said += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
            flag = f"  --{'no-' * (default is True)}{name.replace('_', '-')} {metavar(hints[name])}".rstrip()
            lead = flag.ljust(INDENT) if len(flag) < INDENT - 1 else flag + "\n" + " " * INDENT
            body = textwrap.wrap(said.strip(), max(width, NARROW) - INDENT) or [""]
            lines += [(lead + body[0]).rstrip(), *(" " * INDENT + line for line in body[1:])]
    lines += ["", "Every command: -v for details of plans, --version, --accept-gemma-terms"]
    if rare:
        lines += [f"--help-all shows {len(rare)} more"]
    elif names_ := sorted(quiet(kind)):
        lines += ["", *textwrap.wrap(f"In a YAML file (--config) only: {', '.join(names_)}", width)]
    return "\n".join(lines)
