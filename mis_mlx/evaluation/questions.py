"""Questions with known answers, from rows in JSONL: choice, cloze, checked answers, translation. All rows are judged.

Knows no tokenizer, no model and no score. A file holds rows of one kind and is one task, named like the file:

    choice        {"question", "options", "answer"}   which option is likeliest after the question; "question" may be ""
    cloze         {"text", "options", "answer"}       which option fits the blank ___ of the text
    checked       {"prompt", "answer"}                the model writes; its last line is compared with the answer
    translation   {"source", "target", "from", "to"}  the model writes; chrF against the target

"answer" is one of the options. "language" may be "pl" or "en" and decides between "Odpowiedź:" and "Answer:".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mis_mlx.data import examples, rows
from mis_mlx.data.generated_tasks import MARK
from mis_mlx.types import MisError

Kind = Literal["choice", "checked", "translation"]
SHAPES = {
    "choice": ("question", "options", "answer"),
    "cloze": ("text", "options", "answer"),
    "checked": ("prompt", "answer"),
    "translation": ("source", "target", "from", "to"),
}
BLANK = "___"


@dataclass(frozen=True)
class Question:
    """`options` as they continue `context`, the `right`-th is the answer. Without options a model writes, and `answer`
    says what is right."""

    context: str
    answer: str
    options: tuple[str, ...] = ()
    right: int = 0
    language: str | None = None

    @property
    def chance(self) -> float:
        """How often somebody who cannot read is right."""
        return 1 / len(self.options) if self.options else 0.0


@dataclass(frozen=True)
class Task:
    """`about`: where it comes from and what is odd about it. per_character: options of unlike length are compared by
    log-likelihood per character, as in lm-eval's acc_norm; otherwise by their sums, as in its acc."""

    name: str
    kind: Kind
    questions: tuple[Question, ...]
    about: str = ""
    per_character: bool = False
    max_tokens: int = 128

    @property
    def sha256(self) -> str:
        """Of everything that decides the answers, in hex."""
        asked = [self.kind, self.max_tokens, [[q.context, q.answer, q.language, *q.options] for q in self.questions]]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()

    def chosen(self, count: int) -> Task:
        """`count` of its questions, spread evenly, or all when there are fewer."""
        n = len(self.questions)
        at = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int))
        return replace(self, questions=tuple(self.questions[i] for i in at))


def constant(task: Task) -> tuple[float, str]:
    """(share, answer) of U Zośki, who always recommends the same: the best constant, by name or place in the list."""
    asked, counts = task.questions, dict[str, int]()
    if task.kind == "translation":
        return 0.0, "nothing"
    for q in asked:
        place = [f"option {q.right + 1}"] if q.options else []
        for said in [*place, f"“{q.answer.strip()}”"]:
            counts[said] = counts.get(said, 0) + 1
    best = max(counts, key=lambda said: counts[said])
    return counts[best] / len(asked), best


def folder(path: Path) -> list[Task]:
    """A task of every .jsonl file in a folder. MisError lists the rows that are none, before anything is asked."""
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise MisError(f"{path} holds no .jsonl file: put questions there, one JSON object per line")
    return [file(f) for f in files]


def file(path: Path) -> Task:
    """One file's rows as a task."""
    found, problems = list[dict](), list[str]()
    for number, value, unread in rows.parsed(path):
        if why := unread or fault(value):
            problems.append(f"{path.name} line {number}: {why}")
        elif isinstance(value, dict):
            found.append(value)
    if not found and not problems:
        raise MisError(f"{path} is empty: put questions there, one JSON object per line, or remove it")
    kinds = sorted({shape_of(row) or "" for row in found})
    if len(kinds) > 1:
        problems.append(f"{path.name}: holds rows of {' and '.join(kinds)}, a task is of one kind")
    examples.refuse(problems)
    return task(path.stem, found, f"{len(found)} rows of {path.name}")


def shape_of(row: Mapping) -> str | None:
    """The first of SHAPES whose keys the row has."""
    return next((name for name, keys in SHAPES.items() if all(key in row for key in keys)), None)


def fault(row: object) -> str | None:
    """Why `row` is no question, or None when it is one."""
    if not isinstance(row, dict):
        return "not an object"
    shape = shape_of(row)
    if shape is None:
        keys = ", ".join(ascii(key)[:40] for key in list(row)[:4]) or "none"
        wanted = "; ".join(" ".join(keys) for keys in SHAPES.values())
        return f"its keys are {keys}; a row has {wanted}"
    if row.get("language") not in (None, *MARK):
        return f"'language' is {row['language']!r}, known are {', '.join(MARK)}"
    texts = [key for key in SHAPES[shape] if key != "options" and not (key == "question" and row[key] == "")]
    if reason := next((why for key in texts if (why := rows.text_fault(key, row[key]))), None):
        return reason
    if "options" not in SHAPES[shape]:
        return None
    if shape == "cloze" and row["text"].count(BLANK) != 1:
        return f"'text' has {row['text'].count(BLANK)} blanks {BLANK}, a cloze has one"
    return _options_fault(row["options"], row["answer"])


def _options_fault(options: object, answer: str) -> str | None:
    if not isinstance(options, list) or len(options) < 2:
        return "'options' is no list of two or more"
    if reason := next((why for option in options if (why := rows.text_fault("options", option))), None):
        return reason
    if len(set(options)) < len(options):
        return "two of its options are the same"
    return None if answer in options else f"the answer {answer[:40]!r} is none of its {len(options)} options"


def task(name: str, found: Iterable[Mapping], about: str, per_character: bool = False, max_tokens: int = 128) -> Task:
    """Rows that `fault` finds nothing wrong with, of one kind, as a task."""
    listed = list(found)
    shape = shape_of(listed[0])
    kind: Kind = "checked" if shape == "checked" else "translation" if shape == "translation" else "choice"
    return Task(name, kind, tuple(map(_question, listed)), about, per_character, max_tokens)


def _question(row: Mapping) -> Question:
    language = row.get("language")
    match shape_of(row):
        case "checked":
            return Question(row["prompt"], row["answer"], language=language)
        case "translation":
            asked = f"Translate from {row['from']} to {row['to']}. Write the translation only.\n\n{row['source']}"
            return Question(asked, row["target"])
        case "cloze":
            before, after = row["text"].split(BLANK)
            context, options = before.rstrip(" "), row["options"]
            space = " " * (len(before) - len(context))
            return _choice(context, [f"{space}{o}{after}" for o in options], row)
    asked = f"{row['question'].rstrip()}\n{MARK[language or 'en']}:" if row["question"] else ""
    return _choice(asked, [f" {o}" if asked else o for o in row["options"]], row)


def _choice(context: str, options: Sequence[str], row: Mapping) -> Question:
    right = row["options"].index(row["answer"])
    return Question(context, row["answer"], tuple(options), right, row.get("language"))
