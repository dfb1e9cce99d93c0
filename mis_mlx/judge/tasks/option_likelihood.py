"""How likely each option is after its question: log-likelihoods, as lm-eval defines them. Streamed.

A question is plain text, or a user's turn in the model's chat template, and the options replies.
Each option is a text of its own, behind its question.
"""

from collections.abc import Sequence
from typing import Any

from mis_mlx.data import token_windows
from mis_mlx.judge.score import of_last_tokens
from mis_mlx.models.passing.stream import Stream
from mis_mlx.types import MisError

# token ids of the context (at least one), and of every option
Encoded = tuple[list[int], list[list[int]]]


def encode(tokenizer: Any, context: str, options: Sequence[str]) -> Encoded:
    """Token ids of a context and of its options, as lm-eval cuts them.

    An option is what context + option has more than the context alone. White space at the end of a
    context goes to its options. An empty context is the start token, or the end token where there
    is none. MisError where an option adds no token.
    """
    bare = context.rstrip()
    space = context[len(bare) :]
    options = [space + option for option in options]
    before = list(tokenizer.encode(bare))
    if not before:
        start = tokenizer.bos_token_id
        before = [tokenizer.eos_token_id if start is None else start]
    added = []
    for option in options:
        if bare:
            together = list(tokenizer.encode(bare + option))
            added.append(together[len(before) :])
        else:
            added.append(list(tokenizer.encode(option, add_special_tokens=False)))
    if not all(added):
        lost = options[added.index([])]
        raise MisError(
            f"the option {lost[:40]!r} adds no token to {bare[-40:]!r}: write it so that it begins "
            f"a word"
        )
    return before, added


def encode_replies(tokenizer: Any, asked: str, options: Sequence[str]) -> Encoded:
    """Token ids of a user's turn through the chat template, and of every option as the reply to it.

    MisError where the template refuses the turn, or a reply has no token.
    """
    try:
        before = token_windows.prompt_ids([{"role": "user", "content": asked}], tokenizer)
    except Exception as error:  # a template is a program of the model's: it can raise anything
        raise MisError(
            f"the chat template refuses {asked[:40]!r} ({error}): remove the question, or give "
            f"--no-apply-chat-template"
        ) from error
    replies = []
    for option in options:
        reply = option.strip()
        replies.append(list(tokenizer.encode(reply, add_special_tokens=False)))
    if not all(replies):
        raise MisError(f"an option of {asked[:40]!r} has no token: write words there")
    return before, replies


def texts_of(e: Encoded) -> list[list[int]]:
    """A question as a text for each of its options: token ids of context and option."""
    context, options = e
    return [[*context, *option] for option in options]


def score(stream: Stream, encoded: Sequence[Encoded]) -> list[list[float]]:
    """Log-likelihood in nats of every option of every question, in one pass of the weights."""
    texts = list[list[int]]()
    counts = list[int]()
    for question in encoded:
        texts += texts_of(question)
        counts += map(len, question[1])
    found = iter(of_last_tokens(stream, texts, counts))
    return [[float(next(found).sum()) for _ in options] for _, options in encoded]
