"""One model, one task: the mark of every question. Answers are kept, so nothing is asked twice.

Options are chosen by log-likelihood (judge/tasks/option_likelihood), and texts are written
(judge/tasks/task_answers).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge import keep, score
from mis_mlx.judge.tasks import instructions, option_likelihood, questions, task_answers, tool_tasks
from mis_mlx.judge.tasks.option_likelihood import Encoded
from mis_mlx.judge.tasks.questions import Question, Task
from mis_mlx.judge.tasks.task_answers import Asking, Record
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.passing.stream import Stream
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.storage import hub
from mis_mlx.storage.files import file_sha256
from mis_mlx.storage.journal import Journal
from mis_mlx.types import Budget, Checkpoint, MisError, grouped

VERSION = 2  # of the way marks are made: kept answers of another version are not used
# tokens of questions that share a pass, where all blocks stay in memory: the answers are written to
# disk after each pass
PART = 4096
CHAT = "through its chat template"  # how options are put to a model
PLAIN = "as plain text"
# {question's number: its record: {"ll": [...]}, or {"text"} and "mark", "followed" or "calls"}
Asked = dict[int, Record]


def sha256(checkpoint: Checkpoint) -> str:
    """In hex, of config, weights, their type, `keep.speech_sha256` and `VERSION`."""
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    files.add(checkpoint.path / "config.json")
    known = []
    for file in cli.show_progress("hash: file", files):
        known.append((file.name, file_sha256(file)))
    # Not the folder's name: a copy elsewhere is the same model.
    speech = keep.speech_sha256(checkpoint.path)
    decisive = [VERSION, str(precision.dtype_of(checkpoint)), sorted(known), speech]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def answers_path(model_sha256: str, key: str) -> Path:
    """The file of a model's answers to a task. key: the task's sha256."""
    return hub.cache_root() / "evaluations" / model_sha256[:32] / f"{key[:32]}.jsonl"


def journal_at(path: Path) -> Journal:
    """The journal of a model's answers to a task: a record for each question."""
    return Journal(path, ("n",))


def read(path: Path) -> Asked:
    """The answers in a file, by the number of their question."""
    found = {}
    for (number,), record in journal_at(path).read().items():
        if isinstance(number, int):
            found[number] = record
    return found


def unanswered(model_sha256: str, task: Task) -> tuple[Path, Asked, list[int]]:
    """(file of the answers, those that are kept, numbers of the questions that are left)."""
    path = answers_path(model_sha256, task.sha256)
    answers = read(path)
    left = [n for n in range(len(task.questions)) if n not in answers]
    return path, answers, left


def plan(
    checkpoint: Checkpoint,
    model_sha256: str,
    task: Task,
    limit: Budget,
) -> StageCost | None:
    """The cost of asking what is left; None when all answers are kept.

    MisError where it cannot be done in the budget, before anything is asked.
    """
    _, _, left = unanswered(model_sha256, task)
    if not left:
        return None
    return _asking(checkpoint, task, left, limit).cost


def scores(
    checkpoint: Checkpoint,
    model_sha256: str,
    task: Task,
    limit: Budget,
) -> np.ndarray:
    """(n,) the mark of every question.

    1 or 0 where an answer is right or wrong, otherwise from 0 to 1; for instructions as
    `instructions.marks`, for tools as `tool_tasks.marks`.
    """
    numbers = range(len(task.questions))
    answers = asked(checkpoint, model_sha256, task, limit=limit, numbers=numbers)
    if task.kind == "instructions":
        return np.array(instructions.marks(*_followed_of(task, answers)))
    if task.kind in tool_tasks.KINDS:
        return tool_tasks.marks(task, _calls_of(task, answers))
    return np.array([mark_of(task, number, answers[number]) for number in numbers])


def asked(
    checkpoint: Checkpoint,
    model_sha256: str,
    task: Task,
    *,
    limit: Budget,
    numbers: Sequence[int],
) -> Asked:
    """A task's records, of which those of `numbers` that are not kept are asked now."""
    path, answers, missing = unanswered(model_sha256, task)
    wanted = set(numbers)
    left = [number for number in missing if number in wanted]
    kept = journal_at(path)
    kept.begin()
    label = f"{checkpoint.path.name} {task.name}"
    with progress.bar(label, len(wanted)) as show, memory.limited(limit):
        records: Iterator[Record] = iter(())
        if left:
            records = _asking(checkpoint, task, left, limit).records()
        still_left = len(left)
        for row in records:
            answers[row["n"]] = row
            # At once, so that a run that is stopped loses little.
            kept.add(row)
            still_left -= 1
            show(len(wanted) - still_left)
    return answers


