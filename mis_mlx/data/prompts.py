"""Prompts that a teacher answers, so that its student learns to answer.

benchmarks/prompts.py at bd583ffb made them. Sixteen kinds in English and Polish, from explanations
to second turns. The prompts that judge a student (judge/answers) have other templates and other
words.

A teacher that can call tools is asked to, too (tool_prompts.py there), with other tools than
those that judge (judge/tasks/tool_tasks).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mis_mlx.storage import run_folder

TRAIN = Path(__file__).parent / "prompts" / "train.jsonl"
TOOLS = TRAIN.with_name("tools.jsonl")
TOOLBOX = TRAIN.with_name("toolbox.jsonl")
# One prompt in so many has tools. It is four times as long as another, so a fifth of all tokens.
TOOLS_EVERY = 16


class Prompt(NamedTuple):
    """turns: the user's sentences; the model answers each turn before it reads the next one.

    tools: that it may call, as chat templates take them.
    """

    kind: str
    language: str
    turns: tuple[str, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def train(
    count: int | None = None,
    *,
    tools: bool = False,
) -> list[Prompt]:
    """The first `count` prompts; None: all. Kinds, templates and languages come in turn.

    tools: one in TOOLS_EVERY asks for a call of a tool, in English.
    """
    prompts = []
    for row in run_folder.records(TRAIN):
        prompts.append(Prompt(row["kind"], row["language"], tuple(row["turns"])))
    if tools:
        for number, prompt in enumerate(calling()):
            prompts.insert(TOOLS_EVERY * number + TOOLS_EVERY - 1, prompt)
    return prompts[:count]


def calling() -> list[Prompt]:
    """All prompts with tools at hand; some need none of them."""
    box = {tool["function"]["name"]: tool for tool in run_folder.records(TOOLBOX)}
    prompts = []
    for row in run_folder.records(TOOLS):
        tools = tuple(box[name] for name in row["tools"])
        prompts.append(Prompt("tools", "en", tuple(row["turns"]), tools))
    return prompts
