"""One HTML page that needs nothing else, from templates/page.html: all that is put in is escaped.
And plain texts.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    files = FileSystemLoader(Path(__file__).parent / "templates")
    how = dict[str, Any](trim_blocks=True, lstrip_blocks=True)
    return Environment(
        loader=files, autoescape=select_autoescape(), undefined=StrictUndefined, **how
    )


def document(file: str, values: dict[str, Any]) -> str:
    """Plain text, from a file in templates/."""
    return _templates().get_template(file).render(values).strip()


def part(macro: str, **values: Any) -> str:
    """The HTML that a macro of the page makes of these values. jinja2.UndefinedError where it asks
    for another one.
    """
    return str(getattr(_templates().get_template("page.html").module, macro)(**values))


def page(title: str, body: str, every_s: int | None = None) -> str:
    """The document. A browser loads nothing, runs only our script, whatever `body` is, and opens it
    anew `every_s`.
    """
    script = _templates().get_template("page.js").render()
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return part("page", title=title, body=body, seal=seal, script=script, every_s=every_s)


def markdown(text: str) -> str:
    """Tables and paragraphs of a Markdown page of ours as HTML; anything else in it is shown as it
    is.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip().replace("± ", "±\N{NO-BREAK SPACE}") for line in block.splitlines()]
        if len(lines) > 2 and lines[0].startswith("|") and set(lines[1]) <= set("|-: "):
            head, _, *rows = (
                [cell.strip() for cell in line.strip("|").split("|")] for line in lines
            )
            blocks.append((head, rows, ""))
        else:
            blocks.append(([], [], block))
    return part("markdown", blocks=blocks)
