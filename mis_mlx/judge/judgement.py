"""The result of judging models by their answers: what each of them said, and its figures.

Texts and numbers only: no model is asked here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mis_mlx.judge.answer_figures import AnswerBits, rows_of
from mis_mlx.judge.prompts import Answer, AnswerPair, Prompt
from mis_mlx.types import Row


def text_bytes(answers: Sequence[Answer]) -> np.ndarray:
    """(N,) bytes of the answers' texts."""
    nbytes = [len(answer.text.encode()) for answer in answers]
    return np.array(nbytes, np.int64)


@dataclass(frozen=True)
class ModelAnswers:
    """One model's answers, and how they and the teacher's are judged.

    bits: cost of the teacher's sampled answers under this model. greedy: its own answers, [] where
    it has written none."""

    bits: AnswerBits
    greedy: list[Answer]

    def part(self, chosen: Sequence[int]) -> "ModelAnswers":
        """The same for some of the prompts, by number."""
        return ModelAnswers(
            bits=AnswerBits(self.bits.nats[chosen], self.bits.nbytes[chosen]),
            greedy=[self.greedy[number] for number in chosen if self.greedy],
        )


@dataclass(frozen=True)
class TeacherAnswers:
    """The teacher's answers to prompts, in order, with their cost under the teacher itself."""

    prompts: list[Prompt]
    pairs: list[AnswerPair]

    @property
    def sampled(self) -> list[Answer]:
        """The answers whose cost under a model, in bits, judges the model."""
        return [pair.sampled for pair in self.pairs]

    @property
    def greedy(self) -> list[Answer]:
        """The answers that are shown next to a student's own."""
        return [pair.greedy for pair in self.pairs]

    def part(self, chosen: Sequence[int]) -> "TeacherAnswers":
        """The answers to some of the prompts, by number."""
        return TeacherAnswers(
            prompts=[self.prompts[number] for number in chosen],
            pairs=[self.pairs[number] for number in chosen],
        )


@dataclass(frozen=True)
class Judgement:
    """All models that were judged, by name; the first one is the teacher."""

    answers: TeacherAnswers
    models: dict[str, ModelAnswers]

    @property
    def greedy(self) -> dict[str, list[Answer]]:
        """By name, each model's greedy answers to `answers.prompts`."""
        return {name: said.greedy for name, said in self.models.items()}

    @property
    def rows(self) -> list[Row]:
        """The figures of all models, as in `rows_of`."""
        teacher_name = next(iter(self.models))
        rows = list[Row]()
        for name, said in self.models.items():
            # Nothing is "above the teacher" in the teacher's own row.
            teacher_bits = None if name == teacher_name else self.models[teacher_name].bits
            rows += rows_of(name, said.bits, said.greedy, teacher_bits=teacher_bits)
        return rows

    def part(self, chosen: Sequence[int]) -> "Judgement":
        """The same for some of the prompts, by number, for instance those in one language."""
        said = {name: of_model.part(chosen) for name, of_model in self.models.items()}
        return Judgement(self.answers.part(chosen), said)
