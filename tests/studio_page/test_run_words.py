"""What the page says of a run, from its folder: before its plan, in a phase, and finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mis_mlx.reporting import run_reader
from mis_mlx.size_search import size_request
from mis_mlx.storage import run_folder
from mis_mlx.studio_page import run_panel, runs
from mis_mlx.studio_page.wishes import Wishes

RESULT = {
    "bytes_teacher": 269.03,
    "bytes_4-bit": 67.905,
    "bytes_distilled": 254.9,
    "answers_excess_4-bit": 0.084,
    "loops_4-bit": 20.0,
    "loops_teacher": 13.3,
    "answers_prompts": 2,
    "languages": {"German": 0.31, "French": 0.2},
}
PLANNED = [{"phase": name, "seconds": 10.0} for name in ("vocabulary", "quantize", "measure")]


def lines(path: Path, *records: Mapping[str, Any]) -> None:
    """A log of these records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that another terminal has begun."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine-001"
    folder.mkdir(parents=True)
    (folder / run_folder.ASKED).write_text("{}\n")
    return folder


def test_the_default_loss_is_that_of_distill() -> None:
    """The slider begins where the command does."""
    assert Wishes().loss == size_request.DEFAULT_LOSS


def test_a_run_that_searches_is_shown(run: Path) -> None:
    """Listed from its first second; how many measurements its search has."""
    (listed,) = runs.listed()
    assert run_panel.story_of(listed) is None
    assert "before its first phase" in run_panel.search_words(listed)
    (run / run_folder.SEARCH).mkdir()
    lines(run / run_folder.SEARCH / "probes.jsonl", {"a": 1}, {"a": 2})
    assert run_panel.search_words(listed) == "searching for sizes: 2 measurements so far"


def test_the_phase_at_work_is_marked(run: Path) -> None:
    """The first one without a record; in a run that was stopped, none."""
    lines(
        run / run_folder.PHASES,
        {"wall_s": 1.0, "planned": PLANNED},
        {"wall_s": 2.0, "phase": "vocabulary", "seconds": 9.0, "peak_bytes": 1},
    )
    story = run_reader.read(run)
    working = run_panel.phase_words(story, running=True).splitlines()
    assert [line.split()[:2] for line in working[1:]] == [
        ["vocabulary", "9.0"],
        ["quantize", "now"],
        ["measure", "–"],
    ]
    assert "now" not in run_panel.phase_words(story)


def test_a_finished_run_says_what_came_of_it(run: Path) -> None:
    """Size, loss, loops, and one prompt with both answers."""
    (run / run_folder.RESULT).write_text(json.dumps(RESULT))
    (run / run_folder.CONFIG).write_text(yaml.safe_dump({"lose": 0.1}))
    rows = []
    for prompt in ("Hello?", "Bye?"):
        for model, text in (("teacher", "Good day."), ("4-bit", "Hi.")):
            rows.append({"prompt": prompt, "model": model, "text": text, "ended": True})
    lines(run / run_folder.ANSWERS, *rows)
    said = run_panel.result_words(run_reader.read(run))
    assert said.splitlines() == [
        "269.0 → 67.9 MB. Loss on the teacher's answers +0.084 bits per byte (target 0.100: "
        "reached). Loops 20 % (teacher 13 %).",
        "",
        "With fewer tokens, in languages that the text may lack: German +0.310, French +0.200 bits "
        "per byte; give --data in yours.",
        "",
        "> Hello?",
        "",
        "teacher: Good day.",
        "",
        "student: Hi.",
    ]
    (run / run_folder.RESULT).write_text("{}")
    assert run_panel.result_words(run_reader.read(run)) == ""
