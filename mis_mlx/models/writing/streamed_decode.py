"""Decode one text with a streamed model and a key-value cache: a pass gives one token or more.

It is decoded greedily: a small resident draft proposes a tree of continuations, one pass of the
model reads the whole tree, and the longest branch that the model itself would have chosen is kept
(arXiv 2305.09781). The tokens are those of plain greedy decoding, except after an exact tie:
logits of one pass over n tokens differ in their last bits from those of n passes.
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
from mis_mlx.models.architectures import block_inputs, block_state, modules, sizes
from mis_mlx.models.architectures.block_inputs import BlockInputs, KeysValues
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import Stream, evaluate_now
from mis_mlx.models.passing.sweep import BlockTurn

SIZE = 64  # rows of a pass with a draft (measured: benchmarks/speculative.py)
ROWS = 512  # tokens of a long prompt that go through a resident block at a time
DEPTH = 16  # tokens from the text to the furthest guess
WIDTH = 16  # likely next tokens of a node, and nodes that the draft reads in one pass
Odds = tuple[np.ndarray, np.ndarray]  # log-probabilities (n, WIDTH) of tokens (n, WIDTH)


@dataclass(frozen=True, eq=False)
class Node:
    """A token that the draft proposes.

    up: the node before it; None: it follows the text. score: log of the branch's probability.
    """

    token: int
    up: Node | None
    depth: int
    score: float

    def branch(self) -> list[Node]:
        """From the first proposed token to this one."""
        if self.up is None:
            return [self]
        return [*self.up.branch(), self]


def grow(
    after: Callable[[Sequence[Node]], Odds], size: int, depth: int, ends: Container[int] = ()
) -> list[Node]:
    """The `size` most probable nodes down to `depth`, parents before children.

    after(nodes): the odds of what follows each node; for no nodes: of what follows the text, one
    row. A parent is expanded before its children are, because a branch's probability falls with
    every token (the draft tree of EAGLE-2, arXiv 2406.16858).
    """
    log_probs, tokens = after([])
    candidates = _children(None, log_probs[0], tokens[0])
    expanded: set[Node] = set()
    while True:
        candidates.sort(key=lambda node: -node.score)
        candidates = candidates[:size]
        frontier = [
            node
            for node in candidates
            if node not in expanded and node.depth < depth and node.token not in ends
        ]
        if not frontier:
            return sorted(candidates, key=lambda node: node.depth)
        # The draft reads WIDTH nodes at a time; the others wait for the next round, in which better
        # children may have displaced them.
        frontier = frontier[:WIDTH]
        expanded.update(frontier)
        log_probs, tokens = after(frontier)
        for parent, row, ids in zip(frontier, log_probs, tokens, strict=True):
            candidates += _children(parent, row, ids)


def _children(up: Node | None, log_probs: Iterable[float], tokens: Iterable[int]) -> list[Node]:
    score = 0.0
    depth = 1
    if up is not None:
        score = up.score
        depth = up.depth + 1
    return [
        Node(int(token), up, depth, score + float(log_prob))
        for log_prob, token in zip(log_probs, tokens, strict=True)
    ]


def accepted(nodes: Sequence[Node], choice: Sequence[int]) -> tuple[list[Node], int]:
    """The branch that the model chose, and the model's next token after it.

    choice: the model's token after the text, then after each node.
    """
    rows: dict[Node | None, int] = {None: 0}
    children = {}
    for row, node in enumerate(nodes, 1):
        rows[node] = row
        children[node.up, node.token] = node
    branch: list[Node] = []
    last: Node | None = None
    while True:
        token = choice[rows[last]]
        child = children.get((last, token))
        if child is None:
            return branch, token
        branch.append(child)
        last = child


@contextmanager
def positioned(block: nn.Module, positions: np.ndarray) -> Iterator[None]:
    """Inside the `with`, the block's RoPE turns row i by positions[i], and its queries grow so.

    The block may stay in memory, and others use it, so its own RoPE comes back at the end.
    """
    if not block_state.attends(block):
        yield  # its mask says which rows stand before each
        return
    rope = block.self_attn.rope
    offsets = mx.array(positions)

    def rotate(x: mx.array, offset: int = 0) -> mx.array:
        # x is (1, H, n, d), and `offset` would be the same for all n rows. With the rows in the
        # batch axis, (n, H, 1, d), RoPE takes one offset a row.
        return rope(x.transpose(2, 1, 0, 3), offset=offsets).transpose(2, 1, 0, 3)

    block.self_attn.rope = rotate
    try:
        with modules.at_positions(block, offsets):
            yield
    finally:
        block.self_attn.rope = rope


def _evaluate(hidden: mx.array, cache: Any) -> None:
    """Compute a block's output and what its cache holds, before the next block takes its buffer."""
    evaluate_now(hidden, [] if cache is None else cache.state)


