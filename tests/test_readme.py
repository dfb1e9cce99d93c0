"""The README against the code and the results: its commands exist, its numbers are those that a
command wrote.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx.__main__ import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = RESULTS / "linux-x86_64" / "distill-default"


def test_every_command_is_explained_and_every_explained_one_exists() -> None:
    """One line of the quick start's table for each module that a person can run."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(commands())


def test_the_models_are_those_of_the_page() -> None:
    """Published size, result and time of six models, as docs/models.md has them."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    known = {}
    for line in (
        page.split("linux-x86_64/models-default -->")[1].split("<!-- end -->")[0].splitlines()
    ):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        known[cells[0]] = cells
    rows = re.findall(r"^\| (\w[^|]*B) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", README, re.MULTILINE)
    assert len(rows) == 6
    for name, published, result, time in rows:
        _, _, bf16, size, _, whole, *_ = known[name]
        assert (published, result) == (bf16, size)
        number, unit = whole.split()
        minutes = float(number) * (60 if unit == "h" else 1)
        told, told_unit = time.split()
        assert float(told) * (60 if told_unit == "h" else 1) == pytest.approx(minutes, rel=0.05)


def test_the_sentences_have_the_results_numbers() -> None:
    """Minutes, bytes, losses and loops of the default run."""
    found = json.loads(DEFAULT.with_suffix(".json").read_text(encoding="utf-8"))
    for words in (
        f"makes {found['bytes_4-bit']:.1f} MB from {found['bytes_teacher']:.1f} MB",
        f"is {found['reached_loss']:.3f} bits per byte above its teacher",
        f"{found['loops_4-bit']:.0f} % of its answers loop; {found['loops_teacher']:.1f} % of its",
        f"{found['seconds'] / 60:.0f} minutes on two cores",
    ):
        assert words in " ".join(README.split())


def test_the_dialogues_are_those_of_the_stored_run() -> None:
    """Word for word, but for what is left out."""
    page = re.sub(r"<[^>]+>", " ", DEFAULT.with_suffix(".html").read_text(encoding="utf-8"))
    said = " ".join(html.unescape(page).split())
    quoted = " ".join(line[1:].strip() for line in README.splitlines() if line.startswith(">"))
    dialogues = quoted[quoted.index("**Who is") :]
    parts = re.split(r"\[…\]|\*+[^*:]*\*+:?", dialogues)
    parts += re.findall(r"\*\*([^*]+)\*\*", dialogues)
    wanted = [part.strip() for part in parts if part.strip()]
    assert len(wanted) >= 3
    assert [part for part in wanted if part not in said] == []


@pytest.mark.parametrize("program", ["scripts/pictures.py", "scripts/python_api.py"])
def test_what_scripts_write_is_what_they_would_write_now(program: str) -> None:
    """The pictures are of the stored run, the pages on Python of the code."""
    done = subprocess.run(
        [sys.executable, ROOT / program, "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_result_names_its_command_and_versions() -> None:
    """A number without the command and the versions that made it is not a result."""
    files = sorted(RESULTS.rglob("*.json"))
    known = commands()
    assert files
    for path in files:
        result = json.loads(path.read_text())
        script, program = result["command"].split()[:2]
        assert script == "scripts/mis", path
        assert program in known or (
            program.startswith("benchmarks/") and (ROOT / program).is_file()
        ), path
        assert result["mlx"] and result["system"], path
