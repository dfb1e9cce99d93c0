"""What SECURITY.md promises: the tests it names exist, and the fault matrix says that none
failed.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "linux-x86_64"
SECURITY = (ROOT / "SECURITY.md").read_text("utf-8")


def exists(test: str) -> bool:
    """Whether `path::name` is a test of this checkout."""
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file():
        return False
    return any(
        isinstance(n, ast.FunctionDef) and n.name == name
        for n in ast.parse((ROOT / path).read_text("utf-8")).body
    )


def named(text: str) -> list[str]:
    """The tests that a text names: `tests/x/test_y.py::test_z`."""
    return re.findall(r"tests/[\w/]+\.py::\w+", text)


def test_every_promise_names_a_test_that_exists() -> None:
    """Five threats, each with a promise, tests and what is not promised."""
    rows = [line.strip("|").split("|") for line in SECURITY.splitlines() if line.startswith("| **")]
    assert len(rows) == 5
    for threat, promised, shown, missing in rows:
        assert promised.strip() and missing.strip() and named(shown), threat
    assert not [t for t in named(SECURITY) if not exists(t)]


def test_a_test_that_does_not_exist_is_found_out() -> None:
    """A test of the test: another file, another name."""
    assert exists("tests/faults/test_promises.py::test_every_promise_names_a_test_that_exists")
    assert not exists("tests/faults/test_promises.py::test_everything_is_fine")
    assert not exists("tests/faults/test_nothing.py::test_every_promise_names_a_test_that_exists")
    assert named("so `tests/a/test_b.py::test_c` and tests/x.py") == ["tests/a/test_b.py::test_c"]


def test_the_matrix_is_whole_and_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lost or wrong in it, as many cases as was promised, and the Markdown is what the rows
    give.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import faults

    found = json.loads((RESULTS / "fault_matrix.json").read_text("utf-8"))
    rows = found["rows"]
    assert not [r for r in rows if r["bad"]]
    cases = {"killed": 0, "power cut": 0, "refused": 0, "read": 0}
    for row in rows:
        if "at every operation" not in row["fault"]:
            for end in cases.keys() & row["ends"].keys():
                cases[end] += row["ends"][end]
    assert cases["killed"] >= 300
    assert cases["power cut"] >= 2000
    assert cases["refused"] + cases["read"] >= 20_000
    every = {(r["fault"], r["command"]) for r in rows if "at every operation" in r["fault"]}
    assert len(every) == 20  # ten jobs; the disk refuses, the process ends
    assert (RESULTS / "fault_matrix.md").read_text("utf-8") == faults.rendered(found)
    for name in ("faults", "laboratory"):
        sys.modules.pop(name, None)
