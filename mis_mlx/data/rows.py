"""Rows of JSON lines: read line by line, judged by the keys that they owe, refused or counted.

Rows of training text are mlx-lm's: {"text"}, {"prompt", "completion"} or {"messages": [{"role",
"content"}, ...]}, the last one perhaps with "tools" and with messages that call them.

Of a text that is too large some rows are drawn (data/row_draw), and only these are parsed, judged
and used.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mis_mlx.data.row_draw import Drawn, drawn
from mis_mlx.types import MisError

# a longer line is dropped unread: one 50 MB row would be 17 million tokens
LINE_LIMIT_BYTES = 4 * 2**20
PROBLEMS_NOTED = 3  # of rows that are skipped
PROBLEMS_LISTED = 10  # of rows that stop a command

Row = dict[str, Any]
Placed = tuple[Row, str]  # and where it stands, for people: "train.jsonl line 3"
Numbered = tuple[int, object, str | None]  # number, value, None; or number, None, why it is no JSON
Line = tuple[int, bytes | None]  # number, what stands there; None: it is too long
Judge = Callable[[object], str | None]  # why a value is no row to use; None: it is one
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
T = TypeVar("T")
# what a row may be, by the keys that make it; the first that fits counts
Shapes = Mapping[str, Sequence[str]]

TEXT: Shapes = {
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    str: "text",
}


class Reading(NamedTuple):
    """The usable rows of training text of one file, and the faults of the others.

    left_out: what was not drawn, in words; empty where all rows were read.
    """

    name: str
    rows: tuple[Row, ...]
    problems: Sequence[str]
    left_out: Sequence[str] = ()

    def notes(self) -> list[str]:
        """Sentences for people: the count, then the first problems as 'file line n: reason'."""
        kept = f"{self.name}: {len(self.rows)} rows kept, {len(self.problems)} dropped"
        notes = [*self.left_out, kept]
        notes += [f"{problem}; skipped" for problem in self.problems[:PROBLEMS_NOTED]]
        unlisted = len(self.problems) - PROBLEMS_NOTED
        if unlisted > 0:
            notes.append(f"{self.name}: {unlisted} more bad rows")
        return notes


def read(path: Path, most_bytes: int | None = None) -> Reading:
    """All usable rows of training text of a .jsonl file, or of those that are `drawn`.

    A byte-order mark, CRLF and blank lines are accepted. MisError where there is no such file.
    """
    if not path.is_file():
        raise MisError(f"{path} is not a regular file: put one JSON object per line into it")
    if most_bytes is None:
        return collect(path.name, "line", parsed(path))
    lines = drawn_lines(path, most_bytes)
    reading = collect(path.name, "line", parsed_lines(lines.items))
    return reading._replace(left_out=lines.note(path.name))


def drawn_lines(path: Path, most_bytes: int) -> Drawn[Line]:
    """Lines of a file that is read once, of which `most_bytes` are held, or WHOLE_BYTES."""
    return drawn(((line, len(line[1] or b"")) for line in _lines(path)), most_bytes)


def collect(name: str, unit: str, numbered: Iterable[Numbered]) -> Reading:
    """Training text out of values, without keys that nothing reads.

    unit: what the numbers count, such as "line".
    """
    good, problems = judged(numbered, f"{name} {unit}", lambda row: fault(row, TEXT))
    return Reading(name, tuple(_bare(row) for row, _ in good), problems)


def judged(
    numbered: Iterable[Numbered],
    where: str,
    judge: Judge,
) -> tuple[list[Placed], list[str]]:
    """(rows without fault, with their places; the faults of the others).

    where: in front of a number, such as "x.jsonl row".
    """
    good: list[Placed] = []
    problems = []
    for number, value, unread in numbered:
        place = f"{where} {number}"
        why = unread or judge(value)
        if why:
            problems.append(f"{place}: {why}")
        elif isinstance(value, dict):
            good.append((value, place))
    return good, problems


def refuse(problems: Sequence[str]) -> None:
    """MisError that lists the problems, where there are any."""
    if problems:
        listed = "; ".join(problems[:PROBLEMS_LISTED])
        unlisted = len(problems) - PROBLEMS_LISTED
        if unlisted > 0:
            listed += f"; and {unlisted} more"
        raise MisError(f"{len(problems)} rows cannot be used: {listed}: fix or remove them")


def shape_of(row: Mapping[str, Any], shapes: Shapes) -> str | None:
    """The first of `shapes` whose keys the row has."""
    for shape, keys in shapes.items():
        if all(key in row for key in keys):
            return shape
    return None


def fault(row: object, shapes: Shapes) -> str | None:
    """Why `row` is none of `shapes`; None when it is one. Keys, texts and messages are judged."""
    if not isinstance(row, dict):
        return f"{_kind(row)}, not an object"
    shape = shape_of(row, shapes)
    if shape is None:
        keys = ", ".join(ascii(key)[:40] for key in list(row)[:4]) or "none"
        wanted = " nor ".join(" and ".join(map(repr, keys)) for keys in shapes.values())
        return f"has {'no' if len(shapes) == 1 else 'neither'} {wanted} (its keys: {keys})"
    if shape == "messages":
        return _tools_fault(row.get("tools")) or _messages_fault(row["messages"])
    for key in shapes[shape]:
        why = None if key == "options" else text_fault(key, row[key])
        if why:
            return why
    return None


def _messages_fault(messages: object) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {_kind(messages)}, not a list with at least one message"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is {_kind(message)}, not an object"
        calls = message.get("tool_calls")
        reason = _calls_fault(calls)
        if reason:
            return f"message {number}: {reason}"
        for key in ("role", "content"):
            value = message.get(key)
            if key == "content" and calls and value == "":
                continue
            reason = text_fault(key, value)
            if reason:
                return f"message {number}: {reason}"
        if message["role"] not in ROLES:
            return f"message {number}: 'role' is {ascii(message['role'])[:40]}, none of {ROLES}"
    return None


def _tools_fault(tools: object) -> str | None:
    """Why a row's tools are not what chat templates take; None: they are, or there are none."""
    if not tools:
        return None
    if not isinstance(tools, list):
        return f"'tools' is {_kind(tools)}, not a list"
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"tool {number} is not {{'type': 'function', 'function': {{'name': ...}}}}"
    return None


