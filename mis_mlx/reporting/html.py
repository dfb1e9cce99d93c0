"""One HTML page that needs nothing else, from templates/page.html; and plain texts.

Everything that is put into the page is escaped.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from mis_mlx.reporting.text import cells_of


@cache
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    files = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(
        loader=files,
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def document(file: str, values: dict[str, Any]) -> str:
    """Plain text, from a file in templates/."""
    return _templates().get_template(file).render(values).strip()


def part(macro: str, **values: Any) -> str:
    """The HTML that a macro of the page makes of these values.

    jinja2.UndefinedError where it asks for another one.
    """
    macros = _templates().get_template("page.html").module
    return str(getattr(macros, macro)(**values))


def page(title: str, body: str) -> str:
    """The document. The browser loads nothing and runs only our script, whatever `body` holds."""
    script = _templates().get_template("page.js").render()
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return part("page", title=title, body=body, seal=seal, script=script)


def markdown(text: str) -> str:
    """Tables and paragraphs of a Markdown page of ours as HTML; the rest is shown as it is."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip().replace("± ", "±\N{NO-BREAK SPACE}") for line in block.splitlines()]
        if len(lines) > 2 and lines[0].startswith("|") and set(lines[1]) <= set("|-: "):
            head, _, *rows = map(cells_of, lines)
            blocks.append((head, rows, ""))
        else:
            blocks.append(([], [], block.replace("**", "")))
    return part("markdown", blocks=blocks)
