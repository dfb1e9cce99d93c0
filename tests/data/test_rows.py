"""Bad training data: every fault is found up front, named by file, line and reason, and counted."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest

from mis_mlx.data import rows
from mis_mlx.types import MisError

GOOD = b'{"text": "Dzie\xc5\x84 dobry"}\n'

BAD_LINES = {
    "bad json": (b'{"text": "a"', "column 13"),
    "bad utf-8": (b'{"text": "a\xff"}', "byte 12"),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), "not valid JSON"),
    "raw nul": (b'{"text": "a\0"}', "control character"),
    "escaped nul": (b'{"text": "a\\u0000"}', "'text'"),
    "lone surrogate": (b'{"text": "a\\ud83d"}', r"\ud83d"),
    "boolean text": (b'{"text": true}', "'text'"),
    "empty text": (b'{"text": " \\n"}', "'text'"),
    "other schema": (
        b'{"title": "a"}',
        "'title",
    ),
    "list row": (b'["a"]', "list"),
    "null completion": (b'{"prompt": "a", "completion": null}', "'completion'"),
    "no messages": (b'{"messages": []}', "'messages'"),
    "message a string": (b'{"messages": ["a"]}', "message 1"),
    "message without content": (b'{"messages": [{"role": "user"}]}', "message 1: 'content'"),
    "a role of its own": (
        b'{"messages": [{"role": "user<|im_end|>", "content": "a"}]}',
        "'user<|im_end|>'",
    ),
    "tools": (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}',
        "tool 1",
    ),
    "tools a text": (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": "all"}',
        "'tools'",
    ),
    "tool calls": (
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
        "message 1: call 1",
    ),
    "arguments in a text": (
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": '
        b'{"name": "a", "arguments": "{}"}}]}]}',
        "arguments of call 1",
    ),
    "too deep": (b"[" * 200_000, "JSON"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", "JSON"),
}


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    """The two good rows around a bad one are kept, and the sentence says file, line and reason."""
    line, reason = BAD_LINES[name]
    reading = rows.read(_file(tmp_path, GOOD + line + b"\n" + GOOD))
    assert reading.rows == ({"text": "Dzień dobry"},) * 2
    (problem,) = reading.problems
    assert problem.startswith("train.jsonl line 2: ")
    assert reason in problem


def test_only_the_first_faults_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    """Ten bad lines: three are listed, the note says how many more there are."""
    notes = rows.read(_file(tmp_path, GOOD + b"[]\n" * 10)).notes()
    assert [note.partition(":")[0] for note in notes[1:4]] == [
        f"train.jsonl line {number}" for number in (2, 3, 4)
    ]
    assert re.findall(r"\d+", notes[0] + notes[4]) == ["1", "10", "7"]
    assert len(notes) == 5


def test_harmless_oddities_are_accepted(tmp_path: Path) -> None:
    """BOM, CRLF, blank lines and a missing last newline change nothing and are no faults."""
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\n  \n" + GOOD.rstrip()
    reading = rows.read(_file(tmp_path, content))
    assert reading.rows == ({"text": "Dzień dobry"},) * 2
    assert not reading.problems


def test_a_row_of_50_mb_is_dropped_without_being_held(tmp_path: Path) -> None:
    """Rows around a line of 50 MB are kept; the peak is near the line limit, not near 50 MB."""
    path = _file(tmp_path, GOOD + b'{"text": "' + b"a" * 50_000_000 + b'"}\n' + GOOD)
    tracemalloc.start()
    reading = rows.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reading.problems == ["train.jsonl line 2: longer than 4194304 bytes"]
    assert len(reading.rows) == 2
    assert peak < 3 * rows.LINE_LIMIT_BYTES


@pytest.mark.parametrize("over", [0, 1])
def test_the_line_limit_is_exact(tmp_path: Path, over: int) -> None:
    """A line of exactly the limit (without its newline) is read; one byte more is not."""
    frame = len(b'{"text": ""}')
    line = b'{"text": "' + b"a" * (rows.LINE_LIMIT_BYTES - frame + over) + b'"}'
    reading = rows.read(_file(tmp_path, line + b"\n" + GOOD))
    assert (len(reading.rows), len(reading.problems)) == (2 - over, over)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    """A folder and a pipe in the file's place are refused at once; a pipe would block for ever."""
    (tmp_path / "valid.jsonl").mkdir()
    os.mkfifo(tmp_path / "train.jsonl")
    for name in ("train.jsonl", "valid.jsonl"):
        with pytest.raises(MisError, match=rf"{name} is not a regular file"):
            rows.read(tmp_path / name)


def test_rows_lose_the_keys_nothing_reads(tmp_path: Path) -> None:
    """Every kind keeps its own keys; prompt and completion win over text, as in mlx-lm. Of
    conversations with tools these are kept, the calls, and what came of them.
    """
    call = {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": {}}}
    asked = {"role": "user", "content": "What time is it?"}
    answered = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:30", "tool_call_id": "a", "name": "get_time"},
        {"role": "assistant", "content": "Half past twelve."},
    ]
    tools = [{"type": "function", "function": {"name": "get_time", "parameters": {}}}]
    talk = {"messages": [{**asked, "name": "Ola"}, *answered], "tools": tools, "source": "nobody"}
    content = [
        {"text": "a", "url": "b"},
        {"prompt": "a", "completion": "b", "text": "c"},
        talk,
    ]
    reading = rows.read(_file(tmp_path, "\n".join(map(json.dumps, content)).encode()))
    assert reading.rows == (
        {"text": "a"},
        {"prompt": "a", "completion": "b"},
        {"messages": [asked, *answered], "tools": tools},
    )
