"""The README against the code and the results: its commands exist, its numbers are those that a
command wrote.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.__main__ import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = RESULTS / "linux-x86_64" / "distill-default"


def test_every_command_is_explained_and_every_explained_one_exists() -> None:
    """One line of the table of commands for each module that a person can run."""
    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(commands())


def test_the_tables_are_those_that_were_measured() -> None:
    """Every line of the README's tables of the default run stands, to the letter, in the results
    folder.
    """
    measured = DEFAULT.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    section = README.split("## What to expect")[1].split("\n## ")[0].splitlines()
    lines = [line for line in section if line.startswith("|") or " held out, " in line]
    assert len(lines) > 6
    assert set(lines) <= set(measured)


def missing(text: str, found: dict[str, Any]) -> list[str]:
    """The sentences about the default run that `text` lacks, with the numbers of the result
    `found`.
    """
    minutes = found["seconds"] / 60
    wanted = [
        f"{minutes:.0f} minutes on two cores",
        f"{found['bytes_teacher']:.1f} MB become {found['bytes_4-bit']:.1f} MB",
        f"Expected was {found['expected_loss']:.3f}, reached {found['reached_loss']:.3f}",
    ]
    return [words for words in wanted if words not in " ".join(text.split())]


def test_the_sentences_have_the_results_numbers() -> None:
    """Minutes, bytes and losses; another result would be missed."""
    found = json.loads(DEFAULT.with_suffix(".json").read_text(encoding="utf-8"))
    assert missing(README, found) == []
    assert (
        len(missing(README, {**found, "seconds": 60, "bytes_4-bit": 1.0, "reached_loss": 9.0})) == 3
    )


@pytest.mark.parametrize("program", ["scripts/pictures.py", "scripts/python_api.py"])
def test_what_scripts_write_is_what_they_would_write_now(program: str) -> None:
    """The pictures are of the stored run, the pages on Python of the code."""
    done = subprocess.run(
        [sys.executable, ROOT / program, "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_result_names_its_command_and_versions() -> None:
    """A number without the command and the versions that made it is not a result."""
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        script, program = result["command"].split()[:2]
        assert script == "scripts/mis", path
        assert program in commands() or (
            program.startswith("benchmarks/") and (ROOT / program).is_file()
        ), path
        assert result["mlx"] and result["system"], path
