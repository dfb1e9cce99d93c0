"""What a model takes to write many texts: memory, time, and how many side by side.

The model is whole in memory where it fits. Otherwise a token of every text is one streamed pass;
the first one reads all prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mis_mlx.hardware import ledger
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.judging_cost import comparison_cost
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


def plan_writing(
    m: ModelSize,
    count: int,
    max_tokens: int,
    limit: Budget,
    *,
    prompt_tokens: int = 0,
    at_once: Sequence[int],
    name: str = "write",
) -> WritingPlan:
    """How `count` texts of `max_tokens` are written within the budget.

    The first plan that fits: whole before streamed, and the most texts side by side first, which
    `at_once` lists in falling order. MisError where none fits."""
    texts = _Texts(count, prompt_tokens, max_tokens)
    for cost_of in (_resident, _streamed):
        for size in at_once:
            cost = replace(cost_of(m, texts, size), name=name)
            need = ledger.needed_bytes(limit.limit_bytes, cost.peak_bytes, m.gpu)
            if need > limit.limit_bytes:
                continue
            plan = WritingPlan(at_once=size, peak_bytes=need, cost=cost, tokens=texts.tokens)
            return plan if cost_of is _resident else _from_disk(plan, m, limit)
    limit.need(
        need,
        what="a model that writes, read from disk,",
        remedy=f"give --budget {estimates.budget_flag(need)}",
    )
    raise AssertionError("what does not fit is refused above")


def _from_disk(plan: WritingPlan, m: ModelSize, limit: Budget) -> WritingPlan:
    """The plan of a streamed model with what the budget leaves for blocks that stay."""
    room_bytes = ledger.headroom_bytes(limit.limit_bytes, plan.cost.peak_bytes)
    return replace(
        plan,
        cost=_with_headroom(plan.cost, m, room_bytes),
        headroom_bytes=room_bytes,
        direct=m.nbytes > limit.limit_bytes,
    )


class _Texts(NamedTuple):
    """What is written: so many texts behind prompts of at most so many tokens."""

    number: int
    prompt_tokens: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        """Of a text at its end, its prompt included."""
        return self.prompt_tokens + self.max_tokens


def _resident(m: ModelSize, texts: _Texts, at_once: int) -> StageCost:
    """The cost of a model that is whole in memory: every step of a batch fetches all weights."""
    steps = texts.max_tokens * -(-texts.number // at_once)
    blocks_bytes = m.shape.layers * m.block_work
    met_bytes = int(m.active_share * blocks_bytes) + m.head_work
    peak_bytes = continuous_batch.resident_bytes(m, at_once, texts.tokens)
    return StageCost(
        name="",
        read_bytes=m.nbytes,
        peak_bytes=peak_bytes,
        flops=_flops(m, texts),
        touched_bytes=steps * met_bytes,
        waits=steps,
    )


def _flops(m: ModelSize, texts: _Texts) -> float:
    return pass_cost.forward_flops(m, texts.number * texts.tokens, texts.tokens)


def _streamed(m: ModelSize, texts: _Texts, at_once: int) -> StageCost:
    """The cost of a model that is read once for a token of `at_once` texts.

    The first pass reads their prompts. New texts begin in the passes of those that go on, so that
    there are no more passes than if all of a batch ended together.
    """
    batches = -(-texts.number // at_once)
    prompt_tokens = max(1, texts.prompt_tokens)
    begins = streamed_batch.pass_cost(m, at_once, prompt_tokens, longest=texts.tokens)
    goes_on = streamed_batch.pass_cost(m, at_once, tokens=1, longest=texts.tokens)
    further = goes_on.repeated(batches * (texts.max_tokens - 1))
    cost = begins.repeated(batches).then(further)
    return replace(cost, flops=_flops(m, texts))


def _with_headroom(cost: StageCost, m: ModelSize, headroom_bytes: int) -> StageCost:
    """The cost of a streamed writer with room for what is read once: the head, then blocks."""
    left_bytes = headroom_bytes - m.head_work
    if left_bytes < 0:
        return cost
    pinned = pass_cost.resident_blocks(m, left_bytes)
    once = m.head_bytes + m.shape.layers * m.block_bytes
    again = m.head_bytes + pinned * m.block_bytes
    share = 1 - again / once
    return replace(cost, read_bytes=once + int(share * (cost.read_bytes - once)), pinned=pinned)


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
    costs = list[StageCost]()
    if not teacher_kept:
        # sampled and greedy answers side by side, and one pass over both
        costs.append(_answering(teacher, 2 * count, ANSWER_TOKENS, limit, PAIRS_AT_ONCE))
        costs.append(_reading(teacher, 2 * count, ANSWER_TOKENS))
    for number, student in enumerate(students):
        costs.append(_reading(student, count, ANSWER_TOKENS))
        if number >= silent:
            costs.append(_answering(student, count, GREEDY_TOKENS, limit, ANSWERS_AT_ONCE))
            costs.append(_reading(teacher, count, GREEDY_TOKENS))
    total = StageCost(name="answers")
    for cost in costs:
        total = total.then(cost)
    return total


def _answering(
    m: ModelSize, count: int, max_tokens: int, limit: Budget, at_once: Sequence[int]
) -> StageCost:
    """The cost of `count` answers of a model, written as the budget allows."""
    plan = plan_writing(
        m,
        count,
        max_tokens,
        limit,
        prompt_tokens=PROMPT_TOKENS,
        at_once=[min(size, count) for size in at_once],
    )
    return plan.cost


def _reading(m: ModelSize, count: int, max_tokens: int) -> StageCost:
    """One pass over all prompts with their answers, whose hidden states stay; then the head."""
    return comparison_cost([m], windows=count, length=PROMPT_TOKENS + max_tokens)
