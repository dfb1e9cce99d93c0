"""How long the page takes from the command to the browser's first picture, and what it holds.

    .venv/bin/pip install -e '.[studio]' playwright
    scripts/mis benchmarks/studio.py      # a minute; Chromium or Chrome in PATH, nothing beside

A trial starts `studio` in an empty folder and opens its address in a fresh window of a browser
that runs already. `paint_s` is the browser's own first contentful paint, `ready_s` is when the
first question can be read, both counted from the moment before the command. Then all panels are
opened. Memory is of the page's process alone; `mlx` says whether MLX's library is in it.

Writes benchmarks/results/<machine>/studio.json.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laboratory
import psutil

from mis_mlx import cli
from mis_mlx.types import Count, MisError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PANELS = ("Decide", "Run", "Judge", "Choose")
QUESTION = "Which model shall become smaller?"
# Milliseconds since 1970 of the first contentful paint, once there is one.
PAINT = """() => new Promise((tell) => {
  const told = (paint) => tell(performance.timeOrigin + paint.startTime);
  new PerformanceObserver((list) => {
    const paint = list.getEntriesByName('first-contentful-paint')[0];
    if (paint) told(paint);
  }).observe({type: 'paint', buffered: true});
})"""
PANEL_MS = 700  # for a panel to ask what it shows


@dataclass(frozen=True)
class Settings:
    """What to do."""

    trials: Count = 5
    """starts of the page, each by a process of its own"""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser that runs."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise MisError(f"no browser in PATH ({', '.join(BROWSERS)}): install one")
    try:
        api = importlib.import_module("playwright.sync_api")
    except ImportError:
        raise MisError("playwright is not installed: pip install playwright") from None
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def trial(browser: Any, folder: Path) -> dict[str, Any]:
    """One start of the page: seconds and bytes."""
    root = str(laboratory.ROOT)
    environment = {**os.environ, "PYTHONPATH": root}
    line = [sys.executable, "-P", "-m", "mis_mlx.studio", "--no-browser"]
    page = browser.new_context().new_page()
    began_s = time.time()
    with subprocess.Popen(
        line,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            return _measured(process, page, began_s)
        finally:
            process.kill()
            page.context.close()


def _measured(process: subprocess.Popen[str], page: Any, began_s: float) -> dict[str, Any]:
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise MisError("the page did not start: run `mis_mlx studio`, which says why")
    address_s = time.time() - began_s
    page.goto(address, wait_until="commit")
    page.get_by_text(QUESTION).wait_for()
    ready_s = time.time() - began_s
    paint_s = page.evaluate(PAINT) / 1000 - began_s
    server = psutil.Process(process.pid)
    first_bytes = server.memory_info().rss
    cpu = server.cpu_times()
    for name in PANELS:
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(PANEL_MS)
    return {
        "address_s": round(address_s, 3),
        "paint_s": round(paint_s, 3),
        "ready_s": round(ready_s, 3),
        "cpu_s": round(cpu.user + cpu.system, 3),
        "first_rss_bytes": first_bytes,
        "rss_bytes": server.memory_info().rss,
        "mlx": "libmlx" in Path(f"/proc/{server.pid}/maps").read_text("utf-8"),
    }


def main(settings: Settings) -> None:
    """All trials, and their medians."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mis-mlx-") as place, chromium() as browser:
        trials = []
        for number in range(settings.trials):
            trials.append(trial(browser, Path(place)))
            cli.say(f"{number + 1}: {trials[-1]}")
        version = browser.version
    medians = {}
    for key in ("address_s", "paint_s", "ready_s", "cpu_s"):
        medians[key] = round(statistics.median(each[key] for each in trials), 3)
    found = {
        "browser": f"Chromium {version}",
        "nicegui": importlib.metadata.version("nicegui"),
        "load_1min": round(load, 1),  # processes that wanted a core when the trials began
        "median": medians,
        "most_rss_bytes": max(each["rss_bytes"] for each in trials),
        "trials": trials,
    }
    laboratory.write("studio", "scripts/mis benchmarks/studio.py", found)


if __name__ == "__main__":
    laboratory.start(Settings, main)
