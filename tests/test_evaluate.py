"""The command `evaluate`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mis_mlx import evaluate
from mis_mlx.model import compare, load
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done


def test_end_to_end(tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]) -> None:
    """A copy of the teacher has no KL and always agrees; a stranger does not; the table has both."""
    copy = shutil.copytree(llama.path, tmp_path / "copy")
    stranger = tiny.make(tmp_path / "stranger", seed=3)
    flags = ("--data", text_folder, "--max-seq-length", 32, "--eval-windows", 3)
    done = command("evaluate", "--teacher", llama.path, "--students", copy, stranger, *flags)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)["held-out"]
    assert found["nll_copy"] == found["nll_teacher"]
    assert abs(found["kl_copy"]) < 1e-5 and found["top1_copy"] == 1.0
    assert found["kl_stranger"] > 0.01 and found["top1_stranger"] < 0.9
    assert "| | teacher | copy | stranger |" in table
    assert any("100.0% ± 0.0%" in line for line in table)


def test_two_students_of_one_name_are_told_apart(tmp_path: Path, llama: Checkpoint, text_folder: Path) -> None:
    """runs/a/model and runs/b/model: neither column overwrites the other, nor the teacher's."""
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        tiny.make(tmp_path / name / "model", seed=seed)
    students = (str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"))
    result = evaluate.run(
        evaluate.Settings(str(llama.path), students, str(text_folder), eval_windows=2, max_seq_length=32)
    )
    losses = {key: value for key, value in result["held-out"].items() if key.startswith("nll_")}
    assert len(set(losses.values())) == 3


def test_another_tokenizer_is_refused(tmp_path: Path, llama: Checkpoint, text_folder: Path) -> None:
    """Token losses of two tokenizers cannot be compared."""
    other = shutil.copytree(llama.path, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    compare.same_vocabulary(llama, load.open_checkpoint(llama.path))
    with pytest.raises(MisError, match="another tokenizer"):
        evaluate.run(evaluate.Settings(str(llama.path), (str(other),), str(text_folder)))


def test_a_budget_too_small_is_a_sentence(llama: Checkpoint, command: Callable[..., Done]) -> None:
    """Refused before work starts, with both numbers and the budget that would do."""
    done = command("evaluate", "--teacher", llama.path, "--students", llama.path, "--budget", "1MiB")
    assert done.returncode == 1 and "the budget is 1 MiB: give --budget" in done.stderr


def test_kld_end_to_end(tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]) -> None:
    """llama.cpp's report on a copy and a stranger: exact zeros, errors beside what has them, a hash of the text."""
    copy = shutil.copytree(llama.path, tmp_path / "copy")
    stranger = tiny.make(tmp_path / "stranger", seed=3)
    flags = ("--data", text_folder, "--max-seq-length", 64, "--eval-windows", 5, "--kld")
    done = command("evaluate", "--teacher", llama.path, "--students", copy, stranger, *flags)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)["held-out"]
    assert found["tokens"] == 5 * 31 and len(found["sha256_tokens"]) == 64
    assert found["mean_kld_copy"] == found["mean_kld_se_copy"] == found["max_kld_copy"] == 0
    assert found["same_top_p_copy"] == 100 and found["ppl_ratio_copy"] == 1
    assert found["mean_kld_stranger"] > found["mean_kld_se_stranger"] > 0 and found["rms_dp_stranger"] > 0
    assert found["ppl_base_copy"] == found["ppl_base_stranger"] == found["ppl_copy"] != found["ppl_stranger"]
    assert "| | copy | stranger |" in table and f"sha256 of the tokens: {found['sha256_tokens']}" in table
    assert any(line.startswith("| Mean KLD, nats | 0.000000 ± 0.000000 |") for line in table)


def test_kld_refusals(llama: Checkpoint, text_folder: Path) -> None:
    """Nothing to compare with; too few tokens for statistics; windows of 512 tokens when nothing is said."""
    with pytest.raises(MisError, match="name the other with --students"):
        evaluate.run(evaluate.Settings(str(llama.path), kld=True))
    few = evaluate.Settings(str(llama.path), (str(llama.path),), str(text_folder), 2, 32, kld=True)
    with pytest.raises(MisError, match="30 tokens lie in the second halves of 2 windows"):
        evaluate.run(few)
    found = evaluate.run(replace(few, eval_windows=1, max_seq_length=None))
    assert found["held-out"]["tokens"] == 255
