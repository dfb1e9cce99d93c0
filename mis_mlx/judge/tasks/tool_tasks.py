"""Tools that still work: whether a model calls the right tool with the right arguments.

    tool-calls   one prompt, three tools: one call, with optional arguments or without, two calls,
                 or none
    tool-rounds  a conversation of ten prompts that want one call each, with the results of all
                 calls before; every model has the right calls before it. How many are right before
                 the first one that is not?

The prompts are ours (tool_prompts.py at bd583ffb) and come with the package. A model is told of the
tools by its own chat template and does not think aloud; `models/writing/tool_calls` reads its
calls. An argument must have its type; case, blanks around a text and the order of a list do not
count. An optional one that nobody asked for may have its default, or be a free text, such as a
timer's label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.data import token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.judge.tasks.questions import Question, Task
from mis_mlx.models.writing import tool_calls
from mis_mlx.storage import run_folder

SETS = Path(__file__).parent / "sets"
CALLS = "tool-calls"
ROUNDS = "tool-rounds"
MOST_TOKENS = 128  # of an answer
ENOUGH = 0.5  # share of right answers, below which a teacher's own calls are the right ones
KINDS = ("tools", "rounds")
Calls = Sequence[Mapping[str, Any]] | None  # None: they cannot be read


class Verdict(NamedTuple):
    """On the calls of one answer."""

    valid: bool  # they can be read
    named: bool  # and are of the right tools, as many as are wanted
    right: bool  # and have the right arguments


def tasks(names: Sequence[str], count: int) -> list[Task]:
    """The tasks of these names, `count` prompts of each, in whole conversations."""
    box = {tool["function"]["name"]: tool for tool in run_folder.records(SETS / "toolbox.jsonl")}
    found = []
    if CALLS in names:
        asked = []
        for row in run_folder.records(SETS / "tool_calls.jsonl"):
            tools = tuple(box[name] for name in row["tools"])
            asked.append(Question(row["prompt"], "", tools=tools, calls=tuple(row["calls"])))
        found.append(Task(CALLS, "tools", tuple(asked[:count]), max_tokens=MOST_TOKENS))
    if ROUNDS in names:
        talks = run_folder.records(SETS / "tool_rounds.jsonl")
        length = len(talks[0]["turns"])
        asked = []
        for talk in talks[: max(1, count // length)]:
            asked += _rounds(talk, tuple(box[name] for name in talk["tools"]))
        found.append(Task(ROUNDS, "rounds", tuple(asked), max_tokens=MOST_TOKENS))
    return [replace(task, about="prompts and tools of our own") for task in found]


def _rounds(talk: Mapping[str, Any], tools: tuple[Mapping[str, Any], ...]) -> list[Question]:
    """A question for every round of a conversation, with the right calls before it."""
    rounds = []
    said = list[Mapping[str, Any]]()
    for number, turn in enumerate(talk["turns"]):
        call = turn["call"]
        question = Question(turn["prompt"], "", tools=tools, calls=(call,), messages=tuple(said))
        rounds.append(question)
        answer = tool_calls.message([call], first=number)
        said += [
            {"role": "user", "content": turn["prompt"]},
            answer,
            {
                "role": "tool",
                "content": turn["result"],
                "name": call["name"],
                "tool_call_id": answer["tool_calls"][0]["id"],
            },
            {"role": "assistant", "content": "Done."},
        ]
    return rounds


def verdict(question: Question, made: Calls) -> Verdict:
    """On the calls of an answer to this question. Where the teacher's cannot be read, neither must
    these."""
    wanted = question.calls
    if wanted is None or made is None:
        same = wanted is None and made is None
        return Verdict(valid=made is not None, named=same, right=same)
    named = sorted(_name(call) for call in made) == sorted(_name(call) for call in wanted)
    if not named:
        return Verdict(valid=True, named=False, right=False)
    left = list(made)
    for call in wanted:
        fitting = [other for other in left if _same_call(call, other, question.tools)]
        if not fitting:
            return Verdict(valid=True, named=True, right=False)
        left.remove(fitting[0])
    return Verdict(valid=True, named=True, right=True)


def _name(call: Mapping[str, Any]) -> str:
    return str(call["name"])


def _same_call(
    wanted: Mapping[str, Any], made: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether a call is the wanted one. An argument too many must have its default, or be free."""
    if wanted["name"] != made["name"]:
        return False
    given = dict(made["arguments"])
    for argument, value in wanted["arguments"].items():
        if argument not in given or not _same(value, given.pop(argument)):
            return False
    schemas = _schemas(str(wanted["name"]), tools)
    return all(_harmless(schemas.get(argument), value) for argument, value in given.items())


