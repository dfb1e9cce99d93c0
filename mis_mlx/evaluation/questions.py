"""Questions with known answers, from rows in JSONL: choice, cloze, pairs, checked answers. All rows
are judged.

A file holds rows of one kind and is one task, named like the file:

    choice   {"question", "options", "answer"}   which option is likeliest after the question;
    "question" may be ""
    cloze    {"text", "options", "answer"}       which option fits the blank ___ of the text
    checked  {"prompt", "answer"}                the model writes; its last line is compared with
    the answer
    pairs    {"good", "bad"}                     which of two sentences is likelier, as in BLiMP
    instructions  {"prompt", "instruction_id_list", "kwargs"}   the model writes; does it do as
    told? as in IFEval

"answer" is one of the options. "language" may be "pl" or "en" and decides between "Odpowiedź:" and
"Answer:".
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np

from mis_mlx.data import preparation, rows
from mis_mlx.evaluation import instructions
from mis_mlx.evaluation.instructions import Instruction
from mis_mlx.types import MisError

SHAPES: rows.Shapes = {
    "instructions": ("prompt", "instruction_id_list", "kwargs"),
    "choice": ("question", "options", "answer"),
    "cloze": ("text", "options", "answer"),
    "checked": ("prompt", "answer"),
    "pairs": ("good", "bad"),
}
# keys of SHAPES; `options` is the other one, which `rows` knows
NO_TEXTS = ("instruction_id_list", "kwargs")
# Tokens of an answer to instructions, at most. IFEval's leaderboards allow 1,280, which takes hours
# on a CPU.
INSTRUCTION_TOKENS = 512
BLANK = "___"
# words in a row that tell of contamination; fewer words say nothing
SPAN = 13
LEAST = 5
MARK = {"en": "Answer", "pl": "Odpowiedź"}
T = TypeVar("T")


class Question(NamedTuple):
    """`options` as they continue `context`; the `right`-th is it. Without options a model writes
    what `answer` says, or what follows all `instructions`.
    """

    context: str
    answer: str
    options: tuple[str, ...] = ()
    right: int = 0
    language: str | None = None
    instructions: tuple[Instruction, ...] = ()

    @property
    def chance(self) -> float:
        """How often somebody who cannot read is right. `answering.chance` knows it of
        instructions.
        """
        return 1 / len(self.options) if self.options else 0.0


@dataclass(frozen=True)
class Task:
    """`about`: where it comes from and what is odd about it. per_character: options of unlike
    length are compared by log-likelihood per character, as in lm-eval's acc_norm; otherwise by
    their sums, as in its acc.
    """

    name: str
    kind: Literal["choice", "checked", "instructions"]
    questions: tuple[Question, ...]
    about: str = ""
    per_character: bool = False
    max_tokens: int = 128

    @property
    def sha256(self) -> str:
        """Of everything that decides the answers, in hex."""
        asked = [
            [q.context, q.answer, q.language, *q.options, *q.instructions] for q in self.questions
        ]
        decisive = [self.kind, self.max_tokens, asked]
        return hashlib.sha256(json.dumps(decisive, ensure_ascii=False).encode()).hexdigest()

    def chosen(self, count: int) -> Self:
        """`count` of its questions, spread evenly, or all when there are fewer."""
        n = len(self.questions)
        at = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int))
        return replace(self, questions=tuple(self.questions[i] for i in at))


def best_constant_answer(task: Task) -> tuple[float, str] | None:
    """(share, answer) of U Zośki, who always recommends the same: the best constant, by name or
    place in the list. None for instructions: `answering.best_constant` asks their checker.
    """
    if task.kind == "instructions":
        return None
    counts = Counter(f"option {q.right + 1}" for q in task.questions if q.options)
    counts.update(f"“{q.answer.strip()}”" for q in task.questions)
    ((best, count),) = counts.most_common(1)
    return count / len(task.questions), best


def folder(path: Path) -> list[Task]:
    """A task of every .jsonl file in a folder. MisError lists the rows that are none, before
    anything is asked.
    """
    if tasks := list(map(file, sorted(path.glob("*.jsonl")))):
        return tasks
    raise MisError(f"{path} holds no .jsonl file: put questions there, one JSON object per line")


def file(path: Path) -> Task:
    """One file's rows as a task."""
    good, problems = rows.judged(rows.parsed(path), f"{path.name} line", fault)
    if not good and not problems:
        raise MisError(
            f"{path} is empty: put questions there, one JSON object per line, or remove it"
        )
    kinds = sorted({rows.shape_of(row, SHAPES) or "" for row, _ in good})
    if len(kinds) > 1:
        problems.append(f"{path.name}: holds rows of {' and '.join(kinds)}, a task is of one kind")
    rows.refuse(problems)
    asked = [row for row, _ in good if not _says_twice(row)]
    about = f"{len(asked)} rows of {path.name}"
    if len(asked) < len(good):  # BLiMP has such a pair
        about += (
            f"; pairs whose sentences are the same left out, {len(good) - len(asked)} of "
            f"{len(good)}"
        )
    if not asked:
        raise MisError(
            f"{path}: in all {len(good)} pairs 'good' and 'bad' are the same: give pairs that "
            f"differ"
        )
    return task(path.stem, asked, about)


def _says_twice(row: Mapping) -> bool:
    """Whether a pair has one sentence only: there is nothing to choose."""
    return rows.shape_of(row, SHAPES) == "pairs" and row["good"] == row["bad"]


