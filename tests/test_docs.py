"""The pages for people against the code: links lead somewhere, commands parse, flags exist."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mis_mlx import cli, flag_help
from mis_mlx.__main__ import commands
from mis_mlx.types import MisError

ROOT = Path(__file__).parents[1]
COMMANDS = commands()
TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPT = ("test", "lint", "help", "--help", "-h")  # what scripts/mis does itself
# of every command: cli.main
EVERYWHERE = {"--help", "--help-all", "--json", "--version", "--accept-gemma-terms"}
# Flags that a page may write by themselves, `--like-this`, and that are other programs'.
OTHERS = {
    "--all",  # scripts/mis test
    # mlx.launch and its like
    "--hostfile", "--hosts", "--over", "--backend", "--auto-setup", "--output-hostfile",
}  # fmt: skip
# Settings of distill without which its student is uncut, and no weight takes --iters steps.
LEARNING = {"scenario", "layers", "ffn", "heads", "hidden", "experts", "bytes", "train", "student"}
PLACEHOLDER = re.compile(r"\$\w+|\$\{\w+\}|<[^<>]+>")
# A file of the checkout that a text names; `NAME at COMMIT` is gone, and that commit has it.
NAMED = re.compile(
    r"(?<![\w:/.-])(?:benchmarks|scripts|mis_mlx|tests)/[\w/.-]*\w\.(?:py|json|svg|png|md)\b"
    r"(?! at [0-9a-f]{8})"
)
each = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def program(path: Path) -> ModuleType:
    """A program of the checkout imported as it is run."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


@cache
def tokens(page: Path) -> list[Token]:
    """Markdown's, those inside of paragraphs too."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8")):
        found += [token, *(token.children or ())]
    return found


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub lets one link to: headings in small letters, spaces as hyphens; ids in HTML."""
    names = set[str]()
    before = None
    for token in tokens(page):
        if token.type == "html_block":
            names |= set(re.findall(r"""\b(?:id|name)=["']([^"']+)""", token.content))
        if before == "heading_open":
            words = [x.content for x in token.children or () if x.type in ("text", "code_inline")]
            name = re.sub(r"[^\w\- ]", "", "".join(words).strip().lower()).replace(" ", "-")
            names.add(f"{name}-1" if name in names else name)
        before = token.type
    return names


@each
def test_links_lead_somewhere(page: Path) -> None:
    """Files of the checkout, lines that they have, and headings of its pages."""
    targets = list[str]()
    for token in tokens(page):
        if token.type in ("link_open", "image"):
            targets.append(str(token.attrs.get("href") or token.attrs.get("src")))
        elif token.type == "html_block":
            targets += re.findall(r"""\b(?:src|href)=["']([^"']+)""", token.content)
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT) and path.exists(), target
        if path.suffix == ".md" and anchor:
            assert anchor in anchors(path), target
        elif lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            assert int(lines[2] or lines[1]) <= len(path.read_text("utf-8").splitlines()), target


@cache
def settings(name: str) -> Any:
    """What the line of a command or of a program is parsed into, or None."""
    path = ROOT / name
    module = program(path) if path.is_file() else importlib.import_module(f"mis_mlx.{name}")
    return getattr(module, "Settings", None)


@cache
def flags_of(name: str) -> set[str]:
    """--flags of a command; a switch that is on by default has only --no-NAME."""
    result = set(EVERYWHERE)
    kind = settings(name)
    hints = get_type_hints(kind, include_extras=True)
    for field in [f for f in fields(kind) if f.name not in flag_help.quiet(kind)]:
        result.add(f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}")
        for more in getattr(hints[field.name], "__metadata__", ()):
            result |= set(getattr(more, "aliases", None) or ())
    return result


def calls(line: str) -> Iterator[tuple[str, list[str]]]:
    """(command or program, its arguments) of each call of ours in a line of shell."""
    words = [[]]
    for word in shlex.split(line.removeprefix("$ "), comments=True):
        if re.fullmatch(r"\|\|?|&&?|;|\d?>>?|<", word):
            words.append([])
        else:
            words[-1].append(word.removesuffix(";"))
            words += [[]] * word.endswith(";")
    for called in words:
        for at, word in enumerate(called):
            plain = word.rpartition("/")[2] == "mis_mlx" and called[at - 1 : at] in ([], ["-m"])
            if dotted := re.fullmatch(r"(?:.*/)?mis_mlx\.(\w+)", word):
                yield dotted[1], called[at + 1 :]
                break
            if word.endswith("scripts/mis") or plain:
                yield (called[at + 1 :] or ["help"])[0], called[at + 2 :]
                break


@each
def test_commands_parse(page: Path) -> None:
    """By the settings of the command that they call; -c FILE is not opened."""
    blocks = [token.content for token in tokens(page) if token.type == "fence"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in [line for line in lines if re.search(r"scripts/mis\b|\bmis_mlx\b", line)]:
        for name, words in calls(line):
            if name in SCRIPT or not re.fullmatch(r"[a-z][\w/.]*", name):  # such as COMMAND
                continue
            assert name in COMMANDS or (ROOT / name).is_file(), line
            kind = settings(name)
            args = [a for a in words if a not in ("--accept-gemma-terms", "--version", "[flags]")]
            for flag in {"-c", "--config"} & set(args):
                del args[args.index(flag) : args.index(flag) + 2]
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                    asked = kind and cli.parse(kind, [PLACEHOLDER.sub("1", a) for a in args])
            except (MisError, SystemExit) as error:
                assert isinstance(error, SystemExit) and not error.code, (line, said.getvalue())
                continue
            learns = name != "distill" or LEARNING & set(asked.given)
            assert learns or "iters" not in asked.given, line


@cache
def flags_of_programs() -> set[str]:
    """Those of benchmarks/ and scripts/: the fields of a class, and flags in quotes."""
    programs = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in programs)
    settings = re.findall(r"(?m)^    (\w+): ", code)
    named = {f"--{field.replace('_', '-')}" for field in settings}
    return named | set(re.findall(r'"(--[a-z][\w-]*)"', code))


@each
def test_flags_in_prose_exist(page: Path) -> None:
    """`--flag` alone is one of any command or program, `COMMAND --flag` one of that command."""
    anybody = flags_of_programs().union(OTHERS, *(flags_of(name) for name in COMMANDS))
    for text in [token.content for token in tokens(page) if token.type == "code_inline"]:
        words = text.split()
        call = next(calls(text), None) if "mis" in text and "'" not in text else None
        name = call[0] if call else (words or [""])[0]
        if not (name in COMMANDS or text.startswith("-")):
            continue
        known = flags_of(name) if name in COMMANDS else anybody
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            assert flag in known, text


@pytest.mark.parametrize("folder", ["docs", "mis_mlx", "benchmarks"])
def test_what_a_text_names_exists(folder: str) -> None:
    """Programs, results and modules, in pages, docstrings and comments."""
    gone = []
    for path in PAGES if folder == "docs" else (ROOT / folder).rglob("*.py"):
        for name in NAMED.findall(path.read_text("utf-8")):
            if not (re.search(r"[A-Z]{4}", name) or (ROOT / name).exists()):
                gone.append(f"{path.relative_to(ROOT)} names {name}")
    assert gone == []
