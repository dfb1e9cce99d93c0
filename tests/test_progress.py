"""Something moves in every phase: lines in a log, a bar on a terminal, and time left that learns
from what was.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mis_mlx import cli
from mis_mlx.reporting import progress
from mis_mlx.reporting.progress import Display
from mis_mlx.storage import run_folder
from tests.conftest import ROOT, Done


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_left_by_pencil() -> None:
    """A loop that is all of its phase by its rate, all else by the plan; what an ended phase took
    instead of its plan tells of the others by its share of the whole plan.
    """
    clock = Clock()
    display = Display({"prune": 10.0, "distil": 100.0, "measure": 50.0}, clock)
    with display.level("distill"):
        with display.level("prune"), display.level("block", 4) as show:
            clock.now_s += 2
            show(1)
            assert display.left_s() == 158.0  # the plan says 10 - 2; then 100 + 50
            clock.now_s += 10
            show(2)
            assert display.left_s() is None  # overdue
            assert display.line().startswith("prune 99 %  longer than planned  ")
        display.took["prune"] = 20.0
        with display.level("distil"), display.level("distil", 60, whole=True) as show:
            assert display.left_s() == 159.375  # 170 s for the 160 that were planned
            for done in (11, 12):  # ten were done before
                clock.now_s += 3
                show(done)
            assert display.left_s() == 3.0 * 48 + 53.125
            assert display.line().startswith("distil 12/60  about 3.3 min left  0.3/s  ")


def test_the_percent_never_falls_and_no_time_comes_back() -> None:
    """In a phase of several loops, one of which begins slowly: it goes by its plan."""
    clock = Clock()
    display = Display({"quantize": 100.0, "measure": 50.0}, clock)
    seen = []
    with display.level("distill"), display.level("quantize"):
        for seconds in ([1.0] * 20, [4.0, *[0.5] * 39], [1.0] * 30):
            with display.level("block", len(seconds)) as show:
                for done, turn_s in enumerate(seconds, 1):
                    clock.now_s += turn_s
                    show(done)
                    (percent,) = re.findall(r"quantize (\d+) %", display.line())
                    seen.append((int(percent), display.left_s()))
    for before, after in pairwise(seen):
        assert after[0] >= before[0]
        assert after[1] <= before[1]


def test_a_run_may_have_the_name_of_its_first_phase() -> None:
    """As `quantize` has: the second phase counts once, and by its own beginning."""
    clock = Clock()
    display = Display({"quantize": 10.0, "distil scales": 40.0}, clock)
    with display.level("quantize"):
        with display.level("quantize"):
            assert display.left_s() == 50.0
            clock.now_s += 20
        display.took["quantize"] = 20.0
        assert display.left_s() is None
        with display.level("distil scales"):
            clock.now_s += 5
            assert display.left_s() == 43.0
            assert display.line().startswith("distil scales 10 %  about 43.0 s left  5.0 s so far")


def test_a_line_has_at_most_one_count() -> None:
    """The loop that is all of its phase is counted; no loop inside of one is, however long it
    takes.
    """
    clock = Clock()
    display = Display({"distil": 100.0, "measure": 10.0}, clock)
    with display.level("run"):
        with display.level("block", 30):
            assert display.line().startswith("run  about 1.8 min left  0.0 s so far  ")
        with display.level("distil"), display.level("distil", 60, whole=True) as show:
            show(1, "loss 2.5")
            with display.level("block", 30) as inner:
                inner(3)
                clock.now_s += 60
                assert re.fullmatch(r"distil 1/60  about .* left  loss 2.5", display.line())
        with display.level("measure"):
            with display.level("block", 30) as inner:
                inner(3)
                assert display.line().startswith("measure 0 %  about ")
            with display.level("answers", 4, whole=True) as inner:
                inner(1)
                clock.now_s += 2
                assert display.line().startswith("measure: answers 20 %  about ")
            clock.now_s += 60
            assert display.line().startswith("measure 99 %  longer than planned  62.0 s so far  ")
    unplanned = Display({}, clock)
    with unplanned.level("evaluate"), unplanned.level("model", 3), unplanned.level("block", 9):
        assert unplanned.line().startswith("evaluate, model 0/3  0.0 s so far  ")


def test_loops_that_end_in_another_order() -> None:
    """Two models march side by side: the first to end is not the last that began."""
    display = Display()
    with display.level("run"):
        outer, inner = (display.level(name, 3) for name in ("student", "teacher"))
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
        assert [level.label for level in display.levels] == ["run"]


def test_a_log_hears_of_a_phase_in_which_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line comes by itself after every interval; loops in model/ are on it, and nothing is left
    behind.
    """
    said = list[str]()
    twice = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            twice.set()

    assert progress.EVERY_S == 10
    monkeypatch.setattr(cli, "say", say)
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    assert list(cli.show_progress("block", [7, 8])) == [7, 8]
    assert not said
    with progress.run("prune"):
        for _ in cli.show_progress("block", range(1)):
            assert twice.wait(60)
    assert all(line.startswith("prune, block 0/1  ") for line in said)
    assert not cli.SHOWN
    assert all("beat" not in thread.name for thread in threading.enumerate())


