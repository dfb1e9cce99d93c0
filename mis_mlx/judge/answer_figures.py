"""Figures of answers: their cost in bits per byte, how many go wrong, intervals over prompts.

Texts and numbers only: no model is asked here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mis_mlx.judge import repetition
from mis_mlx.judge.prompts import Answer
from mis_mlx.maths import stats
from mis_mlx.types import Row

MORE_LOOPS = 10.0  # points above the teacher's loops, from which on a student is warned about


@dataclass(frozen=True)
class AnswerBits:
    """The cost of N answers under a model.

    nats (N,): of each answer's tokens, with its end. nbytes (N,): of its text."""

    nats: np.ndarray
    nbytes: np.ndarray

    @property
    def per_byte(self) -> float:
        """Bits per byte of all answers together."""
        return float(self.nats.sum() / math.log(2) / self.nbytes.sum())


class Verdict(NamedTuple):
    """The faults of an answer; it has none where all three are False."""

    loops: bool
    empty: bool
    endless: bool


def verdict(answer: Answer) -> Verdict:
    """The faults of a greedy answer."""
    has_words = any(character.isalnum() for character in answer.text)
    return Verdict(
        loops=repetition.loops(answer.text), empty=not has_words, endless=not answer.ended
    )


def rows_of(
    name: str,
    cost: AnswerBits,
    greedy: Sequence[Answer] | None = None,
    *,
    teacher_bits: AnswerBits | None = None,
) -> list[Row]:
    """The figures of a model. Intervals are over prompts, 95 %; a ratio's error is linearised.

    answers: bits per byte. answers_excess: those above the teacher's, paired by prompt. loops,
    empty, endless: percent of the greedy answers."""
    rows = []
    prompts = len(cost.nats)
    if cost.nbytes.sum() > 0:
        bits = bits_per_byte(cost.nats, cost.nbytes)
        rows.append(Row(name, "answers", *bits, n=prompts))
        if teacher_bits is not None:
            excess = bits_per_byte(cost.nats - teacher_bits.nats, cost.nbytes)
            rows.append(Row(name, "answers_excess", *excess, n=prompts))
    if greedy:
        prompts = len(greedy)
        verdicts = np.array([verdict(answer) for answer in greedy])
        shares = 100.0 * verdicts.mean(axis=0)
        for metric, share in zip(Verdict._fields, shares, strict=True):
            rows.append(Row(name, metric, float(share), n=prompts))
    return rows


def bits_per_byte(nats: np.ndarray, nbytes: np.ndarray) -> tuple[float, float, float]:
    """(bits per byte of all texts together, low, high), from nats and bytes (N,) of each text.

    The interval is 95 %, over texts; the ratio's error is linearised.
    """
    bits = nats / math.log(2)
    ratio = bits.sum() / nbytes.sum()
    # To first order a ratio of means moves as the mean of these values does.
    deviations = (bits - ratio * nbytes) / nbytes.mean()
    return stats.interval(ratio + deviations)
