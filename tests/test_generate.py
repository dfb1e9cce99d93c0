"""The command `generate`: the same text for every budget and draft, and its cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mis_mlx.models import load, policy
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import Done, last_line, sentence


def test_the_same_text_under_any_budget_and_draft(
    tmp_path: Path, command: Callable[..., Done]
) -> None:
    """A model that fits is read once; with little memory more bytes are read; with a draft fewer
    passes are made; the text, first on stdout, stays.
    """
    deep = tiny.make(tmp_path / "deep", num_hidden_layers=24)
    common = ("--model", deep, "--prompt", "if x", "--max-tokens", 12)
    done = command("generate", *common)
    plain = last_line(done)
    assert "the whole model is in memory" in done.stderr
    assert plain["read_bytes"] == load.open_checkpoint(deep).nbytes
    assert plain["peak_bytes"] < plain["budget_bytes"]
    # A GPU also holds what commands in flight need.
    little = "11MiB" if policy.name() == "metal" else "8MiB"
    poor = last_line(command("generate", *common, "--budget", little))
    drafted = last_line(command("generate", *common, "--draft-model", deep))
    assert done.stdout.startswith(plain["text"])
    assert plain["text"] == poor["text"] == drafted["text"] != ""
    assert plain["passes"] == plain["tokens"] == 12 > drafted["passes"]
    assert poor["read_bytes"] > plain["read_bytes"]
    assert drafted["tokens_per_pass"] == round(12 / drafted["passes"], 3)


def test_refusals_are_sentences(
    tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]
) -> None:
    """A budget too small, nothing to generate, a draft of other tokens; --dry-run only counts."""

    def refused(*flags: object) -> str:
        return sentence(command("generate", "--model", llama.path, *flags))

    assert "the budget is 1 MiB" in refused("--budget", "1MiB")
    assert "--max-tokens is 0: give 1 or more" in refused("--max-tokens", 0)
    other = tiny.make(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    assert "has a different tokenizer" in refused("--draft-model", other)
    dry = command("generate", "--model", llama.path, "--dry-run", "--budget", "1MiB")
    assert dry.returncode == 3
    assert last_line(dry)["peak_bytes"] > 2**20
