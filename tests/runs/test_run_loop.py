"""Where a run's models and data lie, when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mis_mlx import sft
from mis_mlx.runs import run_loop


def test_a_folder_stays_the_one_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder `owner/model` would be a stranger's on the hub."""
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked, _ = run_loop.resumed(sft.Settings(model="owner/model", data="org/set"), frozenset())
    assert asked.model == str(tmp_path / "owner" / "model")
    assert asked.data == "org/set"
