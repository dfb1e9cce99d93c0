"""How many test questions share words with the training text: runs of 13 words in a row, as GPT-3's authors counted.

Words are compared without case and marks (arXiv 2005.14165, appendix C). A question shorter than 13 words is looked up
whole; one of fewer than five says nothing and is not counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mis_mlx.data import sources
from mis_mlx.data.rows import Row
from mis_mlx.evaluation.questions import Question, Task

SPAN, LEAST = 13, 5


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def training_words(data: str | None) -> list[str]:
    """All words of a data source's training rows; None: both built-in texts."""
    names = [data] if data else [None, sources.MIS]
    return [word for name in names for row in sources.load(name).train for word in words(text_of(row))]


def text_of(row: Row) -> str:
    """All that a training row says."""
    messages = row.get("messages") or []
    return " ".join([row.get(key, "") for key in ("text", "prompt", "completion")] + [m["content"] for m in messages])


class Known:
    """The training text, ready to be asked."""

    def __init__(self, known: Sequence[str]):
        self._runs = {hash(run) for run in _runs(known)}
        self._whole = f" {' '.join(known)} "

    def holds(self, q: Question) -> bool | None:
        """Whether question and answer share a run with the training text; None where they are too short to be looked
        up."""
        asked = words(q.context + (q.options[q.right] if q.options else f" {q.answer}"))
        if len(asked) >= SPAN:
            return any(hash(run) in self._runs for run in _runs(asked))
        return f" {' '.join(asked)} " in self._whole if len(asked) >= LEAST else None

    def overlap(self, task: Task) -> tuple[int, int]:
        """(questions that share a run with the training text, questions long enough to be looked up)."""
        looked_up = [held for q in task.questions if (held := self.holds(q)) is not None]
        return sum(looked_up), len(looked_up)


def _runs(known: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(known[at:] for at in range(SPAN)), strict=False)
