"""How likely each option is after its question: log-likelihoods, as lm-eval defines them. Streamed.

A question is plain text, or a user's turn in the model's chat template, and the options replies.

A question is computed once for all its options, which do not see each other. Questions share
sequences, without padding.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.losses import chunk_rows
from mis_mlx.models.architectures import sizes
from mis_mlx.models.opening import load
from mis_mlx.models.passing import attention_masks
from mis_mlx.models.passing.stream import Hidden, Stream
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.models.writing import mlx_generate
from mis_mlx.types import MisError, grouped

# tokens of a sequence; more make attention slower, fewer the matrix products
ROWS = 256
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
    before = list(tokenizer.encode(bare)) or [_first_token(tokenizer)]
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
        before = mlx_generate.chat_ids(tokenizer, [{"role": "user", "content": asked}])
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


def _first_token(tokenizer: Any) -> int:
    """The token that stands before a text without context."""
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    return start


class Pack(NamedTuple):
    """Several questions with their options in one sequence of S tokens.

    which: the questions' numbers. tokens (1, S). positions (S,): of each token in its own text.
    sees (S, S): which token attends to which. The other fields describe the P predicted tokens:
    row (P,): the place in the sequence that predicts it; token (P,): its id; owner (P, 2): its
    question and its option.
    """

    which: tuple[int, ...]
    tokens: mx.array
    positions: np.ndarray
    sees: mx.array
    row: np.ndarray
    token: np.ndarray
    owner: np.ndarray


def length(e: Encoded) -> int:
    """Tokens that a question takes in a sequence: an option's last token is predicted only."""
    context, options = e
    option_tokens = sum(len(option) - 1 for option in options)
    return len(context) + option_tokens


def packs(encoded: Sequence[Encoded], rows: int = ROWS) -> Iterator[Pack]:
    """All questions in sequences of up to `rows` tokens, those of similar length together."""
    lengths = [length(question) for question in encoded]
    # A stable sort: questions of one length stay in their order.
    longest_first = sorted(range(len(encoded)), key=lengths.__getitem__, reverse=True)
    for which in grouped(longest_first, lengths.__getitem__, rows):
        yield _pack(encoded, which)


def _pack(encoded: Sequence[Encoded], which: Sequence[int]) -> Pack:
    """The sequence of these questions: each context, and behind it all options, side by side."""
    # for each token of the sequence: its id, position, question, branch (0: context, else option)
    seen = []
    # for each predicted token: the row that predicts it, its id, question, option
    predicted = []
    for number in which:
        context, options = encoded[number]
        for position, token in enumerate(context):
            seen.append((token, position, number, 0))
        last_row = len(seen) - 1
        for choice, option in enumerate(options):
            # The context's last token predicts the option's first one. The option's last token is
            # predicted only: nothing follows it, so it takes no row.
            next_row = len(seen)
            own_rows = range(next_row, next_row + len(option) - 1)
            for row, token in zip([last_row, *own_rows], option, strict=True):
                predicted.append((row, token, number, choice))
            for position, token in enumerate(option[:-1], len(context)):
                seen.append((token, position, number, choice + 1))
    tokens, positions, text, branch = np.array(seen, np.int32).T
    row_of, token_of, *owner = np.array(predicted).T
    order = np.arange(len(tokens))
    earlier = order[:, None] >= order
    same_text = text[:, None] == text
    # An option sees its context and itself, not the other options.
    in_context = branch == 0
    same_option = branch[:, None] == branch
    same_branch = in_context | same_option
    return Pack(
        which=tuple(which),
        tokens=mx.array(tokens[None]),
        positions=positions,
        sees=mx.array(earlier & same_text & same_branch),
        row=row_of,
        token=token_of,
        owner=np.stack(owner, axis=1),
    )


def score(
    stream: Stream,
    encoded: Sequence[Encoded],
    rows: int = ROWS,
) -> list[list[float]]:
    """Log-likelihood in nats of every option of every question, in one pass of the weights."""
    if sizes.reads_in_order(stream.checkpoint.config):
        raise MisError(
            f"{stream.checkpoint.path} reads one text after the other, so a question's options "
            f"cannot share its context: leave out --tasks whose questions have options"
        )
    packed = list(packs(encoded, rows))
    hidden = _final_hidden(stream, packed)
    head = stream.head()
    shape = sizes.shape_of(stream.checkpoint.config)
    sums = [[0.0] * len(options) for _, options in encoded]
    for states, pack in zip(hidden, packed, strict=True):
        logps = _logps(head, states[0], pack, shape.vocab)
        for (question, option), value in zip(pack.owner, logps, strict=True):
            sums[question][option] += float(value)
    return sums


def _final_hidden(stream: Stream, packed: Sequence[Pack]) -> Hidden:
    """[(1, S, D)]: final states of these sequences."""
    hidden = stream.embed([pack.tokens for pack in packed])
    for turn in stream.sweep(hidden):
        turn.go(partial(_through, stream, turn, packed=packed))
    return stream.norm(hidden)


def _through(
    stream: Stream, turn: BlockTurn, number: int, hidden: mx.array, *, packed: Sequence[Pack]
) -> mx.array:
    """A pack's hidden states (1, S, D) through a block; lazy."""
    pack = packed[number]
    inputs = stream.sides.inputs(turn.number, number, hidden)
    # A question's options stand side by side, so positions and mask are the pack's.
    outputs = attention_masks.run_masked_block(
        turn.block,
        inputs,
        sees=pack.sees,
        positions=pack.positions,
        window=load.window(stream.args, turn.block),
    )
    return stream.sides.keep(turn.number, number, outputs)


def _logps(head: nn.Module, hidden: mx.array, pack: Pack, vocab: int) -> np.ndarray:
    """(P,) log-probabilities of a pack's predicted tokens, from its final states hidden (S, D).

    Several options begin behind the same row of their context: its logits are computed once. Only
    `chunk_rows` rows of logits are in memory at a time.
    """
    used, place = np.unique(pack.row, return_inverse=True)
    logps = np.zeros(len(place))
    step = chunk_rows(vocab)
    for start in range(0, len(used), step):
        rows = mx.array(used[start : start + step])
        logits = load.wide_logits(head, hidden[rows])
        in_part = (place >= start) & (place < start + step)
        here = np.flatnonzero(in_part)
        row = mx.array(place[here] - start)
        token = mx.array(pack.token[here])
        chosen = logits[row, token]
        normalizers = mx.logsumexp(logits, axis=-1)
        logps[here] = np.array(chosen - normalizers[row])
    return logps
