"""A model writes answers to a task's questions, and judges say how good they are.

The model is whole in memory where it fits; otherwise it is streamed from disk. Many answers are
written together.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.data import chat_template, token_windows
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.tasks import instructions, rewards, tool_tasks
from mis_mlx.judge.tasks.questions import Question, Task
from mis_mlx.judge.write import plan_writing
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing import tool_calls
from mis_mlx.models.writing.streamed_batch import Texts
from mis_mlx.models.writing.text_writer import Completion
from mis_mlx.types import Budget, Checkpoint, MisError

# Answers written together, as many as fit. In the same CPU time 48 have 1.3 times the tokens of 16,
# and 96 have fewer than 48 (SmolLM2-135M, float32, one thread).
AT_ONCE = (48, 32, 16, 4, 1)
# Answers that are judged together, and then kept: a judge is a process of its own, which imports
# for 2 s. Those of a streamed model come more slowly, and fewer are lost if the run is stopped.
JUDGED_AT_ONCE = 32
JUDGED_IF_STREAMED = 8
Record = dict[str, Any]  # of one question, as it is kept
# (task, numbers of questions, texts written) -> a verdict on each
Judge = Callable[[Task, Sequence[int], Sequence[str]], list[float]]


class Asking(NamedTuple):
    """How the questions of a task are asked within a budget.

    cost: what that takes. records: asks; gives a record for each question as it is answered.
    """

    cost: StageCost
    records: Callable[[], Iterator[Record]]


def asking(
    checkpoint: Checkpoint,
    tokenizer: Any,
    task: Task,
    *,
    left: Sequence[int],
    limit: Budget,
) -> Asking:
    """How a model writes answers, greedily, to the questions `left`, by number.

    MisError where the model does not fit the budget even streamed. Records hold the question's
    number "n", the "text" written and the judge's verdict.
    """
    if task.kind in tool_tasks.KINDS and not chat_template.knows_tools(tokenizer):
        raise MisError(
            f"{checkpoint.path}: its chat template knows no tools, and 0 of the prompts can be "
            f"asked: leave out --tasks tools, or take a model that calls tools"
        )
    prompts = [_prompt(tokenizer, task.questions[n]) for n in left]
    texts = Texts(len(prompts), max(map(len, prompts)), task.max_tokens)
    plan = plan_writing(model_of(checkpoint), texts, limit, at_once=AT_ONCE, name=task.name)

    def records() -> Iterator[Record]:
        ends = tokenizer.eos_token_ids
        writer = plan.open(checkpoint)
        completions = writer.completions(prompts, task.max_tokens, ends)
        decoded = _texts(tokenizer, left, completions, ends)
        if task.kind in tool_tasks.KINDS:
            judged_at_once = 1  # by this process
        elif plan.headroom_bytes is None:
            judged_at_once = JUDGED_AT_ONCE
        else:
            judged_at_once = JUDGED_IF_STREAMED
        for part in _judged_parts(task, decoded, judged_at_once, tokenizer):
            yield from part

    return Asking(plan.cost, records)


def _prompt(tokenizer: Any, question: Question) -> list[int]:
    """Token ids that the answer to a question follows."""
    if question.tools:
        messages = tool_tasks.prompt(question)
        return token_windows.prompt_ids(messages, tokenizer, tools=question.tools)
    return token_windows.encode_prompt(question.context, tokenizer)


def _texts(
    tokenizer: Any,
    asked: Sequence[int],
    completions: Iterator[Completion],
    ends: set[int],
) -> Iterator[tuple[int, str]]:
    """(question's number, its answer without the end token), as the answers end.

    asked: numbers of the questions, in the order of their prompts.
    """
    for completion in completions:
        own = [token for token in completion.ids if token not in ends]
        yield asked[completion.number], tokenizer.decode(own)


def _judged_parts(
    task: Task,
    texts: Iterator[tuple[int, str]],
    judged_at_once: int,
    tokenizer: Any,
) -> Iterator[list[Record]]:
    """The records of answers, `judged_at_once` together, none of them empty."""
    while part := list(islice(texts, judged_at_once)):
        numbers = [number for number, _ in part]
        yield judged(task, numbers, [text for _, text in part], tokenizer)


def judged(
    task: Task,
    numbers: Sequence[int],
    texts: Sequence[str],
    tokenizer: Any = None,
) -> list[Record]:
    """The records of answers: the question's number, the text, and the verdict of its kind.

    Of a task of tools the calls that the text makes: judge/tasks/tool_tasks judges them. tokenizer:
    it knows how its model writes calls.
    """
    key = "calls"
    verdicts: Sequence[Any]
    if task.kind in tool_tasks.KINDS:
        verdicts = [
            tool_calls.read(text, tokenizer, task.questions[number].tools)
            for number, text in zip(numbers, texts, strict=True)
        ]
    else:
        key, judge = JUDGES[task.kind]
        verdicts = judge(task, numbers, texts)
    records = []
    for number, text, verdict in zip(numbers, texts, verdicts, strict=True):
        records.append({"n": number, "text": text, key: verdict})
    return records


def marks_of_checked(
    task: Task,
    numbers: Sequence[int],
    texts: Sequence[str],
) -> list[float]:
    """1 where the last line is the right answer (judge/tasks/rewards), else 0.

    In a process that can be stopped: a text may break the verifier.
    """
    rows = []
    for number in numbers:
        question = task.questions[number]
        row = {
            "prompt": question.context,
            "answer": question.answer,
            "language": question.language,
        }
        rows.append(row)
    scored = rewards.score(rewards.functions("correct", None), rows, [[text] for text in texts])
    return _totals(scored)


def count_followed(
    task: Task,
    numbers: Sequence[int],
    texts: Sequence[str],
    *,
    loosely: bool = False,
) -> list[float]:
    """How many of its instructions each answer follows.

    loosely: as `instructions.followed_loosely`. An answer that breaks the checker follows none, and
    its question is named aloud.
    """
    function = instructions.followed_loosely if loosely else instructions.followed
    rows = []
    for number in numbers:
        question = task.questions[number]
        rows.append({"prompt": question.context, "asked": question.instructions})
    checker = rewards.Function(
        name="if-verifiable",
        source=instructions.__name__,
        function=function.__name__,
        seconds=instructions.SECONDS,
    )
    scored = rewards.score([checker], rows, [[text] for text in texts])
    for number, score in zip(numbers, scored, strict=True):
        for note in score.notes:
            cli.say(
                f"{task.name} question {number + 1}: its answer counts as following nothing "
                f"({note})"
            )
    return _totals(scored)


def _totals(scored: Sequence[rewards.Scores]) -> list[float]:
    """The reward of the one completion of each group; 0 where it could not be scored."""
    return [float(score.totals[0] or 0.0) for score in scored]


# {kind of a task: (key of the verdict in a record, who judges)}
JUDGES: dict[str, tuple[str, Judge]] = {
    "checked": ("mark", marks_of_checked),
    "instructions": ("followed", count_followed),
}
