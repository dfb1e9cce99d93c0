"""What SECURITY.md promises: the tests that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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
