"""tests/mutations.toml: every mistake can still be made, and its tests are there."""

from __future__ import annotations

from pathlib import Path

from tests.test_docs import program

ROOT = Path(__file__).parents[1]
PROGRAM = program(ROOT / "scripts" / "mutations.py")


def test_every_mistake_can_be_made() -> None:
    """Its text stands in the package once, where it is named or where it went, and its tests are
    there.
    """
    listed = PROGRAM.mutations()
    assert len(listed) >= 100
    for one in listed:
        assert PROGRAM.place(one, ROOT), one.name
        assert one.tests, one.name
        for name in one.tests:
            assert (ROOT / name.partition("::")[0]).exists(), (one.name, name)
