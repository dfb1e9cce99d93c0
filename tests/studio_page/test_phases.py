"""The page is closed and opened again in every phase of a run, which is killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from mis_mlx.storage import run_folder
from mis_mlx.storage.run_folder import parsed
from mis_mlx.studio_page import runs
from tests import forks
from tests.storage import test_hub
from tests.studio_page.conftest import write_settings
from tests.studio_page.driving import (
    PATIENCE_S,
    QUICK,
    Tab,
    browser,
    needs_browser,
    page_of,
    state,
    to_the_plan,
)

PHASES = ("prune", "repair", "distil", "quantize", "distil scales", "measure")
LOOK_S = 0.005
BRIEF = {**QUICK, "iters": 12}  # nothing whose length depends on the clock


def wait(over: Callable[[], Any], what: str) -> Any:
    """What it answers, when that is something."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        answer = over()
        if answer:
            return answer
        time.sleep(LOOK_S)
    raise AssertionError(what)


def ended(run: Path) -> list[str]:
    """The phases that a run has behind it."""
    records = parsed(run / run_folder.PHASES, 1 << 20)
    return [str(record["phase"]) for record in records if record and "phase" in record]


def hold_in(folder: Path, phase: str) -> None:
    """Wait for a phase and hold the run's processes there, as a laptop that falls asleep does."""
    run = folder / "runs" / "tiny-001"
    before = PHASES[: PHASES.index(phase)]
    begun = run / run_folder.PHASES
    wait(lambda: begun.exists() and set(before) <= set(ended(run)), f"{phase} does not come")
    pid = json.loads((folder / runs.BOOKS / "tiny-001.json").read_text())["pid"]
    os.killpg(pid, signal.SIGSTOP)
    assert phase not in ended(run), f"{phase} was over before it was held"


@needs_browser
@pytest.mark.slow
def test_closed_killed_and_resumed_in_every_phase(folder: Path, home: dict[str, str]) -> None:
    """The run reaches each phase while no page is open; a page that is opened then shows it.

    It is killed and resumed from there, and ends with the weights of a run that nobody disturbed.
    """
    write_settings(folder / "quick.yaml", BRIEF)
    with page_of(folder, home, "--models", "more") as served, browser() as context:
        tab = Tab(context, served.address)
        to_the_plan(tab)
        tab.press("Start the run")
        tab.sees("tiny-001: running")
        tab.page.close()
        for phase in PHASES:
            hold_in(folder, phase)
            tab = Tab(context, f"http://{served.place}/")
            tab.go("Run")
            tab.sees("tiny-001: running")
            tab.press("Stop at once")
            tab.sees("tiny-001: stopped")
            tab.press("Resume")
            tab.sees("tiny-001: running")
            assert not tab.errors
            tab.page.close()
        wait(lambda: state(folder) != "running", "the run does not end")
        tab = Tab(context, f"http://{served.place}/")
        tab.go("Run")
        tab.sees("tiny-001: finished")
    undisturbed(folder, home)
    ours = folder / "runs" / "tiny-001" / "model" / "model.safetensors"
    theirs = folder / "runs" / "undisturbed" / "model" / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


def undisturbed(folder: Path, home: dict[str, str]) -> None:
    """The same run from a terminal."""
    line = [sys.executable, "-m", "mis_mlx.distill", "--teacher", str(folder / "more" / "tiny")]
    line += ["--data", str(folder / "notes"), "-c", "quick.yaml", "--out", "runs/undisturbed"]
    env = {**home, "PYTHONPATH": str(forks.ROOT)}
    subprocess.run(line, cwd=folder, env=env, check=True, capture_output=True)


class SlowHub(test_hub.Hub):
    """A hub whose weights wait until they are let go."""

    go: threading.Event
    model: Path

    def do_GET(self) -> None:
        """As the hub does, after a while for weights."""
        if self.command == "GET" and "resolve" in self.path and "safetensors" in self.path:
            self.go.wait(PATIENCE_S)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked was killed
            super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def slow_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address. It has the tiny model of the folder as me/tiny."""
    files = {path.name: path.read_bytes() for path in (folder / "more" / "tiny").iterdir()}
    monkeypatch.setattr(test_hub, "CONTENT", files)
    SlowHub.asked = []
    SlowHub.go = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowHub) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        SlowHub.go.set()
        server.shutdown()


@needs_browser
@pytest.mark.slow
def test_closed_killed_and_resumed_in_a_download(
    folder: Path, home: dict[str, str], slow_hub: str
) -> None:
    """The teacher comes from a hub; the second time it comes whole, and the run begins."""
    write_settings(folder / "quick.yaml", BRIEF)
    env = {**home, "HF_ENDPOINT": slow_hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env["HF_HOME"] = str(folder / "hf")
    env["MIS_MLX_CACHE"] = str(folder / "cache")
    with page_of(folder, env) as served, browser() as context:
        tab = Tab(context, served.address)
        tab.choose("Model", "a model of the hub")
        tab.page.get_by_label("Model on the Hugging Face hub").fill("me/tiny")
        tab.choose("Text to learn from", "notes")
        tab.choose("Settings file", "quick.yaml")
        tab.press("Decide")
        tab.press("as the settings file says")
        tab.press("Start the run")
        tab.sees("tiny-001: running")
        wait(lambda: any("resolve" in path for path in SlowHub.asked), "nothing is downloaded")
        tab.page.close()
        tab = Tab(context, f"http://{served.place}/")
        tab.go("Run")
        tab.sees("tiny-001: running")
        tab.press("Stop at once")
        tab.sees("tiny-001: stopped")
        assert not (folder / "runs" / "tiny-001").exists()
        SlowHub.go.set()
        tab.press("Resume")
        tab.sees("tiny-001: running")
        begun = folder / "runs" / "tiny-001" / run_folder.PHASES
        wait(begun.exists, "the run does not begin")
        assert (folder / "cache" / "me--tiny" / "model.safetensors").is_file()
        tab.press("Stop at once")
        tab.sees("tiny-001: stopped")
        served_process = psutil.Process(served.process.pid)
        assert served_process.is_running()