class Context:
    """What a model has read: the text, then nodes of a tree; one column of the cache for each."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.vocab = sizes.shape_of(stream.checkpoint.config).vocab
        self.length = 0  # columns of text
        self._columns: dict[Node, int] = {}  # of the nodes that were read
        self._positions = np.zeros(0, np.int32)  # of every column
        # Positions come from `positioned`, not from a cache's offset: siblings in a tree stand at
        # the same position, in different columns.
        module = load.mlx_lm("models.cache")
        settings = stream.checkpoint.config
        kinds = settings.get("layer_types") or [""] * stream.layers
        self._caches = [block_state.columns(module, kind) for kind in kinds]

    def read(self, text: Sequence[int], nodes: Sequence[Node] = ()) -> mx.array:
        """One pass over the new part of `text`, then over `nodes`.

        A node sees the text and its own branch. Its ancestors are here already or stand before it
        in `nodes`. Returns final hidden states (rows, D): of the last token of the text, if it was
        new, and of every node.
        """
        new_text = text[self.length :]
        assert not (new_text and self._columns), "text is appended to text, not to a tree"
        sees = self._visible(len(text), nodes)
        # The node at depth 1 stands right behind the text, whatever its column.
        node_positions = [len(text) - 1 + node.depth for node in nodes]
        positions = np.array([*range(self.length, len(text)), *node_positions], np.int32)
        self._positions = np.concatenate([self._positions, positions])
        self.length = len(text)
        # A draft may have a larger vocabulary by padding; its surplus ids have no row here.
        ids = [*new_text, *(node.token for node in nodes)]
        tokens = mx.array(np.minimum(ids, self.vocab - 1)[None])
        hidden = self._through(tokens, sees, positions)
        outputs = len(nodes) + bool(new_text)
        return self.stream.norm([hidden[:, -outputs:]])[0][0]

    def _visible(self, length: int, nodes: Sequence[Node]) -> np.ndarray:
        """Give the nodes their columns; the mask (new rows, columns) of the coming pass.

        length: of the text after that pass. Text is causal. A node sees all text and its branch,
        never a sibling.
        """
        new_text = length - self.length
        first_column = len(self._positions) + new_text
        for column, node in enumerate(nodes, first_column):
            self._columns[node] = column
        rows = new_text + len(nodes)
        columns = first_column + len(nodes)
        sees = np.zeros((rows, columns), bool)
        sees[:new_text, :length] = np.tri(new_text, length, self.length, bool)
        for row, node in enumerate(nodes, new_text):
            sees[row, :length] = True
            for ancestor in node.branch():
                sees[row, self._columns[ancestor]] = True
        return sees

    def _through(self, tokens: mx.array, sees: np.ndarray, positions: np.ndarray) -> mx.array:
        """Token ids (1, n) -> hidden states (1, n, D) after the last block."""
        hidden = self.stream.embed([tokens])
        window = getattr(self.stream.args, "sliding_window", None)
        sees_window = sees
        if window:
            # By position, not by column: in a tree the two differ.
            sees_window = sees & (self._positions > positions[:, None] - window)
        for turn in self.stream.sweep(hidden):
            mask = sees_window if load.window(self.stream.args, turn.block) else sees
            turn.go(partial(self._in_parts, turn, mask=mask, positions=positions))
        return hidden[0]

    def _in_parts(
        self, turn: BlockTurn, _: int, hidden: mx.array, *, mask: np.ndarray, positions: np.ndarray
    ) -> mx.array:
        """The pass's hidden states (1, n, D) through a block, lazy.

        A long prompt goes through it ROWS tokens at a time, while the block is in memory. Later
        parts see the keys of earlier ones through the cache.
        """
        columns_before = len(self._positions) - len(positions)
        parts = []
        for start in range(0, len(positions), ROWS):
            rows = slice(start, start + ROWS)
            inputs = self._inputs(turn.number, hidden, columns_before, rows)
            columns = columns_before + start + inputs.hidden.shape[1]
            part_mask = self._mask(turn.block, mask[rows, :columns], positions[rows])
            cache = None if inputs.shared else self._caches[turn.number]
            with positioned(turn.block, positions[rows]):
                parts.append(block_inputs.run(turn.block, inputs, part_mask, cache).hidden)
            # Lazy results would read the block's buffer after the next block has filled it.
            _evaluate(parts[-1], cache)
        return mx.concatenate(parts, axis=1)

    def _mask(self, block: nn.Module, sees: np.ndarray, positions: np.ndarray) -> mx.array | None:
        """What a block takes as its mask: sees (rows, columns), or which columns stand before.

        None for a delta rule, which reads rows in their order.
        """
        visible = mx.array(sees)
        if block_state.attends(block):
            return visible
        if "linear_attn" in block:
            if self._columns:
                block_state.refuse_branches(block)
            return None
        columns = mx.array(self._positions[: sees.shape[1]])
        return block_state.before(visible, mx.array(positions), columns, block.conv.reach)

    def _inputs(self, i: int, hidden: mx.array, columns_before: int, rows: slice) -> BlockInputs:
        """What some rows of the pass bring into block i.

        Keys and values that it takes from another block are in that block's cache, for all of these
        rows and for later ones, which are cut off.
        """
        sides = self.stream.sides
        part = hidden[:, rows]
        per_layer = None
        if sides.per_layer:
            per_layer = sides.per_layer(i, 0)[:, rows]
        owner = sides.owners[i]
        if owner is None:
            return BlockInputs(part, per_layer)
        columns = columns_before + rows.start + part.shape[1]
        keys, values = self._caches[owner].state
        keys = keys[:, :, :columns]
        values = values[:, :, :columns]
        return BlockInputs(part, per_layer, KeysValues(keys, values))

    def keep(self, branch: Sequence[Node]) -> None:
        """Drop the tree, except that the nodes of this branch that were read become text."""
        branch_columns = [self._columns[node] for node in branch if node in self._columns]
        columns = np.array([*range(self.length), *branch_columns], np.int32)
        if len(columns) < len(self._positions):
            kept_columns = mx.array(columns)
            for cache in self._caches:
                if cache.empty():  # of a block that uses another block's keys
                    continue
                cache.state = [array[:, :, kept_columns] for array in cache.state]
                evaluate_now(cache.state)
        self._positions = self._positions[columns]
        self._columns = {}
        self.length = len(columns)


def _chunks(context: Context, hidden: mx.array) -> Iterator[mx.array]:
    """Logits (some, V) of hidden states (n, D), a few rows at a time."""
    head = context.stream.head()
    rows = chunk_rows(context.vocab)
    for start in range(0, len(hidden), rows):
        yield load.logits(head, hidden[start : start + rows])


def _odds(draft: Context, text: list[int], vocab: int, nodes: Sequence[Node]) -> Odds:
    """The draft's odds for the token after the text or, if there are nodes, after each of them."""
    log_probs = []
    tokens = []
    for logits in _chunks(draft, draft.read(text, nodes)):
        logits = logits[:, :vocab].astype(mx.float32)
        likeliest = mx.argpartition(logits, -WIDTH, axis=-1)[:, -WIDTH:]
        log_total = mx.logsumexp(logits, axis=-1, keepdims=True)
        log_probs.append(np.array(mx.take_along_axis(logits, likeliest, -1) - log_total))
        tokens.append(np.array(likeliest))
    return np.concatenate(log_probs), np.concatenate(tokens)


