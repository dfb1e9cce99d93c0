"""scripts/mutations.py: a mistake is made, found where its text went, and taken back; what is
caught, what is not.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_docs import program

ROOT = Path(__file__).parents[1]
TEXT = "def twice(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    """The program."""
    return program(ROOT / "scripts" / "mutations.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of a checkout with one file of code and two of tests."""
    for folder in ("mis_mlx", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mis_mlx" / "a.py").write_text(TEXT)
    (tmp_path / "tests" / "test_a.py").write_text("")
    return tmp_path


def one(mutations: ModuleType, **changes: Any) -> Any:
    """A mistake in `twice`."""
    values: dict[str, Any] = {
        "name": "sign",
        "about": "",
        "file": "mis_mlx/a.py",
        "find": "2 * x",
        "replace": "-2 * x",
        "tests": ["tests/test_a.py"],
    }
    return mutations.Mutation(**(values | changes))


def test_a_text_is_found_where_it_went(mutations: ModuleType, root: Path) -> None:
    """Once in the file, or once in the package; never where there are two of them."""
    assert mutations.place(one(mutations), root) == root / "mis_mlx" / "a.py"
    moved = root / "mis_mlx" / "b.py"
    (root / "mis_mlx" / "a.py").rename(moved)
    assert mutations.place(one(mutations), root) == moved
    (root / "mis_mlx" / "c.py").write_text(TEXT)
    assert mutations.place(one(mutations), root) is None
    caught, why = mutations.verdict(one(mutations), root)
    assert not caught
    assert "does not apply" in why


@pytest.mark.parametrize(
    ("codes", "caught"),
    [
        ([1, 0], True),  # fails with the mistake, passes without
        ([1, 1], False),  # fails without it, too
        ([0], False),
        ([5], False),  # no test was run
    ],
)
def test_what_is_caught(
    mutations: ModuleType,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    caught: bool,
) -> None:
    """By the exit codes of pytest with and without the mistake, which is gone at the end."""
    seen = []
    said = "FAILED tests/test_a.py::test_b - assert 1 == 2"

    def pytest_(root: Path, tests: list[str]) -> tuple[int, str]:
        seen.append(((root / "mis_mlx" / "a.py").read_text(), tests))
        return codes[len(seen) - 1], said

    monkeypatch.setattr(mutations, "pytest", pytest_)
    assert mutations.verdict(one(mutations), root)[0] == caught
    assert seen[0] == (TEXT.replace("2 * x", "-2 * x"), ["tests/test_a.py"])
    assert seen[1:] == [(TEXT, ["tests/test_a.py::test_b"])] * (len(codes) - 1)
    assert (root / "mis_mlx" / "a.py").read_text() == TEXT


def test_a_stop_by_hand_takes_it_back(
    mutations: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the tests."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mutations, "pytest", stopped)
    with pytest.raises(KeyboardInterrupt):
        mutations.verdict(one(mutations), root)
    assert (root / "mis_mlx" / "a.py").read_text() == TEXT
