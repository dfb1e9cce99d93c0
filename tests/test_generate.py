"""The command `generate`: the same text for every budget and draft, and its cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.models.opening import load
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
    assert plain["read_bytes"] == load.open_checkpoint(deep).nbytes
    assert plain["peak_bytes"] < plain["budget_bytes"]
    # A GPU also holds what commands in flight need.
    little = 9 * 2**20 if precision.policy() == "metal" else 6.7 * 2**20
    budget = memory.needed_bytes(int(little))
    poor = last_line(command("generate", *common, "--budget", budget))
    drafted = last_line(command("generate", *common, "--draft-model", deep))
    assert done.stdout.startswith(plain["text"])
    assert plain["text"] == poor["text"] == drafted["text"] != ""
    assert plain["passes"] == plain["tokens"] == 12 > drafted["passes"]
    assert poor["read_bytes"] > plain["read_bytes"]
    assert drafted["tokens_per_pass"] == round(12 / drafted["passes"], 3)


TURNS = [
    {"role": "user", "content": "What is if?"},
    {"role": "assistant", "content": "A word."},
]


def test_turns_before_the_prompt(
    tmp_path: Path, command: Callable[..., Done], brief_look: None
) -> None:
    """The model continues what its template makes of them, written out by hand here."""
    talker = tiny.talking(tmp_path / "talker")
    file = tmp_path / "turns.json"
    file.write_text(json.dumps(TURNS))
    common = ("--model", talker, "--max-tokens", 8)
    prompt = ("--prompt", "And for?")
    talk = (*prompt, "--messages", file)
    answered = last_line(command("generate", *common, *talk))
    end = "<|endoftext|>"
    rendered = f"user\nWhat is if?{end}\nassistant\nA word.{end}\nuser\nAnd for?{end}\nassistant\n"
    plain = ("--ignore-chat-template", "--prompt", rendered)
    continued = last_line(command("generate", *common, *plain))
    alone = last_line(command("generate", *common, *prompt))
    assert answered["text"] == continued["text"]
    assert answered["prompt_tokens"] == continued["prompt_tokens"] > alone["prompt_tokens"]
    assert answered["context_tokens"] == 512


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "turns.json"),
        (b"\xff", "turns.json"),
        (b"{}", "turns.json"),
        (b'["hello"]', "'hello'"),
        (b'[{"role": "user", "content": 3}]', "turns.json"),
        (json.dumps(TURNS[:1]).encode(), "roles user"),
        (json.dumps(TURNS[::-1]).encode(), "roles assistant, user"),
    ],
)
def test_turns_that_are_none(
    content: bytes | None,
    said: str,
    tmp_path: Path,
    command: Callable[..., Done],
    llama: Checkpoint,
) -> None:
    """Each is refused with a sentence that says the form."""
    file = tmp_path / "turns.json"
    if content is not None:
        file.write_bytes(content)
    flags = ("--model", llama.path, "--messages", file)
    assert said in sentence(command("generate", *flags))


def test_nothing_is_cut(tmp_path: Path, command: Callable[..., Done], llama: Checkpoint) -> None:
    """A context of 512 tokens; a model without a template takes no turns."""
    file = tmp_path / "turns.json"
    file.write_text(json.dumps(TURNS))
    talker = tiny.talking(tmp_path / "talker")
    turns = ("--prompt", "if", "--messages", file)
    common = ("generate", *turns, "--model", talker, "--max-tokens")
    short = last_line(command(*common, 4))
    room = 512 - short["prompt_tokens"]
    refusal = sentence(command(*common, room + 1))
    assert set(map(str, (short["prompt_tokens"], room + 1, 512))) <= set(
        re.findall(r"\d+", refusal)
    )
    assert command(*common, room, "--dry-run").returncode == 0
    assert "--messages" in sentence(command("generate", *turns, "--model", llama.path))