def mark_of(task: Task, number: int, record: Record) -> float:
    """The mark of one question, from its record. For instructions see `instructions.marks`."""
    if task.kind == "checked":
        return float(record["mark"])
    rates = np.array(record["ll"]) / _lengths(task, number)
    # As in lm-eval: of options that are equally likely the first one counts as chosen.
    return float(np.argmax(rates) == task.questions[number].right)


def levels(model_sha256: str, task: Task) -> instructions.Levels | None:
    """IFEval's two accuracies, from answers that `scores` has kept; None for a task without
    instructions.
    """
    if task.kind != "instructions":
        return None
    _, answers, _ = unanswered(model_sha256, task)
    return instructions.levels(*_followed_of(task, answers))


def calls(model_sha256: str, task: Task) -> list[tool_tasks.Calls]:
    """The calls of all answers to a task of tools, which `scores` has kept."""
    _, answers, _ = unanswered(model_sha256, task)
    return _calls_of(task, answers)


def _calls_of(task: Task, answers: Asked) -> list[tool_tasks.Calls]:
    """The calls of every question's answer."""
    return [answers[n]["calls"] for n in range(len(task.questions))]


def chance(task: Task) -> np.ndarray:
    """(n,) expected marks of guessing; for instructions those of the constant answer PLAIN, for
    tools of never calling one.
    """
    if task.kind in tool_tasks.KINDS:
        return tool_tasks.chance(task)
    if task.kind == "instructions":
        return _constant_marks(task, instructions.CONSTANT_ANSWER)
    return np.array([question.chance for question in task.questions])


def best_constant(task: Task) -> tuple[float, str] | None:
    """(share, answer) of the best constant answer, U Zośki in the table.

    For instructions the constant is DRESSED.
    """
    if task.kind == "instructions":
        marks = _constant_marks(task, instructions.FORMATTED_ANSWER)
        return float(marks.mean()), instructions.FORMATTED_ANSWER
    return questions.best_constant_answer(task)


def _constant_marks(task: Task, text: str) -> np.ndarray:
    """(n,) marks for one and the same answer to all questions."""
    total = len(task.questions)
    followed = task_answers.count_followed(task, range(total), [text] * total)
    counts = [len(question.instructions) for question in task.questions]
    return np.array(instructions.marks([int(count) for count in followed], counts))


def _followed_of(task: Task, answers: Asked) -> tuple[list[int], list[int]]:
    """(n,) how many instructions of each question are followed, and (n,) how many it has."""
    followed = [int(answers[n]["followed"]) for n in range(len(task.questions))]
    counts = [len(question.instructions) for question in task.questions]
    return followed, counts


# Opened once for all tasks: models come one after the other, in planning and in asking.
_tokenizer = lru_cache(maxsize=1)(load.tokenizer)


def _lengths(task: Task, number: int) -> list[int]:
    """The divisors of the options' log-likelihoods: their characters, or 1 each."""
    options = task.questions[number].options
    if task.per_character:
        return [len(option.lstrip()) for option in options]
    return [1] * len(options)


def uniform(checkpoint: Checkpoint, task: Task) -> np.ndarray | None:
    """(n,) expected marks of a model to which all tokens are equally likely.

    Its answer is the option with the fewest tokens, or one of these where several have as few.
    Random weights do much the same. None where no options are chosen.
    """
    if task.kind != "choice":
        return None
    expected = np.zeros(len(task.questions))
    tokenizer = _tokenizer(checkpoint.path)
    for n, question in enumerate(task.questions):
        _, options = _encoded_question(tokenizer, question)
        tokens = np.array([len(option) for option in options])
        rate = tokens / _lengths(task, n)
        chosen = np.isclose(rate, rate.min())
        expected[n] = chosen[question.right] / chosen.sum()
    return expected


def _asking(
    checkpoint: Checkpoint,
    task: Task,
    left: Sequence[int],
    limit: Budget,
) -> Asking:
    """How the questions `left` are asked. MisError where it cannot be done in the budget."""
    if task.kind == "choice":
        return _choosing(checkpoint, task, left, limit)
    tokenizer = _tokenizer(checkpoint.path)
    return task_answers.asking(checkpoint, tokenizer, task, left=left, limit=limit)


class _Parts(NamedTuple):
    """Questions come in parts of up to `tokens` tokens; a part is one pass of the weights.

    cost: of all parts. headroom_bytes: bytes for the head, and for blocks that stay between parts.
    """

    cost: StageCost
    tokens: int
    headroom_bytes: int


