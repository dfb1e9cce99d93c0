"""The table of models: every shape has a source, and the sums of one are those of a pencil. (That
the page says what the file says: tests/test_render.py.)
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mis_mlx.models.architectures import arch
from mis_mlx.models.opening.config import read_config
from tests.test_docs import program

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks/results/linux-x86_64/models.json"
CONFIGS = sorted((ROOT / "benchmarks/model_configs").glob("*.json"))


@pytest.fixture(scope="module")
def models() -> ModuleType:
    """The program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return program(ROOT / "benchmarks/models_table.py")


@pytest.fixture
def stored() -> dict[str, Any]:
    """The results file."""
    found: dict[str, Any] = json.loads(STORED.read_text("utf-8"))
    return found


def test_what_does_not_fit_in_the_least_budget_is_named(stored: dict[str, Any]) -> None:
    """docs/bigger-than-memory.md: how many models fit, and what the others need."""
    page = " ".join((ROOT / "docs/bigger-than-memory.md").read_text("utf-8").split())
    plans = {row["title"]: row["budgets"]["1.8GiB"] for row in stored["rows"].values()}
    assert f"{sum(plan['fits'] for plan in plans.values())} of the [eighteen models]" in page
    for title, plan in plans.items():
        if not plan["fits"]:
            name = title.partition(",")[0].partition(" v")[0]
            assert f"{name} {plan['least_bytes'] / 2**30:.2f}" in page, title


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shape_has_a_source_and_opens(path: Path, models: ModuleType, tmp_path: Path) -> None:
    """It is in the table, says where it is from, and is a config.json as it lies there."""
    assert path.stem in models.ORDER
    model = models.opened(path.stem)
    assert model.title and model.source
    assert all(len(source) > 20 for source in model.source)
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    assert arch.params(read_config(tmp_path)) == arch.params(model.config)


def test_all_rows_are_there(models: ModuleType, stored: dict[str, Any]) -> None:
    """Those of the program, with the sources and the parameters of now."""
    assert tuple(stored["rows"]) == models.ORDER
    for name, row in stored["rows"].items():
        model = models.opened(name)
        assert row["source"] == model.source
        assert row["params"] == arch.params(model.config)


def test_llama_by_pencil(stored: dict[str, Any]) -> None:
    """Llama 3.2 1B: 16 blocks, a tied embedding; with three quarters of the tokens in 4.5 bits."""
    attention = 2 * 2048 * 2048 + 2 * 2048 * 512
    mlp = 3 * 2048 * 8192
    norms = 2 * 2048
    blocks = 16 * (attention + mlp + norms)
    row = stored["rows"]["llama-3.2-1b"]
    assert row["params"] == blocks + 128_256 * 2048 + 2048
    tokens = 96_256  # of 96,192 this is the next multiple of 256
    small = row["students"]["default"]
    assert small["params"] == blocks + tokens * 2048 + 2048
    assert small["bytes"] == int(small["params"] * 4.5 / 8)
    assert small["mode"] == "none" and small["uncut"]


@pytest.mark.slow
def test_a_row_is_made_again(models: ModuleType, stored: dict[str, Any], tmp_path: Path) -> None:
    """The stored plan of a small model is today's, but for answers, which are planned by the
    machine that does it.
    """
    row = models.row(models.opened("qwen3-0.6b"), tmp_path)
    there = dict(stored["rows"]["qwen3-0.6b"])
    for found in (row, there):
        for student in found["students"].values():
            assert student.pop("hours_of_answers")
    assert row == there
