"""Let a child process open a stranger's tokenizer and chat template first: what hangs or crashes
there, ends there.

It tries what transformers is going to use, the tokenizers library and a Jinja sandbox, on a few
words; what only misbehaves on other words is not found here. A tokenizer is tried once in a
process, whichever folder it lies in.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mis_mlx.hardware import child_process
from mis_mlx.storage.header_check import Refused, json_object
from mis_mlx.storage.safetensors import inside
from mis_mlx.types import GIB, MisError, gib

ROWS = "vocabulary.json"  # of a trimmed vocabulary: which rows of its parent's it has
# What makes a folder speak: everything but weights, their index, provenance and foreign code.
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
MOST_BYTES = 2**28  # of one of these files; the largest known, of 256 thousand tokens, takes 33 MB
SECONDS = 30.0
MEMORY_BYTES = 4 * GIB
MOST_CHARACTERS = 1_000_000  # that a template may make of SAID
CODE = ("auto_map", "model_file")  # settings that name the model's own program code
# Words on which a bad regular expression goes astray, if any ordinary ones do that: runs, and
# something after them.
WORDS = [
    *(
        run * 64 + "!"
        for run in ("a", "ab", "A", "z", "0", "1", " ", "\n", "\t", ".", "-", "é", "ł", "語", "🐻 ")
    ),
    "Baca wyszedł rano z owcami na halę; it's 12.50 zł, isn't it?\r\n\tfor i in range(10): pass",
]
PASSED = set[bytes]()  # digests of tokenizers that this process has tried
SAID = [
    {"role": "user", "content": "Ile owiec jest na hali?"},
    {"role": "assistant", "content": "Sto dwadzieścia."},
]


def check_tokenizer(folder: Path) -> bytes:
    """MisError unless a child opened the folder's tokenizer and template, within limits, and said
    so. Returned is what tells these files from others.
    """
    digest = hashlib.sha256()
    for path in present(folder):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    if (known := digest.digest()) not in PASSED:
        try:
            child_process.ask(__name__, "attempt", {"folder": str(folder)}, SECONDS, MEMORY_BYTES)
        except child_process.NoAnswer as why:
            remedy = "copy its files again, from a model that you trust"
            raise MisError(f"{folder}: the tokenizer does not open ({why}): {remedy}") from None
        PASSED.add(known)
    return known


def present(folder: Path) -> Iterator[Path]:
    """Those of FILES that are there. MisError for one that is no regular file of sane size inside
    the folder.
    """
    for name in FILES:
        path = folder / name
        if not os.path.lexists(path):
            continue
        inside(folder, name)
        if not path.is_file():
            raise MisError(f"{path} is not a regular file: copy the tokenizer files again")
        if (nbytes := path.stat().st_size) > MOST_BYTES:
            raise MisError(
                f"{path} is {gib(nbytes)} long, {gib(MOST_BYTES)} are allowed: copy it again"
            )
        yield path


def attempt(folder: str) -> dict[str, int]:
    """The child's side: how many tokens and characters came of the trial. Raises what goes
    wrong.
    """
    where = Path(folder)
    settings = _json(where / "tokenizer_config.json")
    for key in CODE:
        if key in settings:
            raise ValueError(
                f"{key} wants to run the model's own program code, which is never done here"
            )
    tokens = 0
    if (where / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
        for words in WORDS:
            ids = tokenizer.encode(words).ids
            tokens += len(ids) + len(tokenizer.decode(ids))
    written = [_rendered(template, settings) for template in _templates(where, settings)]
    return {"tokens": tokens, "characters": sum(written)}


def read_json(path: Path) -> dict[str, Any]:
    """A tokenizer file's JSON object; {} where there is no such file. MisError where it holds
    something else.
    """
    try:
        return _json(path)
    except (OSError, Refused) as why:
        raise MisError(f"{path}: {why}: copy the tokenizer files again") from None


def _json(path: Path) -> dict[str, Any]:
    # reading a pipe would wait for ever
    return json_object(path.read_bytes()) if path.is_file() else {}


def _templates(folder: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Every chat template that the folder has, wherever it is written."""
    if (path := folder / "chat_template.jinja").exists():
        yield path.read_text("utf-8")
    for holder in (settings, _json(folder / "chat_template.json")):
        templates = holder.get("chat_template")
        for each in templates if isinstance(templates, list) else [templates]:
            text = each.get("template") if isinstance(each, dict) else each
            if isinstance(text, str):
                yield text


def _rendered(template: str, settings: dict[str, Any]) -> int:
    """Characters of SAID in the template, with and without a generation prompt. A template may
    refuse, not more.
    """
    from jinja2.exceptions import SecurityError, TemplateError

    known: dict[str, Any] = {"tools": None, "documents": None}
    known |= {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str)
    }
    count = 0
    for messages, generation in ((SAID, False), (SAID[:1], True)):
        values = {**known, "messages": messages, "add_generation_prompt": generation}
        try:
            for piece in _sandbox().from_string(template).generate(**values):
                if (count := count + len(piece)) > MOST_CHARACTERS:
                    raise ValueError(
                        f"the chat template writes more than {MOST_CHARACTERS} characters"
                    )
        except SecurityError:
            raise
        except TemplateError:
            continue
    return count


def _sandbox() -> Any:
    """Jinja as transformers sets it up for chat templates: no attribute leads out, nothing can be
    changed.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that marks an answer; what is in it is rendered."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's own spelling

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    parts = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=parts)
    sandbox.filters["tojson"] = lambda value, **how: json.dumps(
        value, ensure_ascii=False, indent=how.get("indent")
    )
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda _form: "2026-01-01"
    return sandbox
