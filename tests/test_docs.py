"""The pages for people against the code: links lead somewhere, commands parse, flags exist.

Every problem is one line: `page:line: what is wrong: what to do`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import starmap
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mis_mlx import cli, flag_help, thermal
from mis_mlx.__main__ import commands
from mis_mlx.types import MisError

ROOT = Path(__file__).parents[1]
COMMANDS = commands()
TOP = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
PAGES = [
    *(ROOT / name for name in TOP if (ROOT / name).exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SCRIPT = ("test", "lint", "help", "--help", "-h")  # what scripts/mis does itself
# of every command: cli.main
EVERYWHERE = {"--help", "--help-all", "--json", "--version", "--accept-gemma-terms"}
# Flags that a page may write by themselves, `--like-this`, and that are other programs'.
OTHERS = {
    "--all",  # scripts/mis test
    "--check",  # scripts/render.py
    # mlx.launch and its like
    "--hostfile", "--hosts", "--over", "--backend", "--auto-setup", "--output-hostfile",
}  # fmt: skip
# Settings of distill without which its student is uncut, and no weight takes --iters steps.
LEARNING = {"scenario", "layers", "ffn", "heads", "hidden", "experts", "bytes", "train", "student"}
PLACEHOLDER = re.compile(r"\$\w+|\$\{\w+\}|<[^<>]+>")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# A file of the checkout that a text names; `NAME at COMMIT` is gone, and that commit has it.
NAMED = re.compile(
    r"(?<![\w:/.-])(?:benchmarks|scripts|mis_mlx|tests)/[\w/.-]*\w\.(?:py|json|svg|png|md)\b"
    r"(?! at [0-9a-f]{8})"
)
END = re.compile(r"\|\|?|&&?|;|\d?>>?|<")  # what ends a command, where it is a word


class Found(NamedTuple):
    """A piece of a page. kind: link, code (a span), heading, command (a line of a block), html."""

    kind: str
    line: int
    text: str


def pieces(page: Path) -> Iterator[Found]:
    """All that is looked at, in order."""
    before = ""
    text = page.read_text("utf-8")
    source = text.splitlines()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            for at, command in logical(token.content):
                yield Found("command", line + 1 + at, command)
        elif token.type == "html_block":
            yield Found("html", line, token.content)
        elif token.type == "inline":
            yield from spans(token.children or [], line, source)
            if before == "heading_open":
                words = [
                    x.content for x in token.children or () if x.type in ("text", "code_inline")
                ]
                yield Found("heading", line, "".join(words))
        before = token.type


def spans(children: list[Token], line: int, source: list[str]) -> Iterator[Found]:
    """Links, code and HTML of a paragraph, a heading or a cell that begins at `line` of the
    source.
    """
    for child in children:
        if child.type in ("softbreak", "hardbreak"):
            line += 1
        elif child.type in ("link_open", "image"):
            yield Found("link", line, str(child.attrs.get("href") or child.attrs.get("src") or ""))
        elif child.type in ("code_inline", "html_inline"):
            yield Found(child.type.removesuffix("_inline"), line, child.content)
            whole = child.content in "".join(source[line - 1 : line])
            line += child.type == "code_inline" and not whole  # it goes on in the next line


def logical(block: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, from 0; text) of the lines of a block, those that end in a
    backslash joined.
    """
    whole = ""
    first = 0
    for number, line in enumerate(block.splitlines()):
        first = first if whole else number
        whole += line.removeprefix("$ ") if not whole else line
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        yield first, whole
        whole = ""
    if whole:
        yield first, whole


# Links


@cache
def anchors(page: Path) -> frozenset[str]:
    """What GitHub lets one link to: headings in small letters, without punctuation, spaces as
    hyphens; ids in HTML.
    """
    names = set[str]()
    counts = dict[str, int]()
    for piece in pieces(page):
        if piece.kind == "html":
            names |= set(re.findall(r"""\b(?:id|name)=["']([^"']+)""", piece.text))
        if piece.kind == "heading":
            name = re.sub(r"[^\w\- ]", "", piece.text.strip().lower()).replace(" ", "-")
            count = counts[name] = counts.get(name, -1) + 1
            names.add(f"{name}-{count}" if count else name)
    return frozenset(names)


