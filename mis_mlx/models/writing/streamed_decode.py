"""Decode one text with a streamed model and a key-value cache: a pass gives one token or more.

It is decoded greedily: a small resident draft guesses the next few tokens, one pass of the model
reads them all, and those are kept that the model itself would have chosen (arXiv 2211.17192). The
tokens are those of plain greedy decoding, except after an exact tie: logits of one pass over n
tokens differ in their last bits from those of n passes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Annotated

import mlx.core as mx
import numpy as np

from mis_mlx.maths.losses import chunk_rows
from mis_mlx.models.architectures import block_inputs, block_state, sizes
from mis_mlx.models.architectures.block_inputs import BlockInputs, KeysValues
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import Stream, evaluate_now
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.types import Checkpoint, MisError, Within

ROWS = 512  # tokens of a long prompt that go through a resident block at a time
Guesses = Annotated[int, Within(0, 16)]  # of a draft, for a pass


class Context:
    """The text that a model has read, with its keys and values for each token."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.vocab = sizes.shape_of(stream.checkpoint.config).vocab
        self.length = 0  # tokens that were read
        module = load.mlx_lm("models.cache")
        kinds = stream.checkpoint.config.get("layer_types") or [""] * stream.layers
        self._caches = [block_state.taken_back(module, kind) for kind in kinds]

    def read(self, text: Sequence[int], outputs: int = 1) -> mx.array:
        """One pass over the new part of `text`: final hidden states (outputs, D) of its end."""
        # A draft may have a larger vocabulary by padding; its surplus ids have no row here.
        tokens = mx.array(np.minimum(text[self.length :], self.vocab - 1)[None])
        first = self.length
        self.length = len(text)
        hidden = self.stream.embed([tokens])
        for turn in self.stream.sweep(hidden):
            turn.go(partial(self._in_parts, turn, first=first))
        return self.stream.norm([hidden[0][:, -outputs:]])[0][0]

    def _in_parts(self, turn: BlockTurn, _: int, hidden: mx.array, *, first: int) -> mx.array:
        """The pass's hidden states (1, n, D) through a block; the first stands at this position.

        A long prompt goes through it ROWS tokens at a time, while the block is in memory. Later
        parts see the keys of earlier ones through the cache.
        """
        sides = self.stream.sides
        owner = sides.owners[turn.number]
        parts = []
        for start in range(0, hidden.shape[1], ROWS):
            part = hidden[:, start : start + ROWS]
            offset = first + start
            per_layer = None
            if sides.per_layer:
                per_layer = sides.per_layer(turn.number, 0)[:, start : start + ROWS]
            cache = self._caches[turn.number]
            shared = None
            if owner is not None:
                # That block's cache has later rows too, by now, which are cut off.
                cache = None
                length = offset + part.shape[1]
                keys, values, *_ = self._caches[owner].state
                shared = KeysValues(keys[:, :, :length], values[:, :, :length], offset)
            mask = None
            if block_state.attends(turn.block):
                window = load.window(self.stream.args, turn.block)
                causal = load.mlx_lm("models.base").create_causal_mask
                mask = causal(part.shape[1], offset, window_size=window)
            inputs = BlockInputs(part, per_layer, shared)
            parts.append(block_inputs.run(turn.block, inputs, mask, cache).hidden)
            # Lazy results would read the block's buffer after the next block has filled it.
            evaluate_now(parts[-1], [] if cache is None else cache.state)
        return mx.concatenate(parts, axis=1)

    def keep(self, length: int) -> None:
        """Forget what was read behind the first `length` tokens."""
        wrong = self.length - length
        if wrong <= 0:
            return
        self.length = length
        for cache in self._caches:
            if not cache.empty():  # of a block that uses another block's keys
                cache.trim(wrong)


def _choices(context: Context, hidden: mx.array, vocab: int) -> list[int]:
    """The likeliest of the first `vocab` tokens after each hidden state (n, D), in chunks."""
    head = context.stream.head()
    rows = chunk_rows(context.vocab)
    best = []
    for start in range(0, len(hidden), rows):
        logits = load.logits(head, hidden[start : start + rows])
        best.append(mx.argmax(logits[:, :vocab], axis=-1))
    return np.array(mx.concatenate(best)).tolist()


def _guesses(
    draft: Context, text: Sequence[int], count: int, vocab: int, ends: Container[int]
) -> list[int]:
    """The draft's own greedy continuation of the text: `count` tokens, or up to one of `ends`."""
    guesses: list[int] = []
    while len(guesses) < count:
        guesses += _choices(draft, draft.read([*text, *guesses]), vocab)
        if guesses[-1] in ends:
            break
    return guesses


def check_draft(*models: Checkpoint) -> None:
    """MisError where a model, or its draft, cannot take back what it has read (delta rules)."""
    for model in models:
        if sizes.reads_in_order(model.config):
            raise MisError(
                f"{model.path} reads one text after the other and cannot take back guesses that "
                f"were wrong: leave out --draft-model"
            )


def decode(
    model: Stream,
    ids: Sequence[int],
    count: int,
    ends: Container[int] = (),
    draft: Stream | None = None,
    guessed: int = 0,
) -> Iterator[list[int]]:
    """The model's own greedy continuation of token ids, up to `count` tokens or one of `ends`.

    Each item is what one pass of the model settled: one token or, with a draft, the guesses that
    were right and one more. draft: a resident student with the same tokens. guessed: tokens that it
    guesses for a pass. Models and drafts are those that `check_draft` passes.
    """
    text = list(ids)
    left = count
    context = Context(model)
    guesser = Context(draft) if draft else None
    while left > 0:
        # 1. The draft guesses. Near the end it guesses no further than the tokens that are left.
        guesses: list[int] = []
        if guesser:
            vocab = min(context.vocab, guesser.vocab)
            guesses = _guesses(guesser, text, min(guessed, left - 1), vocab, ends)
        # 2. One pass over the new text and the guesses: the model's choice after each.
        hidden = context.read([*text, *guesses], len(guesses) + 1)
        choices = _choices(context, hidden, context.vocab)
        # 3. Guesses that agree with the model are text now, with its own next token behind them.
        right = 0
        while right < len(guesses) and guesses[right] == choices[right]:
            right += 1
        context.keep(len(text) + right)
        if guesser:
            guesser.keep(len(text) + right)
        settled = choices[: right + 1]
        for place, token in enumerate(settled, 1):
            if token in ends:
                yield settled[:place]
                return
        yield settled
        text += settled
        left -= len(settled)
