"""Figures of answers: what they cost in bits per byte, how many go wrong, and intervals over
prompts.

Texts and numbers only: no model is asked here.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mis_mlx.evaluation.answer_records import Answer
from mis_mlx.maths import stats
from mis_mlx.types import Row

LOOP_WORDS = 20  # an answer that loops has more
LOOP_SHARE = 0.35  # of its bytes, and zlib packs it to fewer
MORE_LOOPS = 10.0  # percent above the teacher's: from there on a student is said to repeat itself


@dataclass(frozen=True)
class AnswerBits:
    """Of every answer (N,): nats of its tokens under a model, with its end; bytes of its text."""

    nats: np.ndarray
    nbytes: np.ndarray

    @property
    def per_byte(self) -> float:
        """Bits per byte of all answers together."""
        return float(self.nats.sum() / math.log(2) / self.nbytes.sum())


class Verdict(NamedTuple):
    """What is wrong with an answer."""

    loops: bool
    empty: bool
    endless: bool


def loops(text: str) -> bool:
    """Whether a text repeats itself: more than LOOP_WORDS words that pack to under LOOP_SHARE."""
    raw = text.encode()
    return len(text.split()) > LOOP_WORDS and len(zlib.compress(raw)) < LOOP_SHARE * len(raw)


def verdict(answer: Answer) -> Verdict:
    """What is wrong with a greedy answer; nothing, where all three are False."""
    return Verdict(
        loops=loops(answer.text),
        empty=not any(character.isalnum() for character in answer.text),
        endless=not answer.ended,
    )


def rows_of(
    name: str,
    of: AnswerBits,
    greedy: Sequence[Answer] | None = None,
    logprob: float | None = None,
    *,
    teacher_bits: AnswerBits | None = None,
) -> list[Row]:
    """The figures of a model. Intervals are over prompts, 95 %; a ratio's error is linearised.

    answers: bits per byte. answers_excess: those above the teacher's, paired by prompt. loops,
    empty, endless: percent of the greedy answers. teacher_logprob: nats per token."""
    found = list[Row]()
    count = len(of.nats)
    if of.nbytes.sum() > 0:
        found.append(Row(name, "answers", *_ratio(of.nats, of.nbytes), n=count))
        if teacher_bits is not None:
            excess = of.nats - teacher_bits.nats
            found.append(Row(name, "answers_excess", *_ratio(excess, of.nbytes), n=count))
    if greedy:
        verdicts = np.array([verdict(answer) for answer in greedy])
        shares = 100.0 * verdicts.mean(axis=0)
        for metric, share in zip(Verdict._fields, shares, strict=True):
            found.append(Row(name, metric, float(share), n=len(greedy)))
    if logprob is not None and not math.isnan(logprob):
        found.append(Row(name, "teacher_logprob", logprob, n=len(greedy) if greedy else count))
    return found


def _ratio(nats: np.ndarray, nbytes: np.ndarray) -> tuple[float, float, float]:
    """(bits per byte of all together, low, high), as comparison.rows_of has it for windows."""
    values = nats / math.log(2)
    ratio = values.sum() / nbytes.sum()
    return stats.interval(ratio + (values - ratio * nbytes) / nbytes.mean())
