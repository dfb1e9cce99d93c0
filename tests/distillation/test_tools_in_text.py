"""Tools in the text to learn from: prompts, what a teacher makes of them, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.data import preparation, prompts, token_windows
from mis_mlx.distillation import conversations, teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.judge.tasks import tool_tasks
from mis_mlx.models.opening import load
from mis_mlx.models.writing import tool_calls
from mis_mlx.storage.run_folder import records
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done

CALL = {"name": "set_alarm", "arguments": {"time": "06:30"}}
JSON = '{"name": "set_alarm", "arguments": {"time": "06:30"}}'


@pytest.fixture
def calling(tmp_path: Path) -> Checkpoint:
    """A model whose template tells of tools."""
    return load.open_checkpoint(tiny.calling(tmp_path / "calling"))


class Marked:
    """A tokenizer whose model marks its calls."""

    tool_call_start = "<tool_call>"
    tool_call_end = "</tool_call>"

    @staticmethod
    def tool_parser(text: str, _tools: Any) -> Any:
        return json.loads(text)


def test_one_prompt_in_sixteen_has_tools() -> None:
    """The others stay what they are, in their order, and a model without tools gets these alone."""
    plain = prompts.train()
    both = prompts.train(tools=True)
    assert [prompt for prompt in both if not prompt.tools] == plain
    with_tools = [number for number, prompt in enumerate(both) if prompt.tools]
    assert with_tools[:3] == [15, 31, 47]


def test_the_tools_that_judge_are_others() -> None:
    """Else a student would be judged by what it has learned."""
    judged = {tool["function"]["name"] for tool in records(tool_tasks.SETS / "toolbox.jsonl")}
    assert not judged & {tool["function"]["name"] for tool in records(prompts.TOOLBOX)}


def test_calls_stand_apart_from_words_where_the_model_marks_them() -> None:
    """Its template writes them again; what is not marked stays words, and a broken call goes."""
    called = tool_calls.reply(f"Well:\n<tool_call>\n{JSON}\n</tool_call>", Marked(), [])
    assert called is not None
    assert called["content"] == "Well:"
    assert [call["function"] for call in called["tool_calls"]] == [CALL]
    assert tool_calls.reply(JSON, Marked(), []) == {"role": "assistant", "content": JSON}
    assert tool_calls.reply('<tool_call>{"name": ', Marked(), []) is None


def test_the_tokens_of_a_call_are_learned(calling: Checkpoint) -> None:
    """Behind the tools and the question, which are not."""
    tokenizer = load.tokenizer(calling.path)
    prompt = prompts.calling()[0]
    called = {"type": "function", "function": CALL}
    messages = [
        {"role": "user", "content": "Wake me."},
        {"role": "assistant", "content": "", "tool_calls": [called]},
    ]
    row = {"messages": messages, "tools": list(prompt.tools)}
    ids, learned = token_windows.conversation(row, tokenizer, mask_prompt=True)
    own = [token for token, mark in zip(ids, learned, strict=True) if mark]
    assert JSON in tokenizer.decode(own)
    others = [token for token, mark in zip(ids, learned, strict=True) if not mark]
    assert prompt.tools[0]["function"]["name"] in tokenizer.decode(others)


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    """It would leave them out without a word."""
    chat = load.open_checkpoint(tiny.talking(tmp_path / "chat"))
    row = {"messages": preparation.TALK["messages"], "tools": list(prompts.calling()[0].tools)}
    with pytest.raises(MisError, match="this model's chat template knows none"):
        token_windows.conversation(row, load.tokenizer(chat.path), mask_prompt=True)


def test_a_teacher_that_calls_tools_is_asked_to(
    calling: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers come with the tools, and are text to learn from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversations, "FEWEST", 48)
    monkeypatch.setattr(teacher_answers.WritingSettings, "max_tokens", 8)
    source = conversations.source(calling, preparation.Source(), memory.budget(None))
    assert source.answers is not None
    lines = source.answers.read_text("utf-8").splitlines()
    with_tools = [row for row in map(json.loads, lines) if row.get("tools")]
    assert 0 < len(with_tools) <= 3
    asked = {prompt.turns[0] for prompt in prompts.calling()}
    assert all(row["messages"][0]["content"] in asked for row in with_tools)


def test_rows_with_tools_are_left_out_where_nobody_is_told(
    calling: Checkpoint, tmp_path: Path
) -> None:
    """A note says how many; a model that calls tools learns from them; they are no talks that
    choose sizes.
    """
    talk = {"messages": preparation.TALK["messages"]}
    with_tools = {**talk, "tools": list(prompts.calling()[0].tools)}
    text = {"text": "The loop is true if the value of the name is all of them. " * 20}
    folder = tmp_path / "text"
    folder.mkdir()
    for split in preparation.SPLITS:
        others = [{"text": f"{split} {number} {text['text']}"} for number in range(3)]
        lines = [json.dumps(row) for row in (*others, talk, with_tools)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    chat = load.tokenizer(tiny.talking(tmp_path / "chat"))
    noted = "3 conversations with tools are left out"
    kept = preparation.prepare(str(folder), load.tokenizer(calling.path), 16)
    fewer = preparation.prepare(str(folder), chat, 16)
    assert any(note.startswith(noted) for note in fewer.notes)
    assert not any(note.startswith(noted) for note in kept.notes)
    assert len(kept.train.tokens) > len(fewer.train.tokens)
    assert kept.talks == fewer.talks == (talk,)
    (folder / "train.jsonl").write_text(json.dumps(with_tools))
    with pytest.raises(MisError, match="all 1 rows of train have tools"):
        preparation.prepare(str(folder), chat, 16)


def test_fewer_than_four_bits_warn_of_calls(
    calling: Checkpoint, tmp_path: Path, command: Callable[..., Done]
) -> None:
    """Of a model that can call tools, and of no other target."""
    said = {}
    for bits in ("3.75", "4.5"):
        asked = ("--model", calling.path, "--mlx-path", tmp_path / "out", "--target-bpw", bits)
        said[bits] = command("quantize", *asked, "--q-group-size", 32, "--dry-run").stderr
    assert "tool-calls" in said["3.75"]
    assert "tool-calls" not in said["4.5"]
