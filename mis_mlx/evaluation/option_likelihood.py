"""How likely each option is after its question: log-likelihoods, as lm-eval defines them. Streamed.

A question is computed once for all its options, which do not see each other; questions share
sequences, unpadded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.maths.losses import chunk_rows
from mis_mlx.models import attention_masks, config, distributed, load, pipeline_parallel
from mis_mlx.models.stream import Stream, evaluate_now
from mis_mlx.types import MisError, grouped

# tokens of a sequence; more of them make the attention dearer, fewer the matrix products
ROWS = 256
# token ids of the context (at least one), and of every option
Encoded = tuple[list[int], list[list[int]]]


def encode(tokenizer: Any, context: str, options: Sequence[str]) -> Encoded:
    """As lm-eval does: an option is what context + option has more than the context alone. White
    space at the end of a context goes to its options. An empty context is the start token, else the
    end token. MisError: an empty option.
    """
    bare = context.rstrip()
    options = [context[len(bare) :] + option for option in options]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    before = list(tokenizer.encode(bare)) or [start]
    if not bare:
        wholes = [
            [*before, *tokenizer.encode(option, add_special_tokens=False)] for option in options
        ]
    else:
        wholes = [list(tokenizer.encode(bare + option)) for option in options]
    added = [whole[len(before) :] for whole in wholes]
    if not all(added):
        lost = options[added.index([])]
        raise MisError(
            f"the option {lost[:40]!r} adds no token to {bare[-40:]!r}: write it so that it begins "
            f"a word"
        )
    return before, added


class Pack(NamedTuple):
    """Questions in one sequence. which: their numbers. tokens (1, S), positions (S,), sees (S, S):
    who looks at whom. Of the P predicted tokens: row (P,) of S that predicts it, token (P,), owner
    (P, 2): question, option.
    """

    which: tuple[int, ...]
    tokens: mx.array
    positions: np.ndarray
    sees: mx.array
    row: np.ndarray
    token: np.ndarray
    owner: np.ndarray


def length(e: Encoded) -> int:
    """Tokens that a question takes in a sequence."""
    return len(e[0]) + sum(len(option) - 1 for option in e[1])


def packs(encoded: Sequence[Encoded], rows: int = ROWS) -> Iterator[Pack]:
    """All questions, those of like length together, in sequences of up to `rows` tokens."""
    lengths = list(map(length, encoded))
    for which in grouped(
        sorted(range(len(encoded)), key=lambda n: -lengths[n]), lengths.__getitem__, rows
    ):
        # of each token of the sequence: itself, position, question, branch
        seen = list[tuple[int, int, int, int]]()
        # by which row; which token; of which question and option
        predicted = list[tuple[int, int, int, int]]()
        for number in which:
            context, options = encoded[number]
            seen += [(token, at, number, 0) for at, token in enumerate(context)]
            last = len(seen) - 1
            for o, option in enumerate(options):
                rows_ = [last, *range(len(seen), len(seen) + len(option) - 1)]
                predicted += [
                    (row, token, number, o) for row, token in zip(rows_, option, strict=True)
                ]
                seen += [
                    (token, at, number, o + 1) for at, token in enumerate(option[:-1], len(context))
                ]
        tokens, positions, text, branch = np.array(seen, np.int32).T
        row, token, *owner = np.array(predicted).T
        order = np.arange(len(tokens))
        sees = (
            (order[:, None] >= order)
            & (text[:, None] == text)
            & ((branch == 0) | (branch[:, None] == branch))
        )
        yield Pack(
            tuple(which),
            mx.array(tokens[None]),
            positions,
            mx.array(sees),
            row,
            token,
            np.stack(owner, axis=1),
        )


def score(stream: Stream, encoded: Sequence[Encoded], rows: int = ROWS) -> list[list[float]]:
    """Log-likelihood in nats of every option of every question. One pass of the weights, however
    many there are. Of several machines each has some of the sequences, and all get the same, which
    is what one alone would find.
    """
    packed = list(packs(encoded, rows))
    own = distributed.shard(packed)
    passing = pipeline_parallel.passing(stream, packed)
    hidden = stream.embed([p.tokens for p in own])
    for i, block in stream.blocks():
        window = load.window(stream.args, block)
        for b, p in enumerate(passing):
            inputs = stream.sides.inputs(i, b, hidden[b])
            outputs = attention_masks.through(block, inputs, p.sees, p.positions, window)
            hidden[b] = stream.sides.keep(i, b, outputs)
            evaluate_now(hidden[b])
    hidden = stream.norm(hidden)
    head = stream.head()
    vocab = config.shape_of(stream.checkpoint.config).vocab
    sums = [[0.0] * len(options) for _, options in encoded]
    for b, p in enumerate(own):
        for (question, option), value in zip(
            p.owner, _logps(head, hidden[b][0], p, vocab), strict=True
        ):
            sums[question][option] += float(value)
    for theirs in distributed.all_gather([(n, sums[n]) for p in own for n in p.which]):
        for n, values in theirs:
            sums[n] = values
    return sums


def _logps(head: Any, hidden: mx.array, p: Pack, vocab: int) -> np.ndarray:
    """(P,) log-probabilities; no row of logits is made twice, and few are there at once."""
    used, at = np.unique(p.row, return_inverse=True)
    logps = np.zeros(len(at))
    step = chunk_rows(vocab)
    for start in range(0, len(used), step):
        z = load.wide_logits(head, hidden[mx.array(used[start : start + step])])
        mine = np.flatnonzero((at >= start) & (at < start + step))
        row = mx.array(at[mine] - start)
        logps[mine] = np.array(z[row, mx.array(p.token[mine])] - mx.logsumexp(z, axis=-1)[row])
    return logps