def test_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long, and the time of day; with the weekday where that is another day."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "localtime", time.gmtime)
    assert progress.promise(894.0) == "about 14.9 min, done at 00:14"
    assert progress.promise(90000.0) == "about 25.0 h, done at Friday 01:00"


def test_every_phase_of_a_run_is_told(finished: tuple[Path, Done]) -> None:
    """In a log: what is made, when it is done, memory and folder in the first lines; then a line
    for each phase, and no other time of day.
    """
    out, done = finished
    lines = done.stderr.splitlines()
    first = [line.partition(": ")[0] for line in lines[:6]]
    assert first == ["teacher", "student", "time", "memory", "how", "run folder"], lines[:6]
    assert sum("done at" in line for line in lines) == 1
    names = [r["phase"] for r in run_folder.records(out / run_folder.PHASES) if "phase" in r]
    assert names == [
        "prune",
        "logit store",
        "repair",
        "distil",
        "quantize",
        "distil scales",
        "measure",
    ]
    for name in names:
        # "prune: ...: 0.1 s", but "distil 4/4 ..." and not "distil scales 1/1 ..."
        (_,) = [
            x for x in lines if re.match(rf"{name}(:| \d+/).*: [0-9.]+ m?s$|{name}: [0-9.]+ s$", x)
        ]
    assert json.loads(done.stdout.splitlines()[-1])["run"] == str(out)


def test_a_terminal_has_a_bar(
    tmp_path: Path, flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """Every phase on one line that is drawn over and over, and what goes to stdout is in the file
    that it is.
    """
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "mis_mlx.distill", *flags, "--out", tmp_path / "run"]
    env = {**own_home, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "stdout").open("wb") as out:
        process = subprocess.Popen(list(map(str, line)), env=env, stdout=out, stderr=theirs)
    os.close(theirs)
    drawn = ""
    # the other end is closed
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while part := terminal.read(65536):
            drawn += part.decode(errors="replace")
    assert process.wait() == 0, drawn
    # a narrow terminal breaks lines anywhere
    words = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\s+", " ", drawn)
    for name in ("prune", "repair", "distil", "quantize", "distil scales", "measure"):
        assert re.search(rf"{name}\b[^━]{{,200}}: [0-9.]+ s ", words), name
    # A phase of a tiny model may end between two pictures (ten a second); no run is all between
    # two.
    assert any(" left " in one for one in drawn.split("\x1b[2K"))
    assert "━" in drawn
    assert json.loads((tmp_path / "stdout").read_text().splitlines()[-1])["run"] == str(
        tmp_path / "run"
    )
