"""A child process opens a stranger's tokenizer and chat template first: crashes end there.

It tries what transformers is going to use, the tokenizers library and a Jinja sandbox, on a few
words. A tokenizer that misbehaves on other words only is not found here. A tokenizer is tried once
in a process, whichever folder it lies in.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mis_mlx.data import chat_template
from mis_mlx.hardware import child_process
from mis_mlx.storage.header_check import Refused, json_object
from mis_mlx.storage.safetensors import require_inside
from mis_mlx.types import GIB, MisError, gib

ROWS = "vocabulary.json"  # which rows of its parent's a trimmed vocabulary has
# The tokenizer's files in a folder: all but weights, their index, provenance and foreign code.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    ROWS,
)
# Beside these, the templates that transformers takes for some conversations, as with tools.
MORE_TEMPLATES = "additional_chat_templates"
MOST_BYTES = 2**28  # of one of these files; the largest known, of 256 thousand tokens, takes 33 MB
SECONDS = 30.0
MEMORY_BYTES = 4 * GIB
MOST_CHARACTERS = 1_000_000  # that a template may make of SAID
CODE = ("auto_map", "model_file")  # settings that name the model's own program code
_RUNS = ("a", "ab", "A", "z", "0", "1", " ", "\n", "\t", ".", "-", "é", "ł", "語", "🐻 ")
# Runs, with something after them: if any ordinary words make a bad regular expression go astray,
# these do.
WORDS = [
    *(run * 64 + "!" for run in _RUNS),
    "Baca wyszedł rano z owcami na halę; it's 12.50 zł, isn't it?\r\n\tfor i in range(10): pass",
]
SAID: list[dict[str, Any]] = [
    {"role": "user", "content": "Ile owiec jest na hali?"},
    {"role": "assistant", "content": "Sto dwadzieścia."},
]
CALL = {"type": "function", "function": {"name": chat_template.UNKNOWN, "arguments": {"a": 1}}}
CALLED: list[dict[str, Any]] = [
    SAID[0],
    {"role": "assistant", "content": "", "reasoning_content": "Policzę.", "tool_calls": [CALL]},
    {"role": "tool", "content": "120"},
]


@dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer that was tried, equal to every other that mlx-lm opens alike: the same
    files, for the same kind of model.
    """

    digest: bytes
    """of the files"""
    kind: str
    """the model's `model_type`"""
    ends: tuple[int, ...]
    """tokens that end an answer, by the model's settings; (): as the tokenizer says"""
    folder: Path = field(compare=False)


@cache  # of the content: a tokenizer that passed once is not tried again
def _try(tokenizer: Tokenizer) -> None:
    """MisError unless a child opened the tokenizer and its template, within limits."""
    folder = tokenizer.folder
    try:
        child_process.ask(__name__, "attempt", {"folder": str(folder)}, SECONDS, MEMORY_BYTES)
    except child_process.NoAnswer as why:
        remedy = "copy its files again, from a model that you trust"
        raise MisError(f"{folder}: the tokenizer does not open ({why}): {remedy}") from None


def check_tokenizer(folder: Path) -> Tokenizer:
    """The folder's; MisError unless a child opened it and its template, within limits."""
    digest = hashlib.sha256()
    for path in present(folder):
        content = path.read_bytes()
        name = path.relative_to(folder)
        digest.update(f"{name} {len(content)} ".encode() + content)
    config = read_json(folder / "config.json")
    # As mlx-lm has it: turns often end with another token than texts, which the tokenizer names.
    generation = read_json(folder / "generation_config.json")
    end = generation.get("eos_token_id") or config.get("eos_token_id")
    every = end if isinstance(end, list) else [end]
    ends = tuple(number for number in every if isinstance(number, int))
    tokenizer = Tokenizer(digest.digest(), str(config.get("model_type")), ends, folder)
    _try(tokenizer)
    return tokenizer


