"""One HTML page that needs nothing else, from templates/page.html: all that is put in is escaped."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip


def part(macro: str, **values: Any) -> str:
    """The HTML that a macro of the page makes of these values. KeyError where it asks for one that is not there."""
    from jinja2 import UndefinedError

    try:
        return str(getattr(_templates().get_template("page.html").module, macro)(**values))
    except UndefinedError as error:
        raise KeyError(str(error)) from None


def page(title: str, body: str, every_s: int | None = None) -> str:
    """The whole document. The browser may load nothing and run only our script, whatever `body` (HTML) holds. every_s:
    how often a browser opens it anew, while the run goes on."""
    script = _templates().get_template("page.js").render()
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{seal}'; "
    policy += "base-uri 'none'; form-action 'none'"
    return part("page", title=title, body=body, policy=policy, script=script, every_s=every_s)


def markdown(text: str) -> str:
    """Tables and paragraphs of a Markdown page of ours as HTML; anything else in it is shown as it is."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip().replace("± ", "±\N{NO-BREAK SPACE}") for line in block.splitlines()]
        if len(lines) > 2 and lines[0].startswith("|") and set(lines[1]) <= set("|-: "):
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            blocks.append((head, rows, ""))
        else:
            blocks.append(([], [], block))
    return part("markdown", blocks=blocks)
