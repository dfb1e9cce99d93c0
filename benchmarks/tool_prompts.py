"""Write the built-in tools and the prompts that ask for them anew.

    scripts/mis benchmarks/tool_prompts.py

Seconds. The files come out as they are in the checkout, to the byte, unless prompt_texts/tools.py
was changed. Those that judge a model and those that it learns from share no tool and no sentence.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_texts.tools import (
    JUDGE,
    JUDGE_NONE,
    JUDGE_NONE_WORDS,
    LEARN,
    LEARN_NONE,
    LEARN_NONE_WORDS,
    OPENINGS,
    TWO,
    Tool,
)
from prompts import SLOT, pick
from task_files import write

from mis_mlx.data import prompts
from mis_mlx.judge.tasks import tool_tasks

KINDS = ("required", "optional", "none", "required", "two")
SINGLE = 400  # prompts that judge
TALKS = 20  # conversations of ROUNDS calls
ROUNDS = 10
LEARNED = 320  # prompts to learn from
OFFERED = 3  # tools of a prompt
IN_TALK = 5  # tools of a conversation
TRIES = 200


def schema(name: str, tool: Tool) -> dict[str, Any]:
    """The tool as chat templates take it."""
    properties = {}
    for argument, (kind, description, more) in tool.arguments.items():
        properties[argument] = {"type": kind, "description": description, **more}
        if argument in tool.defaults:
            properties[argument]["default"] = tool.defaults[argument]
    parameters = {"type": "object", "properties": properties, "required": list(tool.needed)}
    function = {"name": name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def asked(
    rng: random.Random, name: str, tool: Tool, phrases: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """(what somebody says, the call that they want)."""
    phrase = pick(rng, phrases)
    arguments = {}
    for slot in SLOT.findall(phrase):
        said = pick(rng, list(tool.slots[slot]))
        phrase = phrase.replace(f"{{{slot}}}", said)
        arguments[slot] = tool.slots[slot][said]
    return phrase, {"name": name, "arguments": arguments}


def offered(rng: random.Random, names: Sequence[str], tools: Mapping[str, Tool]) -> list[str]:
    """OFFERED tools in drawn order, these among them."""
    others = [name for name in tools if name not in names]
    chosen = list(names)
    while len(chosen) < OFFERED:
        chosen.append(others.pop(int(rng.random() * len(others))))
    return sorted(chosen, key=lambda _: rng.random())


class Source:
    """Tools, and sentences that need none."""

    def __init__(
        self,
        tools: Mapping[str, Tool],
        none: Sequence[str],
        words: Mapping[str, Sequence[str]],
        seed: int,
    ):
        self.tools = tools
        self.none = none
        self.words = words
        self.rng = random.Random(seed)
        self.number = 0
        self.seen = set[str]()

    def _next_tool(self, *, optional: bool = False) -> str:
        """The tools in turn; optional: those whose phrases have optional arguments."""
        names = [name for name, tool in self.tools.items() if tool.more or not optional]
        self.number += 1
        return names[self.number % len(names)]

    def _one(self, *, optional: bool = False) -> tuple[str, dict[str, Any]]:
        """A phrase and its call."""
        name = self._next_tool(optional=optional)
        tool = self.tools[name]
        return asked(self.rng, name, tool, tool.more if optional else tool.plain)

    def row(self, kind: str) -> dict[str, Any]:
        """A prompt of this kind, with the tools that it offers and the calls that it wants."""
        calls = []
        if kind == "none":
            text = pick(self.rng, self.none)
            for slot in SLOT.findall(text):
                text = text.replace(f"{{{slot}}}", pick(self.rng, self.words[slot]))
        elif kind == "two":
            first, call = self._one()
            second, other = self._one()
            calls = [call, other]
            text = pick(self.rng, TWO).format(first, second)
        else:
            phrase, call = self._one(optional=kind == "optional")
            calls = [call]
            text = pick(self.rng, OPENINGS).format(phrase)
        names = [call["name"] for call in calls]
        text = text[0].upper() + text[1:]
        tools = offered(self.rng, names, self.tools)
        return {"prompt": text, "kind": kind, "tools": tools, "calls": calls}

    def rows(self, count: int) -> list[dict[str, Any]]:
        """`count` different prompts, the kinds in turn."""
        made = []
        for number in range(count):
            for _ in range(TRIES):
                row = self.row(KINDS[number % len(KINDS)])
                if row["prompt"] not in self.seen:
                    break
            self.seen.add(row["prompt"])
            made.append(row)
        return made

    def talks(self, count: int) -> list[dict[str, Any]]:
        """Conversations: ROUNDS prompts that want one call each, with the tools' results."""
        made = []
        for _ in range(count):
            names = sorted(self.tools, key=lambda _: self.rng.random())[:IN_TALK]
            turns = []
            for _ in range(ROUNDS):
                name = pick(self.rng, names)
                tool = self.tools[name]
                phrase, call = asked(self.rng, name, tool, tool.plain)
                text = pick(self.rng, OPENINGS).format(phrase)
                text = text[0].upper() + text[1:]
                turns.append({"prompt": text, "call": call, "result": tool.result})
            made.append({"tools": names, "turns": turns})
        return made


def toolbox(tools: Mapping[str, Tool]) -> list[dict[str, Any]]:
    """Every tool as chat templates take it."""
    return [schema(name, tool) for name, tool in tools.items()]


def main(judges: Path, learns: Path) -> None:
    """All files."""
    judge = Source(JUDGE, JUDGE_NONE, JUDGE_NONE_WORDS, seed=2)
    write(judges, "toolbox", toolbox(JUDGE))
    write(judges, "tool_calls", judge.rows(SINGLE))
    write(judges, "tool_rounds", judge.talks(TALKS))
    learn = Source(LEARN, LEARN_NONE, LEARN_NONE_WORDS, seed=3)
    write(learns, "toolbox", toolbox(LEARN))
    rows = []
    for row in learn.rows(LEARNED):
        rows.append({"turns": [row["prompt"]], "tools": row["tools"]})
    write(learns, "tools", rows)


if __name__ == "__main__":
    main(tool_tasks.SETS, prompts.TRAIN.parent)