def bad_link(page: Path, target: str, root: Path = ROOT) -> str:
    """What is wrong with a link, or nothing."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return ""
    name, _, anchor = unquote(target).partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.is_relative_to(root.resolve()) or not path.exists():
        return f"the link {target} leads to no file: mend it, or write that page"
    if not anchor or path.is_dir():
        return ""
    if path.suffix == ".md" and anchor not in anchors(path):
        near = ", ".join(sorted(anchors(path)))
        return f"the link {target} leads to no heading of {path.name}: take one of {near}"
    lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
    if lines and int(lines[2] or lines[1]) > len(path.read_text("utf-8").splitlines()):
        return f"the link {target} leads behind the end of {path.name}: mend the number"
    return ""


def link_problems(page: Path, root: Path = ROOT) -> list[str]:
    """Of all links and pictures of a page."""
    result = []
    for piece in pieces(page):
        targets = [piece.text] if piece.kind == "link" else []
        if piece.kind == "html":
            targets = re.findall(r"""\b(?:src|href)=["']([^"']+)""", piece.text)
        faults = [bad_link(page, target, root) for target in targets]
        result += [f"{where(page, piece, root)}: {fault}" for fault in faults if fault]
    return result


def where(page: Path, piece: Found, root: Path = ROOT) -> str:
    """`docs/page.md:12`."""
    return f"{page.relative_to(root)}:{piece.line}"


# Commands and flags


@cache
def settings(name: str) -> Any:
    """What the command's line is parsed into; the name may be a program's of the checkout. None for
    one without.
    """
    if name == "thermal":
        return thermal.Record | thermal.Doctor
    module = (
        program(ROOT / name) if name.endswith(".py") else importlib.import_module(f"mis_mlx.{name}")
    )
    return getattr(module, "Settings", None)


def program(path: Path) -> ModuleType:
    """A program imported as it is run."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def flags_of(kind: Any) -> set[str]:
    """--flags of a dataclass of settings, or of the parts of a union, with their other spellings; a
    switch that is on by default has only --no-NAME.
    """
    result = set[str]()
    for part in [kind] if is_dataclass(kind) else kind.__args__:
        hints = get_type_hints(part, include_extras=True)
        quiet = flag_help.quiet(part)
        for field in [f for f in fields(part) if f.name not in quiet]:
            result.add(f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}")
            for more in getattr(hints[field.name], "__metadata__", ()):
                result |= set(getattr(more, "aliases", None) or ())
    return result


@cache
def known_flags(name: str = "") -> frozenset[str]:
    """Of one command; without a name of all of them, of the checkout's programs, and of others in
    the list above.
    """
    if name:
        return frozenset(flags_of(settings(name)) | EVERYWHERE)
    result = EVERYWHERE | OTHERS
    for each in COMMANDS:
        result |= known_flags(each)
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        text = path.read_text("utf-8")
        result |= set(re.findall(r'"(--[a-z][\w-]*)"', text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                named = [
                    x.target.id
                    for x in node.body
                    if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
                ]
                result |= {f"--{field.replace('_', '-')}" for field in named}
    return frozenset(result)


def parts(line: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell. ValueError for a quote that does not end."""
    words = list[str]()
    for word in shlex.split(line, comments=True):
        cut = word.removesuffix(";")
        if END.fullmatch(word):
            yield words
            words = []
            continue
        words.append(cut)
        if cut != word:
            yield words
            words = []
    yield words


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """(command or program, its arguments) of a call of ours: also behind `mlx.launch` and the
    like.
    """
    for at, word in enumerate(words):
        dotted = re.fullmatch(r"(?:.*/)?mis_mlx\.(\w+)", word)
        if dotted:
            return dotted[1], words[at + 1 :]
        plain = word.rpartition("/")[2] == "mis_mlx" and (at == 0 or words[at - 1] == "-m")
        if word.endswith("scripts/mis") or plain:
            return words[at + 1] if at + 1 < len(words) else "help", words[at + 2 :]
    return None


def bad_call(name: str, args: list[str]) -> str:
    """Why a command does not take these arguments, or nothing. -c FILE is not opened."""
    # the name is a placeholder, such as COMMAND
    if name in SCRIPT or not re.fullmatch(r"[a-z][\w/.]*", name):
        return ""
    if name.endswith(".py") and not (ROOT / name).is_file():
        return f"there is no program {name}"
    if not name.endswith(".py") and name not in COMMANDS:
        return f"there is no command {name}, there are {', '.join(COMMANDS)}"
    kind = settings(name)
    args = [a for a in args if a not in ("--accept-gemma-terms", "--version", "[flags]")]
    for flag in {"-c", "--config"} & set(args):
        del args[args.index(flag) : args.index(flag) + 2]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            if kind is not None:
                asked = cli.parse(kind, [PLACEHOLDER.sub("1", a) for a in args])
                if name == "distill" and "iters" in asked.given and not LEARNING & {*asked.given}:
                    return "distill leaves --iters out: no block is cut, so no weight learns"
    except MisError as error:
        return f"{name} refuses it ({error})"
    except SystemExit as error:
        if error.code:
            return (
                f"{name} refuses it "
                f"({' '.join(re.sub(r'[╭╮╰╯─│]+|-{5,}', ' ', said.getvalue()).split())[:160]})"
            )
    return ""


def command_problems(page: Path, root: Path = ROOT) -> list[str]:
    """Lines of blocks that the commands refuse, and flags in `spans` of prose that nothing
    takes.
    """
    result = []
    for piece in pieces(page):
        bad = list[str]()
        if piece.kind == "command" and re.search(r"scripts/mis\b|\bmis_mlx\b", piece.text):
            try:
                calls = [call for call in map(ours, parts(piece.text)) if call]
                bad = [why for why in starmap(bad_call, calls) if why]
            except ValueError as error:
                bad = [f"this is no line of shell ({error})"]
            bad = [f"{why}: mend the line, or see --help-all" for why in bad]
        elif piece.kind == "code":
            bad = bad_span(piece.text)
        result += [f"{where(page, piece, root)}: {why}" for why in bad]
    return result


def bad_span(text: str) -> list[str]:
    """What is wrong with the flags in `text`: of a command that it begins with, else of
    nobody's.
    """
    words = text.split()
    call = ours(words) or ((words[0], words[1:]) if words and words[0] in COMMANDS else None)
    name = call[0] if call else ""
    if name.endswith(".py") or name in SCRIPT or not (call or text.startswith("-")):
        return []  # another program's, or a place to look at in the code
    known = known_flags(name if name in COMMANDS else "")
    whose = f"{name} has no {{}}" if name in COMMANDS else "no command has {}"
    how = (
        "take one of --help-all's; of another program: write it behind that one's name, or into "
        "OTHERS of this test"
    )
    return [f"{whose.format(flag)}: {how}" for flag in FLAG.findall(text) if flag not in known]


# Tests


def shown(page: Path) -> str:
    """For the list of tests."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    """Files of the checkout, and headings of its pages."""
    assert not (bad := link_problems(page)), "\n".join(bad)


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_parse(page: Path) -> None:
    """By the settings of the command that they call; a flag in prose is a command's."""
    assert not (bad := command_problems(page)), "\n".join(bad)


@pytest.mark.parametrize("folder", ["docs", "mis_mlx", "benchmarks"])
def test_what_a_text_names_exists(folder: str) -> None:
    """Programs, results and modules, in pages, docstrings and comments: behind a figure stands what
    measured it.
    """
    texts = PAGES if folder == "docs" else [*(ROOT / folder).rglob("*.py")]
    gone = []
    for path in texts:
        for name in NAMED.findall(path.read_text("utf-8")):
            placeholder = re.search(r"[A-Z]{4}", name)
            if not (placeholder or (ROOT / name).exists()):
                gone.append(f"{path.relative_to(ROOT)} names {name}")
    assert not gone, "\n".join(gone)


GOOD_PAGE = """# A page
See [it](#a-page), [below](#what-it-costs-1), ![a picture](b.svg), [the code](code.py#L2) and \
[the web](https://x.y/z).

## What it *costs*: `1`

`--iters 3`, `--hostfile`, `distill --help-all`, `mlx_lm.convert --whatever`, \
`quantize --q-method round`, `--no-fuse`.

```sh
scripts/mis distill --q-iters 3 --out $RUN   # `--nothing`
MIS_MLX_GOVERNOR=cool scripts/mis sft --data <folder> \\
    --iters <n> > log && python -m mis_mlx.thermal record FILE --seconds 3
.venv/bin/mlx.launch --hostfile h.json .venv/bin/python -m mis_mlx.evaluate --students a b
scripts/mis benchmarks/repair.py; scripts/mis test --all; scripts/mis COMMAND --help
scripts/mis distill -c run.yaml --accept-gemma-terms --help
mlx_lm.generate --no-flag-of-ours
```
"""
BAD_PAGE = """# A page
See [it](#another-page), [this](c.md)
and ![that](code.py#L9). `--no-flag` and `distill
--languages pl` and `scripts/mis prune --iters 3`.

```sh
scripts/mis distill --languages pl
scripts/mis disill
scripts/mis prune \\
    --ffn many
scripts/mis benchmarks/none.py
mis_mlx.sft --iters -3
scripts/mis distill --out 'a
```

<img src="no.png">
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with two files that pages may link to."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "b.svg").write_text("<svg/>")
    (tmp_path / "docs" / "code.py").write_text("a = 1\nb = 2\n")
    return tmp_path


def test_a_good_page_is_let_through(root: Path) -> None:
    """With placeholders, variables, operators of the shell, and other programs' flags."""
    page = root / "docs" / "good.md"
    page.write_text(GOOD_PAGE)
    assert link_problems(page, root) == command_problems(page, root) == []


def test_a_bad_page_is_found_out(root: Path) -> None:
    """Every fault, with its line."""
    page = root / "docs" / "bad.md"
    page.write_text(BAD_PAGE)

    def lines(problems: list[str]) -> list[int]:
        assert all(p.startswith("docs/bad.md:") for p in problems)
        return [int(p.split(":")[1]) for p in problems]

    links = link_problems(page, root)
    calls = command_problems(page, root)
    assert lines(links) == [2, 2, 3, 16], links
    assert lines(calls) == [3, 3, 4, 7, 8, 9, 11, 12, 13], calls
    assert "no heading of bad.md: take one of a-page" in links[0]
    assert "no command has --no-flag" in calls[0]
    assert "distill has no --languages" in calls[1]
    assert "languages: ..." in calls[3]
    assert "there is no command disill" in calls[4]
    assert "--ffn" in calls[5]