def present(folder: Path) -> Iterator[Path]:
    """The FILES that are there, and all of MORE_TEMPLATES.

    MisError for one that is no regular file of sane size inside the folder.
    """
    more = folder / MORE_TEMPLATES
    if os.path.lexists(more):
        require_inside(folder, MORE_TEMPLATES)
    for path in (*(folder / name for name in FILES), *sorted(more.glob("*.jinja"))):
        if not os.path.lexists(path):
            continue
        require_inside(path.parent, path.name)
        if not path.is_file():
            raise MisError(f"{path} is not a regular file: copy the tokenizer files again")
        nbytes = path.stat().st_size
        if nbytes > MOST_BYTES:
            raise MisError(
                f"{path} is {gib(nbytes)} long, but {gib(MOST_BYTES)} are allowed: copy it again"
            )
        yield path


def attempt(folder: str) -> dict[str, int]:
    """The child's side: how many tokens and characters the trial gave. Errors pass through."""
    path = Path(folder)
    settings = _json(path / "tokenizer_config.json")
    for key in CODE:
        if key in settings:
            raise ValueError(
                f"{key} wants to run the model's own program code, which is never done here"
            )
    tokens = 0
    if (path / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        for words in WORDS:
            ids = tokenizer.encode(words).ids
            tokens += len(ids) + len(tokenizer.decode(ids))
    characters = 0
    for template in _templates(path, settings):
        characters += _rendered(template, settings)
    return {"tokens": tokens, "characters": characters}


def read_json(path: Path) -> dict[str, Any]:
    """A tokenizer file's JSON object; {} without the file. MisError if it holds anything else."""
    try:
        return _json(path)
    except (OSError, Refused) as why:
        raise MisError(f"{path}: {why}: copy the tokenizer files again") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # reading a pipe would wait for ever
        return {}
    return json_object(path.read_bytes())


def _templates(folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Every chat template that the folder has, in a file of its own or in a settings file."""
    for path in (folder / "chat_template.jinja", *(folder / MORE_TEMPLATES).glob("*.jinja")):
        if path.exists():
            yield path.read_text("utf-8")
    for holder in (settings, _json(folder / "chat_template.json")):
        templates = holder.get("chat_template")
        if not isinstance(templates, list):
            templates = [templates]
        for template in templates:
            text = template.get("template") if isinstance(template, dict) else template
            if isinstance(text, str):
                yield text


def _rendered(template: str, settings: dict[str, Any]) -> int:
    """Characters of SAID and CALLED in the template: with and without a generation prompt, tools
    and thoughts, which are branches of their own.

    A template may refuse a conversation, and do so by any error where tools are in it; of SAID all
    others pass through.
    """
    from jinja2.exceptions import SecurityError, TemplateError

    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    values = {name: value for name, value in tokens.items() if isinstance(value, str)}
    tools = (None, [chat_template.UNKNOWN_TOOL])
    trials = itertools.product((SAID, SAID[:1], CALLED), tools, (False, True))
    count = 0
    for messages, with_tools, thinking in trials:
        written = 0
        try:
            program = _sandbox().from_string(template)
            pieces = program.generate(
                {**values, "messages": messages, "tools": with_tools, "documents": None},
                add_generation_prompt=messages[-1]["role"] != "assistant",
                enable_thinking=thinking,
            )
            for piece in pieces:
                written += len(piece)
                if written > MOST_CHARACTERS:
                    break
        except (SecurityError, MemoryError):
            raise
        except TemplateError:
            continue
        except Exception:
            if messages is not CALLED and not with_tools:
                raise
        count = max(count, written)
    if count > MOST_CHARACTERS:
        raise ValueError(f"the chat template writes more than {MOST_CHARACTERS} characters")
    return count


def _sandbox() -> Any:
    """Jinja as transformers sets it up for chat templates.

    No attribute leads out of it, and a template can change nothing.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that marks an answer; its content is rendered."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's own spelling

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=options.get("indent"))

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda _form: "2026-01-01"
    return sandbox
