"""Tools: what counts as a call, what as the right one, and how a model is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.data import chat_template, token_windows
from mis_mlx.hardware import memory
from mis_mlx.judge import recovery_table
from mis_mlx.judge.recovery_table import Outcome
from mis_mlx.judge.tasks import answering, examination, questions, task_registry, tool_tasks
from mis_mlx.models.opening import load
from mis_mlx.models.writing import tool_calls
from mis_mlx.types import Checkpoint, MisError
from tests import tiny

pytestmark = pytest.mark.usefixtures("cache")


class Wrapper:
    """What mlx-lm knows of a model's calls."""

    def __init__(self, name: str | None = None):
        self.tool_call_start = self.tool_call_end = self.tool_parser = None
        if name:
            module = load.mlx_lm(f"tool_parsers.{name}")
            self.tool_call_start = module.tool_call_start
            self.tool_call_end = module.tool_call_end
            self.tool_parser = module.parse_tool_call


CALL = {"name": "set_timer", "arguments": {"minutes": 12}}
JSON = '{"name": "set_timer", "arguments": {"minutes": 12}}'
TOOLS = tuple(tool_tasks.run_folder.records(tool_tasks.SETS / "toolbox.jsonl"))


@pytest.mark.parametrize(
    ("parser", "text", "wanted"),
    [
        ("json_tools", f"<tool_call>\n{JSON}\n</tool_call>", [CALL]),
        ("json_tools", f"Now:\n<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}", [CALL, CALL]),
        ("json_tools", f"```json\n{JSON}\n```", [CALL]),
        ("json_tools", '<tool_call>{"name": "set_timer", "argum</tool_call>', None),
        ("mistral", f"[TOOL_CALLS] [{JSON}, {JSON}]", [CALL, CALL]),
        ("mistral", '[TOOL_CALLS]set_timer[ARGS]{"minutes": 12}', [CALL]),
        ("pythonic", "<|tool_call_start|>[set_timer(minutes=12)]<|tool_call_end|>", [CALL]),
        (None, f"[TOOL_CALLS] [{JSON}]", [CALL]),
        (None, '{"name": "set_timer", "parameters": {"minutes": 12}}', [CALL]),
        (None, '{"name": "set_timer", "arguments": "{\\"minutes\\": 12}"}', [CALL]),
        (None, f'{{"type": "function", "function": {JSON}}}', [CALL]),
        (None, '{"name": "set_timer", "arguments": {"minutes": 12', None),
        (None, "I cannot do that. {sorry}", []),
        (None, 'A set is written {"like": "this"}.', []),
        (None, "{" * 10_000, []),
    ],
)
def test_calls_are_read_as_they_stand_there(
    parser: str | None, text: str, wanted: list[dict[str, Any]] | None
) -> None:
    """By mlx-lm's parser where the model's own marks stand there, else as JSON; a call that is
    begun and cannot be read is none of both."""
    assert tool_calls.read(text, Wrapper(parser), TOOLS) == wanted


def question(*calls: dict[str, Any]) -> questions.Question:
    return questions.Question("Do it.", "", tools=TOOLS, calls=calls)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


WEATHER = call("get_weather", city="Lyon")
PACKED = call("add_to_list", list="packing", items=["a", "b"])
ABBA = call("play_music", artist="Abba", shuffle=True)
RIGHT = (True, True, True)
NO_ARGUMENTS = (True, True, False)


@pytest.mark.parametrize(
    ("wanted", "made", "verdict"),
    [
        ([], [], RIGHT),
        ([], [CALL], (True, False, False)),
        ([CALL], [], (True, False, False)),
        ([CALL], None, (False, False, False)),
        ([CALL], [call("set_timer", minutes=12.0)], RIGHT),
        ([CALL], [call("set_timer", minutes="12")], NO_ARGUMENTS),
        ([CALL], [call("set_timer")], NO_ARGUMENTS),
        ([CALL], [call("set_timer", minutes=12, label="tea")], RIGHT),
        ([CALL], [call("set_timer", minutes=12, hours=0)], NO_ARGUMENTS),
        ([CALL, WEATHER], [WEATHER, CALL], RIGHT),
        ([CALL, WEATHER], [CALL], (True, False, False)),
        ([CALL, CALL], [CALL, call("set_timer", minutes=13)], NO_ARGUMENTS),
        ([WEATHER], [call("get_weather", city=" lyon ", day="today")], RIGHT),
        ([WEATHER], [call("get_weather", city="Lyon", day="weekend")], NO_ARGUMENTS),
        ([PACKED], [call("add_to_list", list="packing", items=["B", "a"])], RIGHT),
        ([ABBA], [call("play_music", artist="Abba", shuffle=1)], NO_ARGUMENTS),
    ],
)
def test_what_counts_as_the_right_call(
    wanted: list[dict[str, Any]], made: list[dict[str, Any]] | None, verdict: tuple[bool, ...]
) -> None:
    """Types count; case, order, and a default or a label that nobody asked for do not."""
    assert tool_tasks.verdict(question(*wanted), made) == verdict


def test_the_built_in_prompts_want_calls_that_their_tools_allow() -> None:
    """Names, types, enums and required arguments; four hundred different prompts."""
    (single, rounds) = task_registry.find(["tools"], 400).tasks
    assert len({q.context for q in single.questions}) == len(single.questions) == 400
    assert len(rounds.questions) == 200
    assert {len(q.calls or ()) for q in single.questions} == {0, 1, 2}
    for q in [*single.questions, *rounds.questions]:
        functions = {tool["function"]["name"]: tool["function"] for tool in q.tools}
        for call in q.calls or ():
            schema = functions[call["name"]]["parameters"]
            assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
            for argument, value in call["arguments"].items():
                assert value in schema["properties"][argument].get("enum", [value])
    assert not set(tool_tasks.verdicts(single, [q.calls for q in single.questions])) - {
        (True, True, True)
    }


