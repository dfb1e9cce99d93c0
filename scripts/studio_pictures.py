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

    prompts: tuple[str, ...] = ("What is a shepherd?", "What does he do all day?")
    """what both models are asked, one after the other"""
    tokens: Count = 48
    """of each answer"""
    out: str = str(IMAGES)
    """folder of the pictures"""
    every: bool = False
    """take every panel at both widths in both colours, to be looked at; docs show some of them"""


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a page."""
    line = [sys.executable, "-P", "-m", "mis_mlx.studio", "--no-browser"]
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


class Camera:
    """Takes pictures of all that the panel has."""

    def __init__(self, page: Any, settings: Settings) -> None:
        self.page = page
        self.every = settings.every
        self.out = Path(settings.out)

    def take(self, name: str) -> None:
        """At a desk, in light colours; with `every` also on a phone, and in dark ones."""
        self._one(name)
        if not self.every:
            return
        for width, viewport in (("desk", DESK), ("phone", PHONE)):
            for scheme in ("light", "dark"):
                self.page.set_viewport_size(viewport)
                self.page.emulate_media(color_scheme=scheme)
                self._one(f"{name}-{width}-{scheme}")
        self.at_desk()

    def at_desk(self) -> None:
        """As it was."""
        self.page.set_viewport_size(DESK)
        self.page.emulate_media(color_scheme="light")

    def on_a_phone(self, name: str) -> None:
        """One picture on a phone, in dark colours."""
        self.page.set_viewport_size(PHONE)
        self.page.emulate_media(color_scheme="dark")
        self._one(name)
        self.at_desk()

    def _one(self, name: str) -> None:
        self.page.wait_for_timeout(800)
        self.page.screenshot(path=str(self.out / f"studio-{name}.png"), full_page=True)


def talk(page: Any, settings: Settings) -> None:
    """A turn for each prompt."""
    figures = page.get_by_text(re.compile(r"\d+ tokens.*of memory"))
    page.get_by_label("Tokens").fill(str(settings.tokens))
    for number, prompt in enumerate(settings.prompts, start=1):
        page.get_by_label("Ask both").first.fill(prompt)
        page.get_by_role("button", name="Ask both").click()
        figures.nth(2 * number - 1).wait_for()


def main(s: Settings) -> None:
    """All of them."""
    with served() as address, browser(address) as page:
        camera = Camera(page, s)
        page.get_by_text("Which model shall").wait_for()
        camera.take("choose")
        page.get_by_role("button", name="Decide").click()
        page.get_by_text("million parameters").wait_for()
        camera.take("decide")
        page.get_by_role("tab", name="Run").click()
        page.get_by_text(re.compile("planned")).first.wait_for()
        camera.take("run")
        page.get_by_role("tab", name="Judge").click()
        talk(page, s)
        camera.take("judge")
        camera.on_a_phone("phone")
        page.get_by_role("tab", name="Keep").click()
        camera.take("keep")


if __name__ == "__main__":
    main(cli.parse(Settings))
