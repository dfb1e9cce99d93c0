"""The calls of tools in what a model has written, by what stands there.

A model whose calls mlx-lm can read is read by mlx-lm's own parser, as its server would. Anything
else is looked through for JSON: [TOOL_CALLS] of Mistral, Llama's {"name", "parameters"}, a fenced
block, or the bare object.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NAMES = ("arguments", "parameters")
Call = dict[str, Any]  # {"name", "arguments"}


def read(text: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> list[Call] | None:
    """The calls in a text, [] where it makes none; None where one is begun that cannot be read.

    tools: as `chat_template.text` takes them.
    """
    start = getattr(tokenizer, "tool_call_start", None)
    if start and start in text and tokenizer.tool_parser:
        return _by_mlx_lm(text, tokenizer, tools)
    return _by_json(text)


def reply(text: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a model has written as a message of a conversation; None for a call that is broken.

    Calls between the model's own marks stand apart from the text, so that its template writes them
    again; others stay what they are, words.
    """
    calls = read(text, tokenizer, tools)
    if calls is None:
        return None
    start = getattr(tokenizer, "tool_call_start", None)
    if not calls or not start or start not in text:
        return {"role": "assistant", "content": text}
    return message(calls, text.partition(start)[0].strip())


def message(calls: Sequence[Mapping[str, Any]], before: str = "", first: int = 0) -> dict[str, Any]:
    """An answer that makes these calls behind the text `before`. first: number of the first one."""
    called = []
    for number, call in enumerate(calls, first):
        name = f"call{number:05d}"  # Mistral's templates want nine characters
        called.append({"id": name, "type": "function", "function": call})
    return {"role": "assistant", "content": before, "tool_calls": called}


def _by_mlx_lm(text: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> list[Call] | None:
    """As `read`, by the parser of the model's own marks."""
    calls = []
    for part in text.split(tokenizer.tool_call_start)[1:]:
        end = tokenizer.tool_call_end
        inner = part.split(end)[0] if end else part
        try:
            found = tokenizer.tool_parser(inner, [dict(tool) for tool in tools])
        except Exception:  # what a parser raises on a broken call is its own affair
            return None
        for value in found if isinstance(found, list) else [found]:
            call = _call(value)
            if call is None:
                return None
            calls.append(call)
    return calls


def _by_json(text: str) -> list[Call] | None:
    """As `read`, from the JSON objects in a text. Others than calls are words of the model's."""
    calls = []
    broken = False
    for value in _objects(text):
        if value is None:
            broken = True
            continue
        call = _call(value)
        if call is not None:
            calls.append(call)
    return None if broken and not calls else calls


def _objects(text: str) -> Iterator[Any]:
    """The JSON objects in a text as far as they may name something; None for one that breaks off,
    behind which nothing is read: what a text of n characters takes grows with n, not with n².
    """
    decoder = json.JSONDecoder()
    last = text.rfind('"name"')
    place = text.find("{")
    while 0 <= place <= last:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            yield None
            return
        yield value
        place = text.find("{", end)


def _call(value: Any) -> Call | None:
    """A call from a JSON value; None where it is none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = {}
    for key in NAMES:
        if key in value:
            arguments = value[key]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return {"name": value["name"], "arguments": arguments}