def _choosing(
    checkpoint: Checkpoint,
    task: Task,
    left: Sequence[int],
    limit: Budget,
) -> Asking:
    """Log-likelihoods of the options of the questions `left`, part by part."""
    encoded = _encoded(_tokenizer(checkpoint.path), task, left)
    texts = [option_likelihood.texts_of(question) for question in encoded]
    lengths = [sum(map(len, of_question)) for of_question in texts]
    longest_texts = [max(map(len, of_question)) for of_question in texts]
    longest = max(longest_texts)
    most = checkpoint.config.get("max_position_embeddings") or longest
    if longest > most:
        which = f"{task.name} question {left[longest_texts.index(longest)] + 1}"
        raise MisError(
            f"{which} takes {longest} tokens, but {checkpoint.path} reads {most}: shorten or "
            f"remove it"
        )
    parts = _parts(model_of(checkpoint), task.name, lengths, longest, limit)

    def records() -> Iterator[Record]:
        direct = memory.crowds_page_cache(checkpoint.nbytes, limit)
        stream = Stream(
            checkpoint, precision.dtype_of(checkpoint), parts.headroom_bytes, direct=direct
        )
        for part in grouped(range(len(lengths)), lengths.__getitem__, parts.tokens):
            likelihoods = option_likelihood.score(stream, [encoded[i] for i in part])
            for i, values in zip(part, likelihoods, strict=True):
                yield {"n": left[i], "ll": values}

    return Asking(parts.cost, records)


def way_of(checkpoint: Checkpoint, task: Task) -> str | None:
    """How the options of a task are put to a model, in words; None: all models get the same."""
    if not task.asks:
        return None
    return CHAT if _tokenizer(checkpoint.path).has_chat_template else PLAIN


def _encoded_question(tokenizer: Any, question: Question) -> Encoded:
    """Token ids of one question, as a model with this tokenizer is asked."""
    if question.asked and tokenizer.has_chat_template:
        return option_likelihood.encode_replies(tokenizer, question.asked, question.options)
    return option_likelihood.encode(tokenizer, question.context, question.options)


def _encoded(tokenizer: Any, task: Task, left: Sequence[int]) -> list[Encoded]:
    """Token ids of the questions `left`. MisError names the question that cannot be asked."""
    encoded = []
    for n in left:
        question = task.questions[n]
        try:
            ids = _encoded_question(tokenizer, question)
        except MisError as error:
            raise MisError(f"{task.name} question {n + 1}: {error}") from None
        encoded.append(ids)
    return encoded


def _parts(
    m: ModelSize,
    name: str,
    lengths: Sequence[int],
    longest: int,
    limit: Budget,
) -> _Parts:
    """The parts that questions of these lengths come in. MisError where not even one batch fits.

    lengths: tokens of a question, with its context before each option. longest: tokens of a text.
    A pass reads all weights that are not in memory, so a streamed model should take many questions
    at once: as many as the budget holds hidden states of. A model whose blocks all stay in memory
    reads nothing again; then PART tokens are enough, and answers reach the disk sooner.
    """
    total = sum(lengths)
    rows = max(longest, score.ROWS)

    one_pass = partial(
        pass_cost.streamed_pass,
        name,
        m,
        micro_tokens=rows,
        length=rows,
        spool=False,
        beside_bytes=m.text_bytes,
    )

    def room_bytes(once: StageCost) -> int:
        return memory.headroom_bytes(limit.limit_bytes, once.peak_bytes)

    fewest = max(rows, *lengths)
    least = one_pass(tokens=fewest)
    estimates.require_fit(limit, least, other="")
    part = min(total, max(PART, fewest))
    if pass_cost.stays(m, room_bytes(one_pass(tokens=part))).blocks < m.shape.layers:
        # What the budget leaves holds hidden states, 2 D numbers a token.
        part = max(fewest, min(total, room_bytes(least) // (2 * m.shape.hidden * m.item)))
    once = one_pass(tokens=part)
    kept = pass_cost.stays(m, room_bytes(once))
    again = math.ceil(total / part) - 1
    cost = replace(
        once,
        read_bytes=m.nbytes + int(again * kept.share * once.read_bytes),
        peak_bytes=once.peak_bytes + kept.nbytes,
        flops=pass_cost.forward_flops(m, total, rows),
    )
    return _Parts(cost, part, headroom_bytes=room_bytes(once))