def _schemas(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """{argument: its schema} of a tool."""
    for tool in tools:
        function = tool["function"]
        if function["name"] == name:
            return dict(function["parameters"]["properties"])
    return {}


def _harmless(schema: Mapping[str, Any] | None, value: Any) -> bool:
    """Whether an argument that nobody asked for changes nothing."""
    if schema is None:
        return False
    if "default" in schema:
        return _same(schema["default"], value)
    return schema["type"] == "string" and "enum" not in schema and isinstance(value, str)


def _same(wanted: Any, given: Any) -> bool:
    """Whether two values of an argument are the same to a tool."""
    if isinstance(wanted, bool) or isinstance(given, bool):
        return wanted is given
    if isinstance(wanted, str) and isinstance(given, str):
        return wanted.strip().casefold() == given.strip().casefold()
    if isinstance(wanted, list) and isinstance(given, list):
        return sorted(map(_key, wanted)) == sorted(map(_key, given))
    return bool(wanted == given)


def _key(value: Any) -> str:
    return str(value).strip().casefold()


def prompt(question: Question) -> list[Mapping[str, Any]]:
    """The messages that a model answers."""
    return [*question.messages, {"role": "user", "content": question.context}]


def right_calls(task: Task, tokenizer: Any) -> Windows:
    """(N, T) the questions of a task that want calls, each followed by the right ones, padded.

    Predictions of the calls' own tokens count, and no others: how likely a model finds what it
    should say tells more of few prompts than whether it says it.
    """
    rendered = []
    for question in task.questions:
        if question.calls:
            messages = [*prompt(question), tool_calls.message(question.calls)]
            row = {"messages": messages, "tools": list(question.tools)}
            rendered.append(token_windows.conversation(row, tokenizer, mask_prompt=True))
    longest = max(len(ids) for ids, _ in rendered)
    tokens = np.zeros((len(rendered), longest), np.int32)
    loss_mask = np.zeros((len(rendered), longest), np.float32)
    for number, (ids, own) in enumerate(rendered):
        # the last answer alone: a conversation of rounds has others before it
        before = len(own) - next((n for n, mark in enumerate(own[::-1]) if not mark), len(own))
        tokens[number, : len(ids)] = ids
        loss_mask[number, before - 1 : len(ids) - 1] = 1
    return Windows(tokens, loss_mask)


def verdicts(task: Task, said: Sequence[Calls]) -> list[Verdict]:
    """On the calls of the answers to all questions of a task."""
    return [verdict(question, made) for question, made in zip(task.questions, said, strict=True)]


def marks(task: Task, said: Sequence[Calls]) -> np.ndarray:
    """(n,): 1 where an answer's calls are right, else 0; of rounds (conversations,), the share of
    a conversation's rounds before the first one that is not."""
    right = np.array([float(found.right) for found in verdicts(task, said)])
    if task.kind == "tools":
        return right
    by_talk = right.reshape(_conversations(task), -1)
    survived = np.cumprod(by_talk, axis=1)
    return np.asarray(survived.mean(axis=1))


def chance(task: Task) -> np.ndarray:
    """(n,) marks of a model that never calls a tool."""
    return marks(task, [[]] * len(task.questions))


def _conversations(task: Task) -> int:
    """How many conversations a task of rounds has."""
    return sum(not question.messages for question in task.questions)


def shares(task: Task, said: Sequence[Calls]) -> dict[str, float]:
    """What a reader wants to know of a model's calls, by name: shares, and rounds."""
    found = verdicts(task, said)
    names = {"valid": "valid JSON", "named": "right tool", "right": "right arguments"}
    shares = {}
    for field, name in names.items():
        shares[name] = sum(getattr(one, field) for one in found) / len(found)
    if task.kind == "rounds":
        talks = _conversations(task)
        rounds = len(task.questions) // talks
        shares[f"rounds before the first failure, of {rounds}"] = float(
            marks(task, said).mean() * rounds
        )
    return shares


def as_said(task: Task, said: Sequence[Calls]) -> Task:
    """The same task, in which a teacher's own calls are the right ones."""
    questions = []
    for question, made in zip(task.questions, said, strict=True):
        calls = None if made is None else tuple(made)
        questions.append(question._replace(calls=calls))
    return replace(task, questions=tuple(questions))
