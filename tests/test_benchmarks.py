"""Every program under benchmarks/ starts: it is imported as it is run, and its flags are read
(`mypy` has the rest). tests/mutations.toml: every mistake can still be made, and its tests are
there.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mis_mlx import cli
from tests.conftest import ROOT
from tests.test_docs import program

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_it_starts(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to its first work: --help where it has flags."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(f"started_{path.stem}", path)
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, program)
    spec.loader.exec_module(program)
    assert (
        path.stem in ("laboratory", "mis_texts", "other_quantizers")
        or hasattr(program, "main")
        or hasattr(program, "Settings")
    ), path
    if hasattr(program, "Settings"):
        with pytest.raises(SystemExit) as ended:
            cli.parse(program.Settings, ["--help"])
        assert ended.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_every_mistake_can_be_made() -> None:
    """Its text stands in the package once, where it is named or where it went, and its tests are
    there.
    """
    mutations = program(ROOT / "scripts" / "mutations.py")
    listed = mutations.mutations()
    assert len(listed) >= 100
    for one in listed:
        assert mutations.place(one, ROOT), one.name
        assert one.tests, one.name
        for name in one.tests:
            assert (ROOT / name.partition("::")[0]).exists(), (one.name, name)
