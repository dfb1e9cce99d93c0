"""The README against the code: its commands exist, its tables are files that a command wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mis_mlx.__main__ import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_every_command_is_explained_and_every_explained_one_exists() -> None:
    """One line of the table of commands for each module that a person can run."""
    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(commands())


def test_the_table_is_the_one_that_was_measured() -> None:
    """The README's table of the default run stands, to the letter, in the results folder, with its command."""
    assert (RESULTS / "linux-x86_64" / "distill-default.md").read_text(encoding="utf-8").strip() in README


def test_every_result_names_its_command_and_versions() -> None:
    """A number without the command and the versions that made it is not a result."""
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        script, program = result["command"].split()[:2]
        assert script == "scripts/mis", path
        assert program in commands() or (program.startswith("benchmarks/") and (ROOT / program).is_file()), path
        assert result["mlx"] and result["system"], path
