"""A model writes answers to prompts, several at once.

Nothing in here knows whose answers these are, nor where they are kept."""

from collections.abc import Iterator, Sequence
from typing import Any

from mis_mlx.judge import writing_cost
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing import mlx_generate
from mis_mlx.models.writing.draws import Draws
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.types import Budget, Checkpoint

HALF_LETTER = "\ufffd"  # an answer that was cut off inside a letter decodes to this at its end


def plan(
    model: Checkpoint,
    asked: Sequence[Prompt],
    max_tokens: int,
    limit: Budget,
    *,
    at_once: Sequence[int],
) -> writing_cost.WritingPlan:
    """How a model's answers are written within the budget. MisError where nothing fits."""
    tokenizer = load.tokenizer(model.path)
    lengths = [len(_ids(tokenizer, prompt)) for prompt in asked]
    texts = writing_cost.Texts(len(asked), max(lengths), max_tokens)
    return writing_cost.plan_writing(model_of(model), texts, limit, at_once=at_once)


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids up to where the answer begins."""
    return mlx_generate.chat_ids(tokenizer, prompt.messages, tools=prompt.tools)


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
