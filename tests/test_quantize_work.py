"""`quantize` says first what it takes, and how it goes on; a finished work is only moved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx import quantize
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line, sentence

BRIEF = ("--num-samples", 8, "--max-seq-length", 32)
STEPS = ("--q-iters", 12, "--save-every", 2)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six blocks."""
    return tiny.make(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=6)


@pytest.fixture(scope="module")
def asked(
    deep: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[object, ...]:
    """Flags of a rounding by GPTQ in measured bits, whose scales then learn from a wide model."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 2048}
    wide = tiny.make(tmp_path_factory.mktemp("models") / "wide", num_hidden_layers=6, **sizes)
    return ("--model", deep, "--teacher", wide, "--data", text_folder, *BRIEF, *STEPS)


def test_a_dry_run_says_what_it_takes(
    tmp_path: Path, asked: tuple[object, ...], in_process: Callable[..., Done]
) -> None:
    """The phases, in their order; what the teacher says goes to disk."""
    place = ("--mlx-path", tmp_path / "out", "--budget", "1GiB")
    plan = last_line(in_process("quantize", *asked, *place, "--dry-run", cwd=tmp_path))
    assert list(plan["phases"]) == ["quantize", "logit store", "distil scales"]
    assert 0 < plan["peak_bytes"] <= plan["budget_bytes"]
    assert plan["disk_bytes"] > 0


def test_a_budget_without_room_for_a_block_names_one_that_has(
    tmp_path: Path, asked: tuple[object, ...], in_process: Callable[..., Done]
) -> None:
    """The budget of the sentence is enough."""
    flags = ("quantize", *asked, "--mlx-path", tmp_path / "out")
    said = sentence(in_process(*flags, "--budget", "6MiB"))
    enough = re.findall(r"--budget (\w+)", said)[-1]
    assert in_process(*flags, "--budget", enough, "--dry-run").returncode == 0


def test_a_result_that_was_not_put_in_its_place(tmp_path: Path, llama: Checkpoint) -> None:
    """Killed between the end of the work and the move: --resume only moves it, elsewhere too, and
    onto nothing.
    """
    out = tmp_path / "out"
    work = tmp_path / "out-unfinished"
    plain = {"q_method": "round", "target_bpw": None}
    settings = quantize.Settings(model=str(llama.path), mlx_path=str(out), **plain)
    first = quantize.run(settings)
    work.mkdir()
    run_folder.begin(work, settings.given, {}, DISK)
    (work / run_folder.RESULT).write_text(json.dumps(first))
    out.rename(work / quantize.MODEL)
    out.mkdir()
    with pytest.raises(MisError, match="exists already"):
        quantize.run(quantize.Settings(mlx_path=str(out), resume=True))
    out.rmdir()
    elsewhere = tmp_path / "elsewhere"
    moved = quantize.Settings(out=str(work), mlx_path=str(elsewhere), resume=True)
    assert quantize.run(moved) == {**first, "mlx_path": str(elsewhere)}
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
