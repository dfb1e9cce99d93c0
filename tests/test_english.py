"""Words that make a sentence read as translated: none in help, messages, templates and pages.

A rule is a pattern, what to write instead, and a sentence that breaks it.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, get_args

import pytest

from mis_mlx import flag_help, thermal
from mis_mlx.__main__ import commands

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mis_mlx"
TEMPLATES = PACKAGE / "reporting" / "templates"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


class Rule(NamedTuple):
    """A pattern, what to write instead, and a sentence that breaks it."""

    pattern: str
    instead: str
    breach: str


RULES = [
    Rule(r"\bthrice\b", "three times, or 3x", "thrice of it suits a student"),
    Rule(r"\bhardly\b", "almost no, rarely", "it hardly changes"),
    Rule(r"\bwhoever\b", "if you", "Whoever needs two languages"),
    Rule(r"\bsuch an?\b", "this, or name it", "every command has such a test"),
    Rule(r"\bof those that\b", "name the group", "of those that could be found"),
    Rule(r"\bof before\b", "earlier, previous", "the answers of before"),
    Rule(r"\bin the mean\b(?!time)", "on average", "4.5 bits in the mean"),
    Rule(r"\bis there\b", "name it: installed RAM", "75 % of what is there"),
    Rule(r"\bwhat of\b", "name it", "what of the text is known"),
    Rule(r"\bbeside\b", "next to, against, in addition to", "steps, beside the CPU"),
    Rule(r"\bcome to\b", "a verb of its own", "the run has not come to its end"),
    Rule(r"\bin the end\b", "at the end, finally", "adapters that are added in the end"),
    Rule(r"\bless of a\b", "smaller", "ask for less of a cut"),
    Rule(r"\b(?:known|supported) are\b", "known tasks: ...", "known are builtin, polish"),
    Rule(r"\bmend(?:s|ed)?\b", "fix, repair", "mend that line"),
    Rule(r"\bfrom before\b", "from an earlier run", "4 of 4 known from before"),
    Rule(r"\bmakes it \{|\bit owes\b", "says, must return", "config.json makes it {first}"),
    # "no better than" is what people say
    Rule(
        r"(?<!there )\bis no (?!longer|better|more|reason)",
        "is not a",
        "it is no folder",
    ),
    Rule(r"\bis (?:not here|not there)\b", "is not installed, does not exist", "which is not here"),
]
# Row labels that committed results hold to the letter are in tables.json, which is no sentence.
SENTENCES = [path for path in sorted(TEMPLATES.glob("*.*")) if path.suffix in (".md", ".html")]


def spoken(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings of a module that are not docstrings; {…} for what is put in."""
    tree = ast.parse(source)
    silent = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            silent.add(node.value)
        if isinstance(node, ast.JoinedStr):
            silent.update(node.values)
    for node in ast.walk(tree):
        if node in silent:
            continue
        if isinstance(node, ast.JoinedStr):
            shown = [p.value if isinstance(p, ast.Constant) else "{…}" for p in node.values]
            yield node.lineno, "".join(map(str, shown))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def helps() -> Iterator[tuple[str, str]]:
    """(where, text): of every command the line in the list, and --help-all."""
    for name, line in commands().items():
        yield f"the list of commands, {name}", line
        settings = getattr(importlib.import_module(f"mis_mlx.{name}"), "Settings", None)
        kinds = [settings] if settings else [thermal.Record, thermal.Replay, thermal.Doctor]
        for kind in kinds:
            for part in get_args(kind) or (kind,):
                yield f"{name} --help-all", flag_help.text(part, name, every=True)


def prose(page: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a page's lines outside of code blocks, without code spans."""
    code = False
    for number, line in enumerate(page.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        code ^= fence
        if not code and not fence:
            yield number, re.sub(r"`[^`]*`", "`…`", line)


def breaches(where: str, text: str) -> list[str]:
    """`where: words: instead` for every rule that a text breaks."""
    flat = " ".join(text.split())
    found = []
    for rule in RULES:
        match = re.search(rule.pattern, flat, re.IGNORECASE)
        if match:
            around = flat[max(0, match.start() - 40) : match.end() + 40]
            found.append(f"{where}: …{around}…: write {rule.instead}")
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_every_rule_can_fail(rule: Rule) -> None:
    """Its own example breaks it, and is told what to write."""
    assert any(line.endswith(f"write {rule.instead}") for line in breaches("here", rule.breach))


def test_messages_are_plain_english() -> None:
    """Every string of the package that is not a docstring."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in spoken(path.read_text("utf-8")):
            found += breaches(f"{path.relative_to(ROOT)}:{line}", text)
    assert not found, "\n".join(found)


def test_strings_that_are_not_docstrings_are_found() -> None:
    """Messages and f-strings whole, over their lines; no docstring, of a field either."""
    source = '"""Hardly."""\nclass A:\n    x: int = 1\n    """hardly"""\nf("a " f"{b} c")\n'
    assert list(spoken(source)) == [(5, "a {…} c")]


@pytest.mark.parametrize("name", commands())
def test_every_flag_is_explained(name: str) -> None:
    """No line of help is a name and a default alone, and no default is empty."""
    settings = getattr(importlib.import_module(f"mis_mlx.{name}"), "Settings", None)
    if settings is None:
        pytest.skip("tyro writes this command's help")
    about = flag_help.docs(settings)
    assert not [field.name for field in fields(settings) if not about.get(field.name)]
    assert "(default: )" not in flag_help.text(settings, name, every=True)


def test_help_is_plain_english() -> None:
    """Of all commands, with every flag."""
    found = list[str]()
    for where, text in helps():
        found += breaches(where, text)
    assert not found, "\n".join(found)


def test_templates_are_plain_english() -> None:
    """What a run says and its page, without the templates' own comments and code."""
    found = []
    for path in SENTENCES:
        text = re.sub(r"\{#.*?#\}|\{%.*?%\}", " ", path.read_text("utf-8"), flags=re.DOTALL)
        found += breaches(str(path.relative_to(ROOT)), text)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain_english(page: Path) -> None:
    """Prose, without code."""
    found = []
    for number, line in prose(page.read_text("utf-8")):
        found += breaches(f"{page.name}:{number}", line)
    assert not found, "\n".join(found)
