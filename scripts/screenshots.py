"""Make the pictures of a run in docs/images: the plan and a moment of the run, the closing table,
the report page.

    script -q -c "scripts/mis benchmarks/distill.py default" capture    # in a terminal of 100
    columns: a real run
    scripts/mis scripts/screenshots.py --capture capture                # and the page that it
    stored

Terminal pictures are SVG, by rich. The page's picture needs a browser, chromium or chrome, in PATH.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mis_mlx import cli

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results" / "linux-x86_64"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 100  # of the terminal that is drawn
PLACES = re.compile(
    r"(?<=[ :])/[\w./-]*/(?=\.venv|distill-|\w+-00)|cache /[\w./-]*/"
)  # folders of the machine
SPINNER = re.compile("[\u2800-\u28ff]")  # how a line with a bar begins
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


@dataclass(frozen=True)
class Settings:
    """Of which run."""

    capture: str
    """what `script` wrote of it"""
    page: str = str(RESULTS / "distill-default.html")
    """the page that `report` made of it"""


def screens(raw: str) -> tuple[list[str], list[str]]:
    """Lines of the terminal while it distils, from the plan on, and at its end from the table
    on.
    """
    shown = [
        ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2].rstrip() for line in raw.split("\n")
    ]
    shown = [PLACES.sub("", re.sub(r"(?:\.\./)+\w+/", "runs/", line)) for line in shown]
    bars = [
        line for line in shown if SPINNER.match(line) and " distil " in line and "tok/s" in line
    ]
    first = next(i for i, line in enumerate(shown) if "parameters (" in line)
    until = shown.index(bars[0])
    table = next(i for i, line in enumerate(shown) if re.match(r"\|\s+\| teacher", line))
    running = [line for line in shown[first:until] if not SPINNER.match(line)]
    ending = [line for line in shown[table:] if not line.startswith(("{", "Script done"))]
    return [*running, bars[len(bars) // 2]], ending


def drawn(lines: list[str], title: str, out: Path) -> None:
    """A picture of a terminal with these lines."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text("\n".join(lines).strip("\n")), soft_wrap=False)
    svg = re.sub(
        r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL
    )  # from another host
    out.write_text("".join(line.rstrip() + "\n" for line in svg.splitlines()), encoding="utf-8")


def main(s: Settings) -> None:
    """All three."""
    IMAGES.mkdir(exist_ok=True)
    running, ending = screens(Path(s.capture).read_text(encoding="utf-8", errors="replace"))
    drawn(running, "scripts/mis distill", IMAGES / "run.svg")
    drawn(ending, "scripts/mis distill: the end", IMAGES / "table.svg")
    page = Path(s.page)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser in PATH ({', '.join(BROWSERS)}): the picture of {page} is not made")
    size = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=860,1400",
        f"--screenshot={IMAGES / 'report.png'}",
    ]
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", *size, page.absolute().as_uri()],
        check=True,
    )


if __name__ == "__main__":
    main(cli.parse(Settings))
