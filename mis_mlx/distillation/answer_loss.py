"""What a student loses on the teacher's answers: the loss by which sizes are chosen.

The conversations are those of the training text's source that stand in no training window
(`preparation.Data.talks`). The final judge (judge/answers) has other prompts: the ones that
chose a student do not judge it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mis_mlx.data.rows import Row
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.judge.score import log_probabilities
from mis_mlx.maths import stats
from mis_mlx.types import Checkpoint

FEWEST = 8  # conversations, below which the loss is measured on text
MOST = 40
# answers of another model: the teacher's probabilities say more of a token than one draw does
MOST_OF_OTHERS = 24


@dataclass(frozen=True)
class AnswerLoss:
    """Answers to some prompts. nbytes (N,): of each answer's text.

    own: the teacher gave them; else another model did, and what is lost on them is told by the
    teacher's probabilities, not by what the answers cost.
    """

    teacher: Checkpoint
    prompts: list[Prompt]
    answers: list[Answer]
    nbytes: np.ndarray
    own: bool = True

    @cached_property
    def nats(self) -> np.ndarray:
        """(N,) nats of each answer under the teacher itself: a streamed pass, when first used."""
        return self._nats_of(self.teacher)

    def _nats_of(self, model: Checkpoint) -> np.ndarray:
        """(N,) nats of each answer under a model: one streamed pass."""
        by_answer = log_probabilities(model, self.prompts, self.answers)
        return np.array([-values.sum() for values in by_answer])

    def by_answer(self, student: Checkpoint) -> np.ndarray:
        """(N,) nats a byte that a student needs more than the teacher.

        Their mean is that of all bytes. One streamed pass. The student has its own tokenizer,
        perhaps with fewer tokens.
        """
        excess_nats = self._nats_of(student) - self.nats
        return np.asarray(excess_nats / self.nbytes.mean())

    def excess(self, student: Checkpoint) -> float:
        """Nats a byte of all answers together that a student needs more than the teacher."""
        return float(self.by_answer(student).mean())

    def bits(self, student: Checkpoint) -> list[float]:
        """(N,) `by_answer`, in bits."""
        return [float(value) / math.log(2) for value in self.by_answer(student)]


def of_talks(teacher: Checkpoint, talks: Sequence[Row], *, own: bool = True) -> AnswerLoss | None:
    """The loss on the last answer of each conversation, up to MOST of them, evenly spread.

    own: as of `AnswerLoss`; up to MOST_OF_OTHERS else. None where there are fewer than FEWEST: it
    would say nothing.
    """
    prompts = []
    answers = []
    for row in talks:
        messages = row.get("messages")
        if not isinstance(messages, list) or len(messages) < 2:
            continue
        *before, last = messages
        if last["role"] != "assistant" or not last["content"].strip():
            continue
        prompts.append(Prompt(tuple(before), kind="", language="en"))
        # Some were cut off at their longest: whether one ends here is not judged.
        answers.append(Answer(last["content"], ended=False))
    if len(prompts) < FEWEST:
        return None
    most = MOST if own else MOST_OF_OTHERS
    chosen = stats.spread(len(prompts), most)
    prompts = [prompts[number] for number in chosen]
    answers = [answers[number] for number in chosen]
    return AnswerLoss(
        teacher=teacher,
        prompts=prompts,
        answers=answers,
        nbytes=np.array([len(answer.text.encode()) for answer in answers], np.float64),
        own=own,
    )
