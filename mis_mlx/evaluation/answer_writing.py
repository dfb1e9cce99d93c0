"""A model writes answers to prompts, several at once.

Nothing in here knows whose answers these are, nor where they are kept."""

from collections.abc import Sequence
from typing import Any

from mis_mlx.evaluation import writing_cost
from mis_mlx.evaluation.answer_records import Answer, Prompt
from mis_mlx.models import load, mlx_generate
from mis_mlx.models.mlx_generate import Sampler
from mis_mlx.models.model_size import model_of
from mis_mlx.models.text_writer import TextWriter
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
    lengths = [len(mlx_generate.chat_ids(tokenizer, prompt.messages)) for prompt in asked]
    return writing_cost.plan_writing(
        model_of(model),
        len(asked),
        max_tokens,
        limit,
        prompt_tokens=max(lengths),
        at_once=[min(size, len(asked)) for size in at_once],
    )


def answered(
    writer: TextWriter,
    tokenizer: Any,
    batch: Sequence[Prompt],
    max_tokens: int,
    *,
    samplers: Sequence[Sampler] = (),
) -> list[Answer]:
    """One answer to each prompt, all written together.

    samplers: one for each prompt; () for greedy answers."""
    stops = set(tokenizer.eos_token_ids)
    prompt_ids = [mlx_generate.chat_ids(tokenizer, prompt.messages) for prompt in batch]
    answers = []
    for ids in writer.write(prompt_ids, max_tokens, stop=stops, samplers=samplers):
        ended = ids[-1] in stops
        if ended:
            ids = ids[:-1]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not ended:
            text = text.rstrip(HALF_LETTER)
        answers.append(Answer(text, ended))
    return answers
