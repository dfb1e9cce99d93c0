"""The turns of a conversation before a prompt: a JSON list, from a file or standard input."""

import json
import sys
from pathlib import Path
from typing import Any

from mis_mlx.types import MisError

STDIN = "-"
MOST_BYTES = 2**24
FORM = 'a JSON list of {"role": ..., "content": ...}'


def read(source: str) -> list[dict[str, str]]:
    """The turns of a file, or of standard input for "-", oldest first.

    An optional system turn comes first; then user and assistant take turns, and the assistant has
    the last one. MisError for anything else.
    """
    named = "--messages" if source == STDIN else f"--messages {source}"
    try:
        values = json.loads(_text(source))
    except OSError as error:
        raise MisError(f"{named} cannot be read ({error.strerror}): give {FORM}") from None
    except ValueError as error:
        raise MisError(f"{named} is not JSON in UTF-8 ({error}): give {FORM}") from None
    if not isinstance(values, list):
        raise MisError(f"{named} is not a list: give {FORM}")
    turns = []
    for value in values:
        turns.append(_turn(value, named))
    _check_order(turns, named)
    return turns


def _text(source: str) -> str:
    if source == STDIN:
        raw = sys.stdin.buffer.read(MOST_BYTES + 1)
    else:
        with Path(source).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return raw.decode("utf-8")


def _turn(value: Any, named: str) -> dict[str, str]:
    """A turn with its role and its content, and nothing else."""
    role = None
    content = None
    if isinstance(value, dict):
        role = value.get("role")
        content = value.get("content")
    if isinstance(role, str) and isinstance(content, str):
        return {"role": role, "content": content}
    shown = str(value)[:60]
    raise MisError(f"{named}: {shown!r} is not a turn: give {FORM}")


def _check_order(turns: list[dict[str, str]], named: str) -> None:
    """MisError where the roles do not alternate up to an answer."""
    roles = []
    for turn in turns:
        roles.append(turn["role"])
    if roles[:1] == ["system"]:
        roles.pop(0)
    expected = ["user", "assistant"] * (len(roles) // 2)
    if roles != expected:
        said = ", ".join(roles[:6]) or "none"
        why = f"{named} has the roles {said}"
        raise MisError(f"{why}: after an optional system turn give user, assistant, user, ...")