def test_rounds_count_up_to_the_first_failure() -> None:
    """Two conversations: all ten are right; the fourth is wrong, whatever comes behind it."""
    (rounds,) = tool_tasks.tasks([tool_tasks.ROUNDS], 20)
    said = [list(q.calls or ()) for q in rounds.questions]
    said[13] = []
    assert tool_tasks.marks(rounds, said).tolist() == [1.0, 0.3]
    shares = tool_tasks.shares(rounds, said)
    assert shares["right arguments"] == 0.95
    assert shares["rounds before the first failure, of 10"] == 6.5
    assert tool_tasks.chance(rounds).tolist() == [0.0, 0.0]
    last = rounds.questions[9]
    roles = [message["role"] for message in last.messages[:4]]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_a_model_without_tools_in_its_template_is_refused(tmp_path: Path) -> None:
    """Before any question is asked."""
    chat = load.open_checkpoint(tiny.talking(tmp_path / "chat"))
    (task,) = tool_tasks.tasks([tool_tasks.CALLS], 4)
    assert not chat_template.knows_tools(load.tokenizer(chat.path))
    with pytest.raises(MisError, match="tools"):
        answering.plan(chat, "0" * 64, task, memory.budget(None))


@pytest.fixture
def calling(tmp_path: Path) -> Checkpoint:
    """A tiny model whose template tells of tools; it babbles."""
    return load.open_checkpoint(tiny.calling(tmp_path / "calling"))


def test_the_template_tells_of_tools(calling: Checkpoint) -> None:
    """And of the calls and results of earlier rounds."""
    tokenizer = load.tokenizer(calling.path)
    assert chat_template.knows_tools(tokenizer)
    (rounds,) = tool_tasks.tasks([tool_tasks.ROUNDS], 10)
    second = rounds.questions[1]
    ids = token_windows.prompt_ids(tool_tasks.prompt(second), tokenizer, tools=second.tools)
    said = tokenizer.decode(ids)
    first_call = (rounds.questions[0].calls or ())[0]
    assert first_call["name"] in said
    assert second.tools[0]["function"]["description"] in said
    assert said.endswith("assistant\n")


def test_a_teacher_that_is_seldom_right_is_compared_with_itself(calling: Checkpoint) -> None:
    """It never calls, so it is right where no call is wanted, a fifth: what it does counts then,
    and the page says both."""
    sha256 = answering.sha256(calling)
    limit = memory.budget(None)
    tasks = [replace(task, max_tokens=4) for task in tool_tasks.tasks([tool_tasks.CALLS], 5)]
    for task in tasks:
        answering.scores(calling, sha256, task, limit)
    wanted = task_registry.EvaluationSet(tasks=tuple(tasks), text=False)
    models = {"teacher": calling, "student": calling}
    hashes = {"teacher": sha256, "student": sha256}
    (single,) = examination.outcomes(wanted, models, hashes, limit, seen=calling)
    assert single.marks["student"].tolist() == [1.0] * 5
    page = recovery_table.markdown([single])
    assert "teacher is right in 20% of the cases" in page
    assert single.json()["models"]["student"]["calls"]["right tool"] == 0.2


def test_only_the_right_calls_of_a_question_count(calling: Checkpoint) -> None:
    """Their tokens, spelled out, are what is predicted; prompts, tools and earlier calls are not.
    A model beside itself loses nothing there."""
    tokenizer = load.tokenizer(calling.path)
    for task in tool_tasks.tasks([tool_tasks.CALLS, tool_tasks.ROUNDS], 10):
        wanted = [question for question in task.questions if question.calls]
        windows = tool_tasks.right_calls(task, tokenizer)
        assert len(windows.tokens) == len(wanted)
        for question, ids, counted in zip(wanted, windows.tokens, windows.loss_mask, strict=True):
            predicted = tokenizer.decode(ids[1:][counted[:-1] > 0])
            assert predicted.count('"name"') == len(question.calls or ())
            assert all(call["name"] in predicted for call in question.calls or ())
            assert question.context not in predicted
    (few,) = tool_tasks.tasks([tool_tasks.CALLS], 2)
    forced = examination.forced(few, {"teacher": calling, "student": calling})["student"]
    assert not forced["less likely"].any() and not forced["KL"].any()


def test_flips_are_counted_both_ways() -> None:
    """Also where the student is right as often as its teacher."""
    marks = {"teacher": np.array([1.0, 1, 0, 0, 1]), "student": np.array([1.0, 0, 1, 1, 0])}
    outcome = Outcome("calls", "", marks, chance=np.zeros(5))
    assert outcome.flips("student") == (2, 2)
    assert "| calls | +2 −2 |" in recovery_table.markdown([outcome])


def test_an_answer_is_kept_as_it_ends(calling: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop at the third answer of a batch costs neither of the others."""
    read = tool_calls.read
    read_so_far = list[str]()

    def until_the_third(text: str, tokenizer: Any, tools: Any) -> Any:
        read_so_far.append(text)
        if len(read_so_far) == 3:
            raise KeyboardInterrupt
        return read(text, tokenizer, tools)

    monkeypatch.setattr(tool_calls, "read", until_the_third)
    (task,) = [replace(task, max_tokens=4) for task in tool_tasks.tasks([tool_tasks.CALLS], 5)]
    with pytest.raises(KeyboardInterrupt):
        answering.scores(calling, "0" * 64, task, memory.budget(None))
    assert len(answering.unanswered("0" * 64, task)[1]) == 2
