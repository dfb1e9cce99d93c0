"""The page's process and Chromium, as tests drive them: by what a person sees and presses."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest

from mis_mlx.studio_page import runs
from tests.conftest import ROOT

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EXTRA = importlib.util.find_spec("nicegui") is not None
DRIVER = importlib.util.find_spec("playwright") is not None
needs_extra = pytest.mark.skipif(
    not EXTRA, reason="NiceGUI is not installed: pip install '.[studio]' in the checkout"
)
needs_browser = pytest.mark.skipif(
    not (EXTRA and DRIVER and CHROMIUM),
    reason="needs NiceGUI, Chromium and playwright: pip install '.[studio]' playwright",
)
PATIENCE_S = 180
PANELS = ("Choose", "Decide", "Run", "Judge")
MOST_BYTES = 150 * 10**6  # of the page's process
QUICK = {
    "max_seq_length": 32, "num_samples": 4, "reconstruct_samples": 4, "eval_windows": 3,
    "scenario": "goral", "iters": 300, "save_every": 4, "learning_rate": 0.01, "q_iters": 2,
    "q_group_size": 32, "eval_prompts": 4, "conversations": 0,
}  # fmt: skip


class Answered(NamedTuple):
    """Status, text, and the cookie that came with it."""

    status: int
    text: str
    cookie: str


class Served(NamedTuple):
    """A page's process and its address."""

    process: subprocess.Popen[str]
    address: str
    folder: Path

    @property
    def place(self) -> str:
        """Host and port."""
        return urlsplit(self.address).netloc

    def get(self, path: str, **headers: str) -> Answered:
        """An answer to a request with these headers, as any program can send it."""
        connection = http.client.HTTPConnection(self.place, timeout=PATIENCE_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request("GET", path, headers=named)
            with connection.getresponse() as answer:
                cookie = (answer.getheader("set-cookie") or "").partition(";")[0]
                return Answered(answer.status, answer.read().decode(), cookie)


@contextlib.contextmanager
def page_of(
    folder: Path, env: dict[str, str], *flags: str, opens: bool = False
) -> Iterator[Served]:
    """The page's process; a run that it started ends with the test. opens: a browser, too."""
    line = [sys.executable, "-m", "mis_mlx.studio", *flags]
    if not opens:
        line.append("--no-browser")
    whole = {**env, "PYTHONPATH": str(ROOT)}
    whole.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI would take it for a test of itself
    with (
        (folder / "studio.err").open("w") as err,
        subprocess.Popen(
            line, cwd=folder, env=whole, stdout=subprocess.PIPE, stderr=err, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, (folder / "studio.err").read_text()
            yield Served(process, address, folder)
        finally:
            process.kill()
            for path in (folder / runs.BOOKS).glob("*.json"):
                with contextlib.suppress(psutil.Error):
                    psutil.Process(json.loads(path.read_text())["pid"]).kill()


class Tab:
    """A page in Chromium, by what a person sees."""

    def __init__(self, context: Any, address: str) -> None:
        self.page = context.new_page()
        self.errors: list[str] = []
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)

    def press(self, name: str) -> None:
        """A button."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def sees(self, text: str) -> None:
        """Until it does."""
        self.page.get_by_text(text).first.wait_for()

    def choose(self, label: str, option: str) -> None:
        """An option of a list."""
        self.page.bring_to_front()
        self.page.get_by_label(label, exact=True).click()
        options = self.page.get_by_role("option")
        options.filter(has_text=option).first.click()
        options.first.wait_for(state="hidden")

    def go(self, tab: str) -> None:
        """To one of the four panels."""
        self.page.get_by_role("tab", name=tab).click()

    def panels(self, wait_ms: int) -> Iterator[str]:
        """To each of the four, once the plan is made; its name, when it has had this time."""
        to_the_plan(self)
        for name in PANELS:
            self.go(name)
            self.page.wait_for_timeout(wait_ms)
            yield name

    def wide(self) -> bool:
        """Whether the page has to be pushed sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth + 1")


@contextlib.contextmanager
def browser(**context: Any) -> Iterator[Any]:
    """A context of Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium.new_context(**context)
        finally:
            chromium.close()


def to_the_plan(tab: Tab) -> None:
    """Choose and decide."""
    tab.sees("Which model shall become smaller?")
    tab.choose("Model", "more/tiny")
    tab.choose("Text to learn from", "notes")
    tab.choose("Settings file", "quick.yaml")
    tab.press("Decide")
    tab.press("as the settings file says")
    tab.sees("million parameters")


def state(folder: Path) -> str:
    """Of the run, asked by a process in that folder."""
    code = "from mis_mlx.studio_page import runs; print(runs.named('tiny-001').state)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True)
    return done.stdout.decode().strip()


# Elements that take the focus, without a name that a screen reader could say. The track of a
# slider has that of the slider around it.
NAMELESS = """() => {
  const byIds = (ids) => ids.split(/\\s+/).map((id) => document.getElementById(id)?.innerText);
  const named = (one) => [
    one.getAttribute('aria-label'), one.title, one.alt, one.innerText,
    ...[...(one.labels || [])].map((label) => label.innerText),
    ...byIds(one.getAttribute('aria-labelledby') || ''),
    one.closest('[role=slider]')?.getAttribute('aria-label'),
  ].some((name) => name && name.trim());
  const kinds = 'input, textarea, select, button, a[href], [role=slider], [role=tab], '
    + '[role=combobox], [role=img], [role=dialog], [tabindex="0"]';
  const shown = (one) => one.checkVisibility() && one.type !== 'hidden';
  return [...document.querySelectorAll(kinds)].filter((one) => shown(one) && !named(one))
    .map((one) => one.outerHTML.slice(0, 200));
}"""
# What can be pressed and is smaller than 24 pixels, the least of WCAG 2.2 (2.5.8).
SMALL = """() => [...document.querySelectorAll('button, a[href], [role=tab], [role=slider]')]
  .filter((one) => one.checkVisibility()).map((one) => [one, one.getBoundingClientRect()])
  .filter(([one, box]) => box.width && (box.width < 24 || box.height < 24))
  .map(([one, box]) => `${box.width} x ${box.height}: ${one.outerHTML.slice(0, 200)}`)"""
