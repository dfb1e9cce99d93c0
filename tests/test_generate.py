"""The command `generate`: the same text for every budget and draft, and its cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import Done


def last(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_same_text_under_any_budget_and_draft(
    tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]
) -> None:
    """With little memory more bytes are read; with a draft fewer passes are made; the text stays."""
    common = ("--model", llama.path, "--prompt", "if x", "--max-tokens", 12)
    plain = last(command("generate", *common))
    poor = last(command("generate", *common, "--budget", "5MiB"))
    drafted = last(command("generate", *common, "--draft-model", llama.path))
    assert plain["text"] == poor["text"] == drafted["text"] != ""
    assert plain["passes"] == plain["tokens"] == 12 > drafted["passes"]
    assert poor["read_bytes"] > plain["read_bytes"]
    assert drafted["tokens_per_pass"] == round(12 / drafted["passes"], 3)


def test_text_comes_before_the_json(llama: Checkpoint, command: Callable[..., Done]) -> None:
    """What was generated stands on stdout, the JSON line last."""
    done = command("generate", "--model", llama.path, "--prompt", "if x", "--max-tokens", 8)
    assert done.stdout.startswith(last(done)["text"].replace("\ufffd", "")[:3])


def test_refusals_are_sentences(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """A budget too small, nothing to generate, a draft of other tokens; --dry-run only counts."""
    done = command("generate", "--model", llama.path, "--budget", "1MiB")
    assert done.returncode == 1 and "the budget is 1 MiB" in done.stderr
    done = command("generate", "--model", llama.path, "--max-tokens", 0)
    assert done.returncode == 1 and "--max-tokens is 0: give 1 or more" in done.stderr
    other = tiny.make(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    done = command("generate", "--model", llama.path, "--draft-model", other)
    assert done.returncode == 1 and "has another tokenizer" in done.stderr
    dry = command("generate", "--model", llama.path, "--dry-run", "--budget", "1MiB")
    assert dry.returncode == 3 and json.loads(dry.stdout)["peak_bytes"] > 2**20