def fault(row: object) -> str | None:
    """Why `row` is no question, or None when it is one."""
    if reason := rows.fault(_texts_alone(row), SHAPES):
        return reason
    assert isinstance(row, dict)
    if row.get("language") not in (None, *MARK):
        return f"'language' is {row['language']!r}, known are {', '.join(MARK)}"
    shape = rows.shape_of(row, SHAPES)
    if shape in ("checked", "pairs"):
        return None
    if shape == "instructions":
        return instructions.fault(row)
    if shape == "cloze" and row["text"].count(BLANK) != 1:
        return f"'text' has {row['text'].count(BLANK)} blanks {BLANK}, a cloze has one"
    options = row["options"]
    answer = row["answer"]
    if not isinstance(options, list) or len(options) < 2:
        return "'options' is no list of two or more"
    if reason := next(
        (why for option in options if (why := rows.text_fault("options", option))), None
    ):
        return reason
    if len(set(options)) < len(options):
        return "two of its options are the same"
    return (
        None
        if answer in options
        else f"the answer {answer[:40]!r} is none of its {len(options)} options"
    )


def _texts_alone(row: object) -> object:
    """The row for `rows.fault`, which wants text with something in it: a question may be empty, and
    some keys hold no text.
    """
    if not isinstance(row, dict):
        return row
    others = {key: BLANK for key in NO_TEXTS if key in row}
    if row.get("question") == "":
        others["question"] = BLANK
    return row | others


def task(name: str, questions: Sequence[Mapping], about: str, per_character: bool = False) -> Task:
    """Rows that `fault` finds nothing wrong with, of one kind, as a task."""
    made = tuple(_question(row) for row in questions)
    if made[0].instructions:
        return Task(name, "instructions", made, about, max_tokens=INSTRUCTION_TOKENS)
    return Task(name, "choice" if made[0].options else "checked", made, about, per_character)


def _pair(good: str, bad: str) -> Question:
    """Two sentences after nothing, in the order of their hashes: no place in the list is right more
    often.
    """
    options = sorted((good, bad), key=lambda sentence: hashlib.sha256(sentence.encode()).digest())
    return Question("", good, options=tuple(options), right=options.index(good))


def _question(row: Mapping) -> Question:
    shape = rows.shape_of(row, SHAPES)
    if shape == "instructions":
        return Question(row["prompt"], "", instructions=instructions.of_row(row))
    if shape == "pairs":
        return _pair(row["good"], row["bad"])
    if shape == "checked":
        return Question(row["prompt"], row["answer"], language=row.get("language"))
    if shape == "cloze":
        before, after = row["text"].split(BLANK)
        context = before.rstrip(" ")
        options = [f"{before[len(context) :]}{option}{after}" for option in row["options"]]
    else:
        context = (
            f"{row['question'].rstrip()}\n{MARK[row.get('language') or 'en']}:"
            if row["question"]
            else ""
        )
        options = [f" {option}" if context else option for option in row["options"]]
    return Question(
        context,
        row["answer"],
        tuple(options),
        row["options"].index(row["answer"]),
        row.get("language"),
    )


def some(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items in drawn order, by rng.random() alone: a seed means the same under
    every Python.
    """
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def among_others(
    seed: str, text: str, right: str, answers: Sequence[str], others: int = 3
) -> dict[str, Any]:
    """A row of a cloze: the right answer among `others` wrong ones, drawn from the answers to other
    questions.
    """
    rng = random.Random(seed)
    wrong = some(rng, [answer for answer in answers if answer != right], others)
    return {"text": text, "options": some(rng, [right, *wrong], others + 1), "answer": right}


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def training_words(data: str | None) -> list[str]:
    """All words of a data source's training rows; None: of all built-in texts, what models wrote
    among them.
    """
    if data:
        train = list(preparation.load(data).train)
    else:
        train = [*preparation.load(None).train, *preparation.load(preparation.MIS).train]
        for path in sorted(preparation.WRITTEN.parent.glob("*.jsonl")):
            train += rows.read(path).rows
    return [word for row in train for word in words(text_of(row))]


def text_of(row: Mapping) -> str:
    """All that a training row says."""
    messages = row.get("messages") or []
    return " ".join(
        [row.get(key, "") for key in ("text", "prompt", "completion")]
        + [m["content"] for m in messages]
    )


class Known:
    """The training text, ready to be asked whether a question shares 13 words in a row with it, as
    GPT-3's authors counted (arXiv 2005.14165, appendix C): without case and marks; a shorter
    question is looked up whole.
    """

    def __init__(self, known: Sequence[str]):
        self._runs = {hash(run) for run in _runs(known)}
        self._whole = f" {' '.join(known)} "

    def holds(self, q: Question) -> bool | None:
        """Whether question and answer share a run with the training text; None: they are too short
        to be looked up.
        """
        asked = words(q.context + (q.options[q.right] if q.options else f" {q.answer}"))
        if len(asked) >= SPAN:
            return any(hash(run) in self._runs for run in _runs(asked))
        return f" {' '.join(asked)} " in self._whole if len(asked) >= LEAST else None

    def overlap(self, task: Task) -> tuple[int, int]:
        """(questions that share a run with the training text, questions long enough to be looked
        up).
        """
        looked_up = [held for q in task.questions if (held := self.holds(q)) is not None]
        return sum(looked_up), len(looked_up)


def _runs(known: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(known[at:] for at in range(SPAN)), strict=False)
