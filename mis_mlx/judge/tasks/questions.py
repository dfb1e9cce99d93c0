"""Questions with known answers, from rows in JSONL. All rows are judged before one is used.

A file holds rows of one kind and is one task, named like the file:

    choice        {"question", "options", "answer"}
                  Which option is likeliest after the question? "question" may be "". A model with a
                  chat template is asked through it, and an option is its whole reply.
    cloze         {"text", "options", "answer"}
                  Which option fits the blank ___ of the text?
    checked       {"prompt", "answer"}
                  The model writes; its last line is compared with the answer.
    pairs         {"good", "bad"}
                  Which of two sentences is likelier? As in BLiMP.
    instructions  {"prompt", "instruction_id_list", "kwargs"}
                  The model writes; does it follow the instructions? As in IFEval.

"answer" is one of the options. "language" may be "pl" or "en" and decides between "Odpowiedź:" and
"Answer:".
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from mis_mlx.data import rows
from mis_mlx.judge.tasks import instructions
from mis_mlx.judge.tasks.instructions import Instruction
from mis_mlx.maths import stats
from mis_mlx.types import MisError

SHAPES: rows.Shapes = {
    "instructions": ("prompt", "instruction_id_list", "kwargs"),
    "choice": ("question", "options", "answer"),
    "cloze": ("text", "options", "answer"),
    "checked": ("prompt", "answer"),
    "pairs": ("good", "bad"),
}
# keys of SHAPES that hold no text; `options` is another one, which `rows` knows
NO_TEXTS = ("instruction_id_list", "kwargs")
# Tokens of an answer to instructions, at most. IFEval's leaderboards allow 1,280, which takes hours
# on a CPU.
INSTRUCTION_TOKENS = 512
BLANK = "___"
MARK = {"en": "Answer", "pl": "Odpowiedź"}
T = TypeVar("T")


class Question(NamedTuple):
    """One question.

    options: as they continue `context`; right: the number of the right one. Without options a model
    writes, and its text is compared with `answer` or must follow `instructions`. asked: what a user
    would say, of a question with options that has words of its own; a chat model is asked this.

    tools: that the model may call, as chat templates take them; calls: those that it should make,
    {"name", "arguments"}. messages: what was said before `context`.
    """

    context: str
    answer: str
    options: tuple[str, ...] = ()
    right: int = 0
    language: str | None = None
    instructions: tuple[Instruction, ...] = ()
    asked: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[Mapping[str, Any], ...] | None = ()
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def chance(self) -> float:
        """How often guessing is right. `answering.chance` has it for instructions."""
        return 1 / len(self.options) if self.options else 0.0


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    about: where they come from, and what a reader must know about them. per_character: options are
    compared by log-likelihood per character, as in lm-eval's acc_norm, since they differ in length;
    otherwise by their sums, as in its acc. max_tokens: of an answer that the model writes.
    """

    name: str
    kind: Literal["choice", "checked", "instructions", "tools", "rounds"]
    questions: tuple[Question, ...]
    about: str = ""
    per_character: bool = False
    max_tokens: int = 128

    @property
    def sha256(self) -> str:
        """Of everything that decides the answers, in hex."""
        asked = []
        for q in self.questions:
            decided = [q.context, q.answer, q.language, *q.options, *q.instructions]
            # What has none of these keeps the hash that it has always had.
            more = {"asked": q.asked, "tools": q.tools, "messages": q.messages}
            more = {key: value for key, value in more.items() if value}
            asked.append([*decided, more] if more else decided)
        decisive = [self.kind, self.max_tokens, asked]
        text = json.dumps(decisive, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def asks(self) -> bool:
        """Whether chat models are asked some of its questions through their templates."""
        return any(q.asked for q in self.questions)

    def as_text(self) -> Self:
        """The same task, every question of which is plain text to all models."""
        questions = tuple(q._replace(asked="") for q in self.questions)
        return replace(self, questions=questions)

    def chosen(self, count: int) -> Self:
        """`count` of its questions, spread evenly, or all when there are fewer."""
        numbers = stats.spread(len(self.questions), count)
        questions = tuple(self.questions[number] for number in numbers)
        return replace(self, questions=questions)


def best_constant_answer(task: Task) -> tuple[float, str] | None:
    """(share of right answers, answer) of the best constant answer: U Zośki in the table.

    It is a place in the list of options, or a text. None for instructions, whose checker
    `answering.best_constant` asks, and for tools.
    """
    if task.kind in ("instructions", "tools", "rounds"):
        return None
    counts = Counter[str]()
    for q in task.questions:
        if q.options:
            counts[f"option {q.right + 1}"] += 1
    # Texts are counted after all places: at equal counts the first key wins.
    for q in task.questions:
        counts[f"“{q.answer.strip()}”"] += 1
    ((best, count),) = counts.most_common(1)
    return count / len(task.questions), best


def folder(path: Path) -> list[Task]:
    """One task for every .jsonl file in a folder. MisError lists the rows that are no questions."""
    tasks = [file(source) for source in sorted(path.glob("*.jsonl"))]
    if not tasks:
        raise MisError(
            f"{path} holds no .jsonl file: put questions there, one JSON object per line"
        )
    return tasks


def file(path: Path) -> Task:
    """One file's rows as a task. MisError lists the rows that are no questions."""
    good, problems = rows.judged(rows.parsed(path), f"{path.name} line", fault)
    if not good and not problems:
        raise MisError(
            f"{path} is empty: put questions there, one JSON object per line, or remove it"
        )
    kinds = sorted({rows.shape_of(row, SHAPES) or "" for row, _ in good})
    if len(kinds) > 1:
        problems.append(
            f"{path.name}: holds rows of {' and '.join(kinds)}, but a task has one kind"
        )
    rows.refuse(problems)
    asked = []
    for row, _ in good:
        # In a pair that has the same sentence twice there is nothing to choose.
        if kinds != ["pairs"] or row["good"] != row["bad"]:
            asked.append(row)
    about = f"{len(asked)} rows of {path.name}"
    if len(asked) < len(good):  # BLiMP has such a pair
        about += (
            f"; pairs with two equal sentences are left out, {len(good) - len(asked)} of "
            f"{len(good)}"
        )
    if not asked:
        raise MisError(
            f"{path}: in all {len(good)} pairs 'good' and 'bad' are the same: give pairs that "
            f"differ"
        )
    return task(path.stem, asked, about)


def fault(row: object) -> str | None:
    """Why `row` is no question, or None when it is one."""
    reason = rows.fault(_texts_only(row), SHAPES)
    if reason:
        return reason
    assert isinstance(row, dict)
    if row.get("language") not in (None, *MARK):
        return f"'language' is {row['language']!r}, known: {', '.join(MARK)}"
    shape = rows.shape_of(row, SHAPES)
    if shape in ("checked", "pairs"):
        return None
    if shape == "instructions":
        return instructions.fault(row)
    if shape == "cloze":
        blanks = row["text"].count(BLANK)
        if blanks != 1:
            return f"'text' has {blanks} blanks {BLANK}, but a cloze has one"
    return _options_fault(row["options"], row["answer"])


def _options_fault(options: Any, answer: str) -> str | None:
    """Why a row's options are not usable; None where they are. One of them is the answer."""
    if not isinstance(options, list) or len(options) < 2:
        return "'options' is not a list of two or more"
    for option in options:
        reason = rows.text_fault("options", option)
        if reason:
            return reason
    if len(set(options)) < len(options):
        return "two of its options are the same"
    if answer not in options:
        return f"the answer {answer[:40]!r} is not one of its {len(options)} options"
    return None


def _texts_only(row: object) -> object:
    """The row as `rows.fault` may see it, which refuses empty texts and values that are no text.

    A question may be empty, and some keys hold no text: a stand-in takes their place.
    """
    if not isinstance(row, dict):
        return row
    others = {key: BLANK for key in NO_TEXTS if key in row}
    if row.get("question") == "":
        others["question"] = BLANK
    return row | others


def task(
    name: str,
    questions: Sequence[Mapping],
    about: str,
    per_character: bool = False,
) -> Task:
    """Rows that `fault` finds nothing wrong with, of one kind, as a task."""
    asked = tuple(_question(row) for row in questions)
    first = asked[0]
    if first.instructions:
        return Task(name, "instructions", asked, about, max_tokens=INSTRUCTION_TOKENS)
    if first.options:
        return Task(name, "choice", asked, about, per_character=per_character)
    return Task(name, "checked", asked, about, per_character=per_character)


def _pair(good: str, bad: str) -> Question:
    """Two sentences without a context.

    They stand in the order of their hashes, so that no place in the list is right more often.
    """
    options = sorted((good, bad), key=lambda sentence: hashlib.sha256(sentence.encode()).digest())
    return Question("", good, options=tuple(options), right=options.index(good))


def _question(row: Mapping) -> Question:
    """The question of a row that `fault` finds nothing wrong with."""
    shape = rows.shape_of(row, SHAPES)
    if shape == "instructions":
        return Question(row["prompt"], "", instructions=instructions.of_row(row))
    if shape == "pairs":
        return _pair(row["good"], row["bad"])
    if shape == "checked":
        return Question(row["prompt"], row["answer"], language=row.get("language"))
    context = ""
    lead = ""
    after = ""
    asked = ""
    if shape == "cloze":
        before, after = row["text"].split(BLANK)
        context = before.rstrip(" ")
        # The spaces in front of the blank belong to the options.
        lead = before[len(context) :]
    elif row["question"]:
        mark = MARK[row.get("language") or "en"]
        asked = row["question"].rstrip()
        context = f"{asked}\n{mark}:"
        lead = " "
    return Question(
        context=context,
        answer=row["answer"],
        options=tuple(f"{lead}{option}{after}" for option in row["options"]),
        right=row["options"].index(row["answer"]),
        language=row.get("language"),
        asked=asked,
    )


def drawn_items(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items in drawn order.

    By rng.random() alone, so that a seed means the same under every Python.
    """
    left = list(items)
    drawn = []
    for _ in range(count):
        place = int(rng.random() * len(left))
        drawn.append(left.pop(place))
    return drawn


def cloze_row(
    seed: str,
    text: str,
    right: str,
    answers: Sequence[str],
    *,
    others: int = 3,
) -> dict[str, Any]:
    """A row of a cloze: the right answer among `others` wrong ones.

    The wrong ones are drawn from the answers to other questions.
    """
    rng = random.Random(seed)
    all_wrong = [answer for answer in answers if answer != right]
    wrong = drawn_items(rng, all_wrong, others)
    options = drawn_items(rng, [right, *wrong], others + 1)
    return {"text": text, "options": options, "answer": right}


def text_of(row: Mapping) -> str:
    """The whole text of a training row, of any kind."""
    texts = [row.get(key, "") for key in ("text", "prompt", "completion")]
    texts += [message["content"] for message in row.get("messages") or []]
    return " ".join(texts)
