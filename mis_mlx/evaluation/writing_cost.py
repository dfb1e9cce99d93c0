"""What a model takes to write many texts: memory, time, and how many side by side.

The model is whole in memory where it fits. Otherwise a token of every text is one streamed pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mis_mlx.evaluation.judging_cost import comparison_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models import pass_cost
from mis_mlx.models.model_size import ModelSize
from mis_mlx.planner import estimates
from mis_mlx.settings.workloads import ANSWER_TOKENS, ANSWERS_AT_ONCE, GREEDY_TOKENS
from mis_mlx.types import Budget

CACHE_STEP = 256  # tokens by which mlx-lm's caches grow
PROMPT_TOKENS = 56  # of a prompt there, in the mean: 38 to 111 by the default tokenizer
LOGIT_COPIES = 4  # logits in float32, log-probabilities, what a sampler makes of them


@dataclass(frozen=True)
class WritingPlan:
    """How a model writes: `at_once` texts side by side.

    headroom_bytes: memory for blocks that stay between passes of a streamed model; None: the model
    is
    whole in memory. direct: a streamed model is read past the page cache."""

    at_once: int
    peak_bytes: int  # with what the process itself takes
    cost: StageCost  # its peak is without what the process takes
    headroom_bytes: int | None = None
    direct: bool = False

    @property
    def seconds(self) -> float:
        """How long it takes here. Rates are measured for it where none are kept, for a second."""
        return self.cost.seconds(estimates.machine_rates())


def resident_bytes(m: ModelSize, at_once: int, tokens: int) -> int:
    """Memory of a model that writes, whole in memory.

    Its weights as they compute and one tensor as stored, keys and values, logits. tokens: of a
    text, its prompt included. mlx-lm holds keys and values up to three times."""
    places = CACHE_STEP * -(-tokens // CACHE_STEP)
    logits = LOGIT_COPIES * 4 * m.shape.vocab
    return pass_cost.whole_bytes(m) + at_once * (3 * pass_cost.keys_bytes(m, places) + logits)


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
    own_bytes = memory.process_bytes(limit.limit_bytes, m.gpu)
    for size in at_once:
        cost = _resident(m, count, max_tokens, prompt_tokens=prompt_tokens, at_once=size)
        need = own_bytes + cost.peak_bytes
        if need <= limit.limit_bytes:
            return WritingPlan(
                at_once=size,
                peak_bytes=need,
                cost=replace(cost, name=name),
            )
    for size in at_once:
        one_pass = _streamed_pass(m, size, max_tokens, prompt_tokens)
        need = own_bytes + one_pass.peak_bytes
        if need <= limit.limit_bytes:
            passes = (prompt_tokens + max_tokens) * -(-count // size)
            cost = replace(one_pass, name=name).repeated(passes)
            return WritingPlan(
                at_once=size,
                peak_bytes=need,
                cost=cost,
                headroom_bytes=pass_cost.headroom_bytes(limit.limit_bytes, one_pass.peak_bytes),
                direct=memory.crowds_page_cache(m.nbytes, limit),
            )
    limit.need(
        need,
        what="a model that writes, read from disk,",
        remedy=f"give --budget {estimates.budget_flag(need)}",
    )
    raise AssertionError("what does not fit is refused above")


def _resident(
    m: ModelSize, count: int, max_tokens: int, *, prompt_tokens: int, at_once: int
) -> StageCost:
    """The cost of a model that is whole in memory: every step of a batch fetches all weights."""
    length = prompt_tokens + max_tokens
    steps = max_tokens * -(-count // at_once)
    met_bytes = int(m.active_share * m.shape.layers * m.block_work) + m.head_work
    return StageCost(
        name="write",
        read_bytes=m.nbytes,
        written_bytes=0,
        peak_bytes=resident_bytes(m, at_once, length),
        flops=pass_cost.forward_flops(m, count * length, length),
        touched_bytes=steps * met_bytes,
        waits=steps,
    )


def _streamed_pass(
    m: ModelSize,
    at_once: int,
    max_tokens: int,
    prompt_tokens: int,
) -> StageCost:
    """One token of `at_once` texts, keys and values of all of them in memory."""
    length = prompt_tokens + max_tokens
    places = CACHE_STEP * (1 + -(-length // CACHE_STEP))
    return pass_cost.streamed_pass(
        "a token",
        m,
        tokens=at_once,
        micro_tokens=at_once,
        length=length,
        spool=False,
        beside_bytes=at_once * pass_cost.keys_bytes(m, places),
    )


def answers_cost(
    models: Sequence[ModelSize],
    count: int,
    limit: Budget,
    *,
    teacher_kept: bool = False,
    silent: int = 0,
) -> StageCost:
    """The cost of judging what models answer to `count` prompts (evaluation/answers).

    The first model is the teacher. All write, and each reads the teacher's sampled answers; the
    teacher reads what all have written.

    teacher_kept: its answers are there already, and what it makes of them. silent: how many of the
    students, the first ones, do not write. MisError where a model cannot write in the budget."""
    teacher, *students = models
    costs = list[StageCost]()
    if not teacher_kept:
        costs.append(_answering(teacher, count, ANSWER_TOKENS, limit))
        costs.append(_answering(teacher, count, GREEDY_TOKENS, limit))
        costs.append(_reading(teacher, count, ANSWER_TOKENS))
        costs.append(_reading(teacher, count, GREEDY_TOKENS))
    for number, student in enumerate(students):
        costs.append(_reading(student, count, ANSWER_TOKENS))
        if number >= silent:
            costs.append(_answering(student, count, GREEDY_TOKENS, limit))
            costs.append(_reading(teacher, count, GREEDY_TOKENS))
    total = StageCost(name="answers", read_bytes=0, written_bytes=0, peak_bytes=0, flops=0.0)
    for cost in costs:
        total = total.then(cost)
    return total


def _answering(m: ModelSize, count: int, max_tokens: int, limit: Budget) -> StageCost:
    """The cost of `count` answers of a model, written as the budget allows."""
    plan = plan_writing(
        m,
        count,
        max_tokens,
        limit,
        prompt_tokens=PROMPT_TOKENS,
        at_once=[min(size, count) for size in ANSWERS_AT_ONCE],
    )
    return plan.cost


def _reading(m: ModelSize, count: int, max_tokens: int) -> StageCost:
    """One pass over all prompts with their answers, whose hidden states stay; then the head."""
    return comparison_cost([m], windows=count, length=PROMPT_TOKENS + max_tokens)
