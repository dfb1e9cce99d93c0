"""A model writes answers to prompts, several at once: in which way, what that takes, and the texts.

The model is whole in memory where it fits. Otherwise a token of every text is one streamed pass;
the first one reads all prompts. Nothing in here knows whose answers these are, nor where they are
kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mis_mlx.data import token_windows
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.writing import streamed_batch, text_writer
from mis_mlx.models.writing.draws import Draws
from mis_mlx.models.writing.streamed_batch import Texts
from mis_mlx.models.writing.text_writer import Room, TextWriter
from mis_mlx.planner import estimates
from mis_mlx.types import Budget, Checkpoint

HALF_LETTER = "\ufffd"  # an answer that was cut off inside a letter decodes to this at its end
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
    m: ModelSize, texts: Texts, limit: Budget, *, at_once: Sequence[int], name: str = "write"
) -> WritingPlan:
    """How texts are written within the budget.

    The first plan that fits: whole before streamed, and the most texts side by side first, which
    `at_once` lists in falling order. MisError where none fits."""
    sizes = [min(size, texts.number) for size in at_once]
    for whole, size in product((True, False), sizes):
        cost = streamed_batch.writing_cost(m, texts, size, None if whole else 0)
        need = m.text_bytes + memory.needed_bytes(cost.peak_bytes)
        if need > limit.limit_bytes:
            continue
        room = None
        if not whole:
            room = limit.limit_bytes - need
            cost = streamed_batch.writing_cost(m, texts, size, room)
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


def plan(
    model: Checkpoint,
    asked: Sequence[Prompt],
    max_tokens: int,
    limit: Budget,
    *,
    at_once: Sequence[int],
) -> WritingPlan:
    """How a model's answers are written within the budget. MisError where nothing fits."""
    tokenizer = load.tokenizer(model.path)
    lengths = [len(_ids(tokenizer, prompt)) for prompt in asked]
    texts = Texts(len(asked), max(lengths), max_tokens)
    return plan_writing(model_of(model), texts, limit, at_once=at_once)


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids up to where the answer begins."""
    return token_windows.prompt_ids(prompt.messages, tokenizer, tools=prompt.tools)


def answered(
    writer: TextWriter,
    tokenizer: Any,
    asked: Sequence[Prompt],
    max_tokens: int | Sequence[int],
    *,
    draws: Draws | None = None,
) -> Iterator[tuple[int, Answer]]:
    """(number, its answer) of every prompt, each as soon as it has ended.

    max_tokens: of every answer, or of each. draws: of the answers, by the number of their prompt;
    default: greedily."""
    limits = max_tokens
    if isinstance(limits, int):
        limits = [limits] * len(asked)
    stops = set(tokenizer.eos_token_ids)
    prompt_ids = [_ids(tokenizer, prompt) for prompt in asked]
    for number, ids in writer.completions(prompt_ids, max(limits, default=0), stops, draws):
        ids = ids[: limits[number]]  # it was written beside longer ones
        ended = ids[-1] in stops
        if ended:
            ids = ids[:-1]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not ended:
            text = text.rstrip(HALF_LETTER)
        yield number, Answer(text, ended)


def answers_cost(
    models: Sequence[ModelSize],
    count: int,
    limit: Budget,
    *,
    teacher_kept: bool = False,
    silent: int = 0,
) -> StageCost:
    """The cost of judging what models answer to `count` prompts (judge/answers).

    The first model is the teacher. All write, and each reads the teacher's sampled answers.

    teacher_kept: its answers are there already, with their cost. silent: how many of the
    students, the first ones, do not write. MisError where a model cannot write in the budget."""
    teacher, *students = models

    def writing(m: ModelSize, number: int, max_tokens: int, at_once: Sequence[int]) -> StageCost:
        texts = Texts(number, PROMPT_TOKENS, max_tokens)
        return plan_writing(m, texts, limit, at_once=at_once).cost

    def reading(m: ModelSize) -> StageCost:
        # hidden states of all prompts with their answers stay; then comes the head
        return comparison_cost([m], windows=count, length=PROMPT_TOKENS + ANSWER_TOKENS)

    costs = [StageCost("")]
    if not teacher_kept:
        # sampled and greedy answers side by side, and one pass over the sampled ones
        costs.append(writing(teacher, 2 * count, ANSWER_TOKENS, PAIRS_AT_ONCE))
        costs.append(reading(teacher))
    for number, student in enumerate(students):
        costs.append(reading(student))
        if number >= silent:
            costs.append(writing(student, count, GREEDY_TOKENS, ANSWERS_AT_ONCE))
    return in_turn("answers", *costs)
