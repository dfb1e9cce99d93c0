"""What a model takes to write many texts: memory, time, and how many side by side.

The model is whole in memory where it fits. Otherwise a token of every text is one streamed pass;
the first one reads all prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from mis_mlx.hardware import ledger
from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.writing import continuous_batch, streamed_batch, text_writer
from mis_mlx.models.writing.continuous_batch import Room
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.planner import estimates
from mis_mlx.types import Budget, Checkpoint

ANSWER_TOKENS = 112  # most of a sampled answer, by which models are judged (judge/answers)
GREEDY_TOKENS = 96  # most of a greedy one
ANSWERS_AT_ONCE = (72, 24, 8, 1)  # written together, as many as fit
PAIRS_AT_ONCE = (144, 96, 72, 48, 24, 8, 2, 1)  # the teacher's, sampled and greedy side by side
PROMPT_TOKENS = 56  # of a prompt there, in the mean: 38 to 111 by the default tokenizer


@dataclass(frozen=True)
class WritingPlan:
    """How a model writes: `at_once` texts side by side.

    headroom_bytes: memory for blocks that stay between passes of a streamed model; None: the model
    is whole in memory. direct: a streamed model is read past the page cache."""

    at_once: int
    peak_bytes: int  # with what the process itself takes
    cost: StageCost  # its peak is without what the process takes
    headroom_bytes: int | None = None
    direct: bool = False
    tokens: int | None = None  # of a text, its prompt included, that memory was planned for

    @property
    def seconds(self) -> float:
        """How long it takes here. Rates are measured for it where none are kept, for a second."""
        return self.cost.seconds(estimates.machine_rates())

    def open(self, checkpoint: Checkpoint) -> TextWriter:
        """The writer of a model that this plan was made for."""
        room = Room(self.at_once, self.tokens)
        return text_writer.opened(checkpoint, self.headroom_bytes, direct=self.direct, room=room)


class Texts(NamedTuple):
    """What is written: so many texts behind prompts of at most so many tokens."""

    number: int
    prompt_tokens: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        """Of a text at its end, its prompt included."""
        return self.prompt_tokens + self.max_tokens


def plan_writing(
    m: ModelSize, texts: Texts, limit: Budget, *, at_once: Sequence[int], name: str = "write"
) -> WritingPlan:
    """How texts are written within the budget.

    The first plan that fits: whole before streamed, and the most texts side by side first, which
    `at_once` lists in falling order. MisError where none fits."""
    sizes = [min(size, texts.number) for size in at_once]
    for whole, size in product((True, False), sizes):
        cost = resident_cost(m, texts, size) if whole else streamed_cost(m, texts, size)
        need = ledger.needed_bytes(limit.limit_bytes, cost.peak_bytes, m.gpu)
        if need > limit.limit_bytes:
            continue
        room = None
        if not whole:
            room = ledger.headroom_bytes(limit.limit_bytes, cost.peak_bytes)
            cost = streamed_cost(m, texts, size, room)
        return WritingPlan(
            at_once=size,
            peak_bytes=need,
            cost=replace(cost, name=name),
            headroom_bytes=room,
            direct=not whole and m.nbytes > limit.limit_bytes,
            tokens=texts.tokens,
        )
    limit.need(
        need,
        what="a model that writes, read from disk,",
        remedy=f"give --budget {estimates.budget_flag(need)}",
    )
    raise AssertionError("what does not fit is refused above")


def resident_cost(m: ModelSize, texts: Texts, at_once: int) -> StageCost:
    """The cost of a model that is whole in memory: every step of a batch fetches all weights."""
    steps = texts.max_tokens * math.ceil(texts.number / at_once)
    met_bytes = int(m.active_share * m.shape.layers * m.block_work) + m.head_work
    return StageCost(
        name="write",
        read_bytes=m.nbytes,
        peak_bytes=continuous_batch.resident_bytes(m, at_once, texts.tokens),
        flops=pass_cost.forward_flops(m, texts.number * texts.tokens, texts.tokens),
        touched_bytes=steps * met_bytes,
        waits=steps,
    )


def streamed_cost(m: ModelSize, texts: Texts, at_once: int, headroom_bytes: int = 0) -> StageCost:
    """The cost of a model that is read once for a token of `at_once` texts.

    The first pass reads their prompts. New texts begin in the passes of those that go on, so that
    there are no more passes than if all of a batch ended together. What stays in the bytes left is
    read once.
    """
    share = pass_cost.stays(m, headroom_bytes).share
    batches = math.ceil(texts.number / at_once)
    passes = []
    for tokens, times in (
        (max(1, texts.prompt_tokens), batches),
        (1, batches * (texts.max_tokens - 1)),
    ):
        one = streamed_batch.pass_cost(m, at_once, tokens, longest=texts.tokens)
        one = replace(one, read_bytes=int(share * one.read_bytes))
        passes.append(one.repeated(times))
    kept = StageCost("weights that stay", read_bytes=int((1 - share) * pass_cost.once_bytes(m)))
    return in_turn("write", *passes, kept)


def answers_cost(
    models: Sequence[ModelSize],
    count: int,
    limit: Budget,
    *,
    teacher_kept: bool = False,
    silent: int = 0,
) -> StageCost:
    """The cost of judging what models answer to `count` prompts (judge/answers).

    The first model is the teacher. All write, and each reads the teacher's sampled answers; the
    teacher reads what all have written.

    teacher_kept: its answers are there already, and what it makes of them. silent: how many of the
    students, the first ones, do not write. MisError where a model cannot write in the budget."""
    teacher, *students = models

    def writing(m: ModelSize, number: int, max_tokens: int, at_once: Sequence[int]) -> StageCost:
        texts = Texts(number, PROMPT_TOKENS, max_tokens)
        return plan_writing(m, texts, limit, at_once=at_once).cost

    def reading(m: ModelSize, number: int, max_tokens: int) -> StageCost:
        # hidden states of all prompts with their answers stay; then comes the head
        return comparison_cost([m], windows=number, length=PROMPT_TOKENS + max_tokens)

    costs = [StageCost("")]
    if not teacher_kept:
        # sampled and greedy answers side by side, and one pass over both
        costs.append(writing(teacher, 2 * count, ANSWER_TOKENS, PAIRS_AT_ONCE))
        costs.append(reading(teacher, 2 * count, ANSWER_TOKENS))
    for number, student in enumerate(students):
        costs.append(reading(student, count, ANSWER_TOKENS))
        if number >= silent:
            costs.append(writing(student, count, GREEDY_TOKENS, ANSWERS_AT_ONCE))
            costs.append(reading(teacher, count, GREEDY_TOKENS))
    return in_turn("answers", *costs)
