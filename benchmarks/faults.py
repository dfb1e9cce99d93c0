"""The fault matrix: runs the tests that make faults, the slow ones too, and writes what became of
every fault.

    scripts/mis benchmarks/faults.py            # an hour or more on 2 cores
    scripts/mis benchmarks/faults.py --quick    # without the slow ones: what they found before is
    kept

The tests themselves note what they saw (tests/faults/conftest.py); this only sorts it. A row that
is noted again replaces the one of before. `--notes FILE`: run nothing, take these. Writes
fault_matrix.json and .md into benchmarks/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from laboratory import RESULTS, ROOT, stored, write

sys.path.insert(0, str(ROOT))  # for the package and the tests
from mis_mlx.reporting.text import markdown_table
from tests.faults import NOTES

NAME = "fault_matrix"
COMMAND = "scripts/mis benchmarks/faults.py"
Row = dict[str, Any]


def merged(before: Iterable[Row], now: Iterable[Row]) -> list[Row]:
    """One row for each fault and command, the last that was noted, in order."""
    rows = {(r["fault"], r["command"]): r for r in [*before, *now]}
    return [rows[key] for key in sorted(rows, key=lambda key: (_natural(key[0]), key[1]))]


def _natural(text: str) -> list[tuple[str, int]]:
    """C2 comes before C10."""
    return [(word, int(digits or 0)) for word, digits in re.findall(r"(\D*)(\d*)", text)]


def counted(ends: Mapping[str, int]) -> str:
    """`590: 581 said so, 9 went on`."""
    most_first = sorted(ends.items(), key=lambda end: -end[1])
    return f"{sum(ends.values()):,}: " + ", ".join(f"{count:,} {end}" for end, count in most_first)


def rendered(found: Mapping[str, Any]) -> str:
    """The matrix as Markdown."""
    said = [r for r in found["rows"] if r["said"]]
    many = [r for r in found["rows"] if not r["said"]]
    where = f"{found['system']}, Python {found['python']}, mlx {found['mlx']}"
    lines = [
        "# The fault matrix",
        "",
        f"`{found['command']}`: {where}. The real commands on a model of 2 layers.",
        "",
        "*Lost or wrong*: something that was said to be safe was not there with its bytes, or the "
        "job that went on",
        "afterwards ended with other bytes than one that nothing happened to.",
    ]
    counts = [[r["fault"], r["command"], counted(r["ends"]), str(r["bad"])] for r in many]
    lines += ["", "## Many times", ""]
    lines += [
        markdown_table(
            ["fault", "command", "cases: how they ended", "lost or wrong"], counts, words=3
        )
    ]
    sentences = []
    for fault in dict.fromkeys(r["fault"] for r in said):
        mine = [r for r in said if r["fault"] == fault]
        sentences.append(
            [fault, ", ".join(r["command"] for r in mine), mine[0]["said"].replace("|", "/")]
        )
    lines += ["", "## What the user reads", ""]
    lines += [markdown_table(["fault", "commands", "the sentence"], sentences, words=3)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, sort, write."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    ask.add_argument("--quick", action="store_true", help="leave the slow tests out")
    ask.add_argument("--notes", type=Path, help="what the tests noted, when they have run already")
    asked = ask.parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        notes = asked.notes or Path(folder) / "notes.jsonl"
        if asked.notes is None:
            argv = [
                ROOT / "scripts" / "mis",
                "test",
                "tests/faults",
                *(() if asked.quick else ("-m", "")),
            ]
            code = subprocess.run(
                argv, cwd=ROOT, env={**os.environ, NOTES: str(notes)}, check=False
            ).returncode
        now = [json.loads(line) for line in notes.read_text("utf-8").splitlines()]
    before = stored(NAME).get("rows", []) if asked.quick else []
    write(NAME, COMMAND, {"rows": merged(before, now)})
    (RESULTS / f"{NAME}.md").write_text(rendered(stored(NAME)), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