def _until_end(tokens: list[int], ends: Container[int]) -> list[int]:
    """The tokens up to and including the first of `ends`; a new list."""
    for count, token in enumerate(tokens, 1):
        if token in ends:
            return tokens[:count]
    return tokens[:]


def decode(
    model: Stream,
    ids: Sequence[int],
    count: int,
    ends: Container[int] = (),
    draft: Stream | None = None,
    size: int = SIZE,
) -> Iterator[list[int]]:
    """The model's own greedy continuation of token ids, up to `count` tokens or one of `ends`.

    Each item is what one pass of the model settled: one token or, with a draft, the guesses that
    were right and one more. draft: a resident student with the same tokens. size: rows of a pass,
    one more than the tree's nodes.
    """
    text = list(ids)
    left = count
    context = Context(model)
    guesses = Context(draft) if draft else None
    while left > 0:
        # 1. The draft guesses a tree, which one pass of the model will judge. Near the end no guess
        #    may reach further than the tokens that are left.
        nodes: list[Node] = []
        if guesses and left > 1 and size > 1:
            vocab = min(context.vocab, guesses.vocab)
            after = partial(_odds, guesses, text, vocab)
            nodes = grow(after, size=size - 1, depth=min(DEPTH, left - 1), ends=ends)
        # 2. One pass over the new text and the tree: the model's choice after each row.
        chunks = _chunks(context, context.read(text, nodes))
        best = [mx.argmax(logits, axis=-1) for logits in chunks]
        choice = np.array(mx.concatenate(best)).tolist()
        # 3. Guesses that agree with the model are text now, with its own next token behind them.
        #    Columns of all other guesses leave the caches.
        branch, last = accepted(nodes, choice)
        context.keep(branch)
        if guesses:
            guesses.keep(branch)
        new = [*(node.token for node in branch), last]
        settled = _until_end(new, ends)
        ended = settled[-1] in ends
        yield settled
        if ended:
            return
        text = text + new
        left = left - len(new)
