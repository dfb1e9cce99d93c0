"""Decoding of a streamed model, with keys and values kept: one pass of the weights settles a token
or more.

Many texts are sampled side by side. One is decoded greedily: a small resident draft proposes a tree
of continuations, one pass of the model reads all of it, and the longest branch that the model
itself would have chosen is kept (arXiv 2305.09781). Tokens are those of plain greedy decoding,
except after an exact tie: logits of a pass over n tokens differ in their last bits from those of n
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.losses import chunk_rows
from mis_mlx.models import block_inputs, config, load
from mis_mlx.models.block_inputs import BlockInputs, KeysValues
from mis_mlx.models.stream import Stream, evaluate_now

SIZE = 64  # rows of a pass with a draft (measured: benchmarks/speculative.py)
ROWS = 512  # tokens of a long prompt that go through a resident block at a time
DEPTH = 16  # tokens from the text to the furthest guess
WIDTH = 16  # likely next tokens looked at, and nodes that the draft looks behind at once
Odds = tuple[np.ndarray, np.ndarray]  # log-probabilities (n, WIDTH) of tokens (n, WIDTH)


@dataclass(frozen=True, eq=False)
class Node:
    """A proposed token after `up` (None: after the text). `score`: log of the branch's
    probability.
    """

    token: int
    up: Node | None
    depth: int
    score: float

    def branch(self) -> list[Node]:
        """From the first proposed token to this one."""
        return [*(self.up.branch() if self.up else ()), self]


def grow(
    after: Callable[[Sequence[Node]], Odds], size: int, depth: int, ends: Container[int] = ()
) -> list[Node]:
    """The `size` most probable nodes of all that reach `depth` at most, parents before children.

    after(nodes): the odds behind each of them; of no nodes: behind the text, one row. A parent is
    asked for before its children: a branch's probability falls with every token (the draft tree of
    EAGLE-2, arXiv 2406.16858).
    """
    best = _children(None, *(a[0] for a in after([])))
    opened: set[Node] = set()
    while True:
        best = sorted(best, key=lambda n: -n.score)[:size]
        fresh = [n for n in best if n not in opened and n.depth < depth and n.token not in ends][
            :WIDTH
        ]
        if not fresh:
            return sorted(best, key=lambda n: n.depth)
        opened.update(fresh)
        for node, logp, tokens in zip(fresh, *after(fresh), strict=True):
            best += _children(node, logp, tokens)


def _children(up: Node | None, logp: Iterable[float], tokens: Iterable[int]) -> list[Node]:
    base, depth = (up.score, up.depth + 1) if up else (0.0, 1)
    return [Node(int(t), up, depth, base + float(p)) for p, t in zip(logp, tokens, strict=True)]


def accepted(nodes: Sequence[Node], choice: Sequence[int]) -> tuple[list[Node], int]:
    """(the branch that the model chose, its next token after that). choice: after the text, then
    after each node.
    """
    row: dict[Node | None, int] = {None: 0} | {n: r for r, n in enumerate(nodes, 1)}
    below = {(n.up, n.token): n for n in nodes}
    branch: list[Node] = []
    node: Node | None = None
    while (next_ := below.get((node, choice[row[node]]))) is not None:
        branch.append(next_)
        node = next_
    return branch, choice[row[node]]


@contextmanager
def positioned(block: nn.Module, positions: np.ndarray) -> Iterator[None]:
    """A block that turns row i by positions[i] for a while. It may stay in memory, and others use
    it.
    """
    rope = block.self_attn.rope
    each = mx.array(positions)

    # (1, H, n, d); the offset would be the same for all
    def turned(x: mx.array, offset: int = 0) -> mx.array:
        return rope(x.transpose(2, 1, 0, 3), offset=each).transpose(2, 1, 0, 3)

    block.self_attn.rope = turned
    try:
        yield
    finally:
        block.self_attn.rope = rope


class Context:
    """What a model has read: the text so far and, after it, nodes of a tree. One column of the
    cache each.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self.vocab = config.shape_of(stream.checkpoint.config).vocab
        self.length = 0  # columns of text
        self._at: dict[Node, int] = {}  # columns of nodes
        self._positions = np.zeros(0, np.int32)
        # Positions come from `positioned`, not from a cache's offset.
        self._keys = [
            load.mlx_lm("models.cache").ConcatenateKVCache() for _ in range(stream.layers)
        ]

    def read(self, text: Sequence[int], nodes: Sequence[Node] = ()) -> mx.array:
        """One pass over what of `text` is not here yet, then `nodes`: each sees the text and its
        own branch.

        Ancestors of a node are here or come before it. Returns final hidden states (rows, D): of
        the last token of the text, if it was new, and of every node.
        """
        fresh = text[self.length :]
        before = len(self._positions)
        assert not (fresh and self._at), "text is appended to text, not to a tree"
        self._at |= {node: before + len(fresh) + j for j, node in enumerate(nodes)}
        positions = np.array(
            [*range(self.length, len(text)), *(len(text) - 1 + n.depth for n in nodes)], np.int32
        )
        rows = len(fresh) + len(nodes)
        columns = before + len(fresh) + len(nodes)
        sees = np.zeros((rows, columns), bool)
        sees[: len(fresh), : len(text)] = np.tri(len(fresh), len(text), self.length, bool)
        for row, node in enumerate(nodes, len(fresh)):
            sees[row, : len(text)] = True
            sees[row, [self._at[n] for n in node.branch()]] = True
        self._positions = np.concatenate([self._positions, positions])
        self.length = len(text)
        # a draft may be padded to fewer
        tokens = np.minimum([*fresh, *(n.token for n in nodes)], self.vocab - 1)
        hidden = self._through(mx.array(tokens[None]), sees, positions)
        return self.stream.norm([hidden[:, -len(nodes) - bool(fresh) :]])[0][0]

    def _through(self, tokens: mx.array, sees: np.ndarray, positions: np.ndarray) -> mx.array:
        """Token ids (1, n) -> hidden states (1, n, D) after the last block."""
        hidden = self.stream.embed([tokens])[0]
        before = len(self._positions) - len(positions)
        window = getattr(self.stream.args, "sliding_window", None)
        near = sees & (self._positions > positions[:, None] - window) if window else sees
        for i, block in self.stream.blocks():
            mask = near if load.window(self.stream.args, block) else sees
            done = []
            for a in range(0, len(positions), ROWS):
                inputs = self._inputs(i, hidden, before, slice(a, a + ROWS))
                seen = mx.array(mask[a : a + ROWS, : before + a + inputs.hidden.shape[1]])
                own = None if inputs.shared else self._keys[i]
                with positioned(block, positions[a : a + ROWS]):
                    done.append(block_inputs.run(block, inputs, seen, own).hidden)
                evaluate_now(done[-1], own.state if own else [])
            hidden = self.stream.finite(mx.concatenate(done, axis=1))
        return hidden

    def _inputs(self, i: int, hidden: mx.array, before: int, rows: slice) -> BlockInputs:
        """What some rows of the pass bring into block i. Keys and values that it takes from another
        block are in that one's cache: all of these rows, and of later ones, which are cut off.
        """
        sides = self.stream.sides
        part = hidden[:, rows]
        per_layer = sides.per_layer(i, 0)[:, rows] if sides.per_layer else None
        owner = sides.owners[i]
        if owner is None:
            return BlockInputs(part, per_layer)
        columns = before + rows.start + part.shape[1]
        keys, values = self._keys[owner].state
        return BlockInputs(
            part, per_layer, KeysValues(keys[:, :, :columns], values[:, :, :columns])
        )

    def keep(self, branch: Sequence[Node]) -> None:
        """The tree goes, except that what was read of this branch becomes text."""
        columns = np.array(
            [*range(self.length), *(self._at[n] for n in branch if n in self._at)], np.int32
        )
        if len(columns) < len(self._positions):
            for cache in (cache for cache in self._keys if not cache.empty()):
                cache.state = [a[:, :, mx.array(columns)] for a in cache.state]
                evaluate_now(cache.state)
        self._positions = self._positions[columns]
        self._at = {}
        self.length = len(columns)