def _calls_fault(calls: object) -> str | None:
    """Why a message's calls are not what chat templates take; None as in `_tools_fault`."""
    if not calls:
        return None
    if not isinstance(calls, list):
        return f"'tool_calls' is {_kind(calls)}, not a list"
    for number, call in enumerate(calls, 1):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"call {number} is not {{'function': {{'name': ..., 'arguments': ...}}}}"
        if not isinstance(function.get("arguments"), dict):
            given = _kind(function.get("arguments"))
            return f"the arguments of call {number} are {given}, not an object"
    return None


def text_fault(key: str, value: object) -> str | None:
    """Why `value` is no text to use, or None when it is; `key` names it in the sentence."""
    if not isinstance(value, str):
        return f"'{key}' is {_kind(value)}, not text"
    if not value.strip():
        return f"'{key}' is empty"
    if "\0" in value:
        return f"'{key}' holds a NUL character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"'{key}' holds half a surrogate pair (\\u{ord(value[error.start]):04x})"
    return None


def _kind(value: object) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    return _KINDS.get(type(value), "an object")


def _bare(row: Row) -> Row:
    keys = TEXT[shape_of(row, TEXT) or "text"]
    bare = {key: row[key] for key in keys}
    if "messages" in bare:
        bare["messages"] = []
        for message in row["messages"]:
            kept = {"role": message["role"], "content": message["content"]}
            for key in ("tool_calls", "name", "tool_call_id"):
                if message.get(key) and (key == "tool_calls" or message["role"] == "tool"):
                    kept[key] = message[key]
            bare["messages"].append(kept)
        if row.get("tools"):
            bare["tools"] = row["tools"]
    return bare


def parsed(path: Path) -> Iterator[Numbered]:
    """Every line that is not blank; one over the limit is never held whole.

    MisError when the disk fails.
    """
    return parsed_lines(_lines(path))


def parsed_lines(lines: Iterable[Line]) -> Iterator[Numbered]:
    """The values of lines."""
    for number, line in lines:
        if line is None:
            yield number, None, f"longer than {LINE_LIMIT_BYTES} bytes"
        else:
            yield number, *_value(line.rstrip(b"\r\n"))


def _lines(path: Path) -> Iterator[Line]:
    """As `parsed`, before anything is parsed."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT_BYTES + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(2**16)) and not rest.endswith(b"\n"):
                        pass
                    yield number, None
                elif line.strip():
                    yield number, line
    except OSError as error:
        raise MisError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions"
        ) from error


def _value(line: bytes) -> tuple[object, str | None]:
    """(its value, None) or (None, why it has none)."""
    try:
        return json.loads(line.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start + 1})"
    except RecursionError:
        return None, "not valid JSON (nested too deeply)"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg}, column {error.colno})"
    except ValueError:
        return None, "not valid JSON (a number with thousands of digits)"


def split_off(items: Sequence[T], keys: Sequence[str]) -> tuple[list[T], list[T]]:
    """(the others, a tenth of the items by hash of their keys; equal keys stay together).

    Nothing is held out where no others were left. keys: hashes in hex.
    """
    held = {key for key in keys if int(key[:8], 16) % 10 == 0} or {min(keys)}
    if held.issuperset(keys):
        return list(items), []
    others = []
    held_out = []
    for item, key in zip(items, keys, strict=True):
        if key in held:
            held_out.append(item)
        else:
            others.append(item)
    return others, held_out
