"""The command `quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx import quantize
from mis_mlx.model import load, speak
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done


def test_end_to_end(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """As a user runs it: JSON on the last line, and a folder that stock mlx-lm opens and speaks from."""
    done = command("quantize", "--model", llama.path, "--mlx-path", tmp_path / "q4", "--q-group-size", 32)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    packed = load.open_checkpoint(tmp_path / "q4")
    assert result["nbytes"] == packed.nbytes < llama.nbytes / 4
    assert result["group_size"] == 32 and 4 < result["bits_per_weight"] < 7
    model, tokenizer = speak.open_model(tmp_path / "q4")
    assert isinstance(speak.continuation(model, tokenizer, "The with statement", 4), str)


def test_refusals_write_nothing(tmp_path: Path, llama: Checkpoint) -> None:
    """A quantized input and a width that no group divides."""
    first, second = tmp_path / "q4", tmp_path / "q44"
    quantize.run(quantize.Settings(model=str(llama.path), mlx_path=str(first)))
    with pytest.raises(MisError, match="quantized already"):
        quantize.run(quantize.Settings(model=str(first), mlx_path=str(second)))
    odd = tiny.make(tmp_path / "odd", intermediate_size=760)
    with pytest.raises(MisError, match="rows of 760 weights"):
        quantize.run(quantize.Settings(model=str(odd), mlx_path=str(second)))
    assert not second.exists()


def test_a_budget_too_small_is_a_sentence(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """Refused before work starts, with both numbers and the budget that would do."""
    done = command("quantize", "--model", llama.path, "--mlx-path", tmp_path / "out", "--budget", "100KiB")
    assert done.returncode == 1 and "the budget is 100 KiB: give --budget" in done.stderr
    assert not list(tmp_path.iterdir())