def _chunks(context: Context, hidden: mx.array) -> Iterator[mx.array]:
    """Logits (some, V) of hidden states (n, D), a few rows at a time."""
    head = context.stream.head()
    rows = chunk_rows(context.vocab)
    return (load.logits(head, hidden[a : a + rows]) for a in range(0, len(hidden), rows))


def _odds(draft: Context, text: list[int], vocab: int, nodes: Sequence[Node]) -> Odds:
    """The draft's odds for what follows the text, or each of the nodes."""
    odds = list[np.ndarray]()
    tokens = list[np.ndarray]()
    for logits in _chunks(draft, draft.read(text, nodes)):
        logits = logits[:, :vocab].astype(mx.float32)
        best = mx.argpartition(logits, -WIDTH, axis=-1)[:, -WIDTH:]
        odds.append(
            np.array(
                mx.take_along_axis(logits, best, -1) - mx.logsumexp(logits, axis=-1, keepdims=True)
            )
        )
        tokens.append(np.array(best))
    return np.concatenate(odds), np.concatenate(tokens)


def decode(
    model: Stream,
    ids: Sequence[int],
    count: int,
    ends: Container[int] = (),
    draft: Stream | None = None,
    size: int = SIZE,
) -> Iterator[list[int]]:
    """The model's own greedy continuation of token ids, up to `count` tokens or one of `ends`, pass
    by pass.

    Each item is what one pass of the model settled: one token or, with a draft, the guesses that
    were right and one more. draft: a resident student of the same tokens. size: rows of a pass, the
    tree's nodes and one.
    """
    text = list(ids)
    left = count
    context = Context(model)
    guesses = Context(draft) if draft else None
    while left > 0:
        nodes: list[Node] = []
        if guesses and left > 1 and size > 1:
            after = partial(_odds, guesses, text, min(context.vocab, guesses.vocab))
            nodes = grow(after, size - 1, min(DEPTH, left - 1), ends)
        best = [
            mx.argmax(logits, axis=-1) for logits in _chunks(context, context.read(text, nodes))
        ]
        branch, last = accepted(nodes, [int(token) for token in np.array(mx.concatenate(best))])
        context.keep(branch)
        if guesses:
            guesses.keep(branch)
        new = [*(n.token for n in branch), last]
        stop = next((i + 1 for i, t in enumerate(new) if t in ends), len(new))
        yield new[:stop]
        if stop < len(new) or new[-1] in ends:
            return
        text = text + new
        left = left - len(new)


