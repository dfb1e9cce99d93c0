"""Make the pictures of docs/studio.md: the five panels of the page, at a desk and on a phone.

    .venv/bin/pip install -e '.[studio]' playwright
    cd FOLDER                                          # with a finished run under runs/
    MIS/scripts/mis MIS/scripts/studio_pictures.py

Every picture is of the page itself in Chromium. The browser, chromium or chrome, is one in PATH.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.types import Count

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 400_000
DESK = {"width": 900, "height": 760}
PHONE = {"width": 390, "height": 760}


@dataclass(frozen=True)
class Settings:
    """Of the folder in which it is started."""

    prompt: str = "What is a shepherd?"
    """what both models are asked"""
    tokens: Count = 48
    """of each answer"""
    out: str = str(IMAGES)
    """folder of the pictures"""


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a page."""
    line = [sys.executable, "-m", "mis_mlx.studio", "--no-browser"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextlib.contextmanager
def browser(address: str) -> Iterator[Any]:
    """A page of Chromium with this address."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit(f"no browser in PATH ({', '.join(BROWSERS)}): install one")
    api = importlib.import_module("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = chromium.new_page(viewport=DESK)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        yield page
        chromium.close()


def take(page: Any, name: str, out: Path) -> None:
    """One picture, of all that the panel has."""
    page.wait_for_timeout(500)
    page.screenshot(path=str(out / f"studio-{name}.png"), full_page=True)


def main(s: Settings) -> None:
    """All of them."""
    out = Path(s.out)
    with served() as address, browser(address) as page:
        page.get_by_text("Which model shall").wait_for()
        take(page, "choose", out)
        page.get_by_role("button", name="Decide").click()
        page.get_by_text("million parameters").wait_for()
        take(page, "decide", out)
        page.get_by_role("tab", name="Run").click()
        page.get_by_text(re.compile("planned")).first.wait_for()
        take(page, "run", out)
        page.get_by_role("tab", name="Judge").click()
        page.get_by_label("Ask both").first.fill(s.prompt)
        page.get_by_label("Tokens").fill(str(s.tokens))
        page.get_by_role("button", name="Ask both").click()
        page.get_by_text(re.compile(r"\d+ tokens.*of memory")).nth(1).wait_for()
        take(page, "judge", out)
        page.set_viewport_size(PHONE)
        page.emulate_media(color_scheme="dark")
        take(page, "phone", out)
        page.set_viewport_size(DESK)
        page.emulate_media(color_scheme="light")
        page.get_by_role("tab", name="Keep").click()
        take(page, "keep", out)


if __name__ == "__main__":
    main(cli.parse(Settings))
