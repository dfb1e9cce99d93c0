"""--help and --help-all of a command: its settings as flags, in groups, with their docstrings."""

import inspect
import json
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from mis_mlx.types import FILE_ONLY, Also, Off, Shown

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


def shown(name: str, file_only: Collection[str]) -> str:
    """What a setting is called in messages: as a flag, where it is one."""
    if name in file_only:
        return name
    return f"--{name.replace('_', '-')}"


def other_names(kind: Any) -> dict[str, str]:
    """{other name of a setting (`types.Also`): its name}."""
    hints = get_type_hints(kind, include_extras=True)
    names = {}
    for name, hint in hints.items():
        for part in getattr(hint, "__metadata__", ()):
            if isinstance(part, Also):
                names.update(dict.fromkeys(part.names, name))
    return names


def current_names(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under their settings' names, where some stand under others."""
    names = other_names(kind)
    return {names.get(name, name): value for name, value in values.items()}


def docs(kind: type) -> dict[str, str]:
    """{field: the string under it in the source}, of the class and its bases."""
    texts = {}
    for base in reversed(kind.__mro__[:-1]):
        for param in parse_from_object(base).params:
            texts[param.arg_name] = " ".join((param.description or "").split())
    return texts


def metavar(hint: Any) -> str:
    """The placeholder of a flag's value: 'INT', '{4,0}'; empty for a switch."""
    kind = get_origin(hint)
    inner = get_args(hint)
    if kind is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    for part in inner:
        if isinstance(part, Shown):
            return metavar(Literal[part.words])
    if kind in (Annotated, Union, UnionType):
        return metavar(next(part for part in inner if part is not NoneType))
    if kind is tuple:
        return f"[{metavar(inner[0])} ...]"
    return WORDS.get(hint, "")


def grouped(kind: Any) -> Iterator[tuple[str, list[str]]]:
    """(title, names) of the groups that have flags."""
    file_only = quiet(kind)
    rest = [f.name for f in fields(kind) if f.name not in file_only]
    for title, names in GROUPS["flags"].items():
        members = [name for name in names.split() if name in rest]
        if members:
            yield title, members
            rest = [name for name in rest if name not in members]
    if rest:
        yield "this command only", rest


def text(kind: Any, prog: str, every: bool) -> str:
    """The help. every: with the flags beside those that the class lists as `BASIC`, if it does."""
    hints = get_type_hints(kind, include_extras=True)
    about = docs(kind)
    width = shutil.get_terminal_size().columns
    rare = rare_of(kind)
    if every:
        rare = frozenset()
    defaults = {f.name: f.default for f in fields(kind)}
    summary = inspect.getdoc(kind) or ""
    by_place = [name.upper() for name in defaults if _is_positional(hints[name])]
    usage = " ".join(["usage:", prog, *by_place, "[flags]"])
    lines = [usage, "", *textwrap.wrap(summary, width)]
    for title, names in grouped(kind):
        shown = [name for name in names if name not in rare]
        if shown:
            lines += ["", title]
        for name in shown:
            default = defaults[name]
            switch = "no-" if default is True else ""
            flag = f"  --{switch}{name.replace('_', '-')} {metavar(hints[name])}"
            if _is_positional(hints[name]):
                flag = f"  {name.upper()}"
            description = _described(about.get(name, ""), default, hints[name])
            lines += _entry(flag.rstrip(), description, width)
    lines += ["", "All commands: --json, -v for detailed plans, --version, --accept-gemma-terms"]
    if rare:
        return "\n".join([*lines, f"--help-all shows {len(rare)} advanced flags, too"])
    file_only = sorted(quiet(kind) - internal(kind))
    if file_only:
        only = f"Only in a YAML file (--config): {', '.join(file_only)}"
        lines += ["", *textwrap.wrap(only, width)]
    return "\n".join(lines)


def rare_of(kind: Any) -> frozenset[str]:
    """The flags that --help leaves to --help-all."""
    basic = getattr(kind, "BASIC", None)
    if basic is None:
        return frozenset()
    return frozenset(f.name for f in fields(kind)) - basic - quiet(kind)


def internal(kind: Any) -> frozenset[str]:
    """The settings that a run writes into its own file, and nobody gives."""
    return getattr(kind, "INTERNAL", frozenset[str]())


def _is_positional(hint: Any) -> bool:
    """Whether a setting is given by its place."""
    # tyro's marker, which only cli.py and commands import
    return any(repr(part) == "Positional" for part in getattr(hint, "__metadata__", ()))


def _described(about: str, default: Any, hint: Any) -> str:
    """A flag's docstring, with its default unless the docstring says it."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Off):
            return part.words
    if default is MISSING:
        return about if "default:" in about else f"{about} (required)"
    unset = default is None or default is False or default == ()
    if unset or "default:" in about.lower():
        return about
    words = default if isinstance(default, tuple) else (default,)
    return f"{about} (default: {' '.join(map(str, words))})"


def _entry(flag: str, about: str, width: int) -> list[str]:
    """The lines of one flag: its description next to it or, if it is long, below it."""
    margin = " " * INDENT
    lead = flag.ljust(INDENT)
    if len(flag) >= INDENT - 1:
        lead = f"{flag}\n{margin}"
    room = max(width, NARROW) - INDENT
    body = textwrap.wrap(about.strip(), room, break_on_hyphens=False) or [""]
    first = (lead + body[0]).rstrip()
    return [first, *(margin + line for line in body[1:])]