def sampled(
    model: Stream,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Container[int],
    draw: Callable[[mx.array], mx.array],
) -> list[list[int]]:
    """A completion of each prompt, as `mlx_generate.groups`: one pass of the weights for a token of
    all of them. Every text stands at the same place, so that none needs a mask; a longer prompt is
    read while others write.
    """
    cache = load.mlx_lm("models.cache")
    texts = [list(prompt) for prompt in prompts]
    keys = list[Any]()
    open_ = set(range(len(texts)))
    for at in range(max(map(len, prompts)) + max_tokens - 1):
        hidden = model.embed([mx.array([[text[min(at, len(text) - 1)]] for text in texts])])[0]
        for i, block in model.blocks():
            if i == len(keys):
                window = load.window(model.args, block)
                keys.append(cache.RotatingKVCache(window) if window else cache.KVCache())
            inputs = model.sides.inputs(i, 0, hidden)
            own = None if inputs.shared else keys[i]
            hidden = model.sides.keep(i, 0, block_inputs.run(block, inputs, None, own))
            evaluate_now(hidden, own.state if own else [])
        logits = load.logits(model.head(), model.norm([model.finite(hidden)])[0][:, 0]).astype(
            mx.float32
        )
        drawn = np.array(draw(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
        for n in [n for n in open_ if at == len(texts[n]) - 1]:
            texts[n].append(int(drawn[n]))
            if texts[n][-1] in stop or len(texts[n]) == len(prompts[n]) + max_tokens:
                open_.remove(n)
        if not open_:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
