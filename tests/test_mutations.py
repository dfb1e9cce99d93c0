"""tests/mutations.toml: every mistake can still be made, and its tests are there."""

from __future__ import annotations

from pathlib import Path

from tests.test_docs import program

ROOT = Path(__file__).parents[1]
PROGRAM = program(ROOT / "scripts" / "mutations.py")


def test_every_mistake_can_be_made() -> None:
    """Its text stands in the package once, where it is named or where it went."""
    listed = PROGRAM.mutations()
    assert len(listed) >= 30
    assert [one.name for one in listed if PROGRAM.place(one, ROOT) is None] == []


def test_every_mistake_has_its_tests() -> None:
    """Files and folders that exist."""
    for one in PROGRAM.mutations():
        assert one.tests, one.name
        missing = [name for name in one.tests if not (ROOT / name.partition("::")[0]).exists()]
        assert not missing, (one.name, missing)


def test_a_text_that_stands_twice_is_no_place(tmp_path: Path) -> None:
    """It is found where it went, and not where there are two of it."""
    one = PROGRAM.Mutation(
        name="sign", about="", file="mis_mlx/a.py", find="2 * x", replace="-2 * x", tests=["tests"]
    )
    package = tmp_path / "mis_mlx"
    package.mkdir()
    (package / "b.py").write_text("y = 2 * x\n")
    assert PROGRAM.place(one, tmp_path) == package / "b.py"
    (package / "c.py").write_text("y = 2 * x\n")
    assert PROGRAM.place(one, tmp_path) is None
