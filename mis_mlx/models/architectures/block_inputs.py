"""The inputs of a block besides hidden states: channels for every token, another block's keys.

Most families have none of them: their blocks are called with hidden states, a mask and perhaps a
cache. Axis P: the channels that each block gets for every token from a table of its own;
`side_inputs` makes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.compute import streams

Channels = Callable[[int, int], mx.array]  # (block, batch) -> (B, T, P)


class KeysValues(NamedTuple):
    """What a block has computed for others to use.

    Keys and values (B, K, T, d), and the position of the first query.
    """

    keys: mx.array
    values: mx.array
    offset: Any = 0

    def rows(self, start: int, stop: int) -> "KeysValues":
        """The keys and values of some of the batch's windows."""
        return KeysValues(self.keys[start:stop], self.values[start:stop], self.offset)


@dataclass(frozen=True)
class BlockInputs:
    """All inputs of one block for one batch."""

    hidden: mx.array  # (B, T, D)
    per_layer: mx.array | None = None  # (B, T, P)
    shared: KeysValues | None = None  # of an earlier block, which this one uses

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that a gradient can flow back to; `like` takes as many."""
        arrays = [self.hidden]
        if self.per_layer is not None:
            arrays.append(self.per_layer)
        if self.shared is not None:
            arrays += [self.shared.keys, self.shared.values]
        return arrays

    def like(self, arrays: Sequence[mx.array]) -> "BlockInputs":
        """The same inputs made of other `arrays`, such as their gradients."""
        remaining = list(arrays)
        hidden = remaining.pop(0)
        per_layer = None
        if self.per_layer is not None:
            per_layer = remaining.pop(0)
        shared = None
        if self.shared is not None:
            keys, values = remaining[:2]
            shared = KeysValues(keys, values, self.shared.offset)
        return BlockInputs(hidden, per_layer, shared)

    def rows(self, start: int, stop: int) -> "BlockInputs":
        """The inputs of some of the batch's windows."""
        per_layer = self.per_layer
        if per_layer is not None:
            per_layer = per_layer[start:stop]
        shared = self.shared
        if shared is not None:
            shared = shared.rows(start, stop)
        hidden = self.hidden[start:stop]
        return BlockInputs(hidden, per_layer, shared)


class BlockOutputs(NamedTuple):
    """What a block gives: hidden states (B, T, D), and keys and values that others may use.

    Or the cotangents of these; `shared` is None then where no later block has used any.
    """

    hidden: mx.array
    shared: KeysValues | None = None

    def arrays(self, like: "BlockOutputs") -> list[mx.array]:
        """Hidden states; keys and values too where `like` has them."""
        if self.shared is None or like.shared is None:
            return [self.hidden]
        return [self.hidden, self.shared.keys, self.shared.values]


def run(block: nn.Module, inputs: BlockInputs, mask: Any, cache: Any = None) -> BlockOutputs:
    """One of mlx-lm's blocks on one batch; lazy."""
    further: dict[str, Any] = {}
    if inputs.per_layer is not None:
        further["per_layer_input"] = inputs.per_layer
    if inputs.shared is not None:
        further["shared_kv"] = inputs.shared[:2]
        further["offset"] = inputs.shared.offset
    result = block(inputs.hidden, mask, cache=cache, **further)
    if not isinstance(result, tuple):
        return BlockOutputs(result)
    hidden, (keys, values), offset = result
    return BlockOutputs(hidden, KeysValues(keys, values, offset))


def by_windows(
    block: nn.Module, inputs: BlockInputs, mask: Callable[[mx.array], Any]
) -> BlockOutputs:
    """One block on one batch, whose windows are computed side by side in streams; lazy.

    mask(hidden): the attention mask of some of the windows.
    """
    count = len(inputs.hidden)
    size = -(-count // streams.count())
    outputs = list[BlockOutputs]()
    for number, start in enumerate(range(0, count, size)):
        piece = inputs.rows(start, start + size)
        with streams.stream(number):
            output = run(block, piece, mask(piece.hidden))
        outputs.append(output)
    if len(outputs) == 1:
        return outputs[0]
    # back into one batch, windows in their order
    hidden = mx.concatenate([output.hidden for output in outputs])
    shared = [output.shared for output in outputs if output.shared is not None]
    if not shared:
        return BlockOutputs(hidden)
    keys = mx.concatenate([piece.keys for piece in shared])
    values = mx.concatenate([piece.values for piece in shared])
    offset = shared[0].offset
    return BlockOutputs(hidden, KeysValues(keys, values, offset))


@dataclass
class Sides:
    """The further inputs of all blocks, for the batches of one pass through a model.

    owners: for each block the one whose keys and values it uses, or None. per_layer(i, b): channels
    (B, T, P) of batch b for block i; None where the family has none.
    """

    owners: Sequence[int | None]
    per_layer: Channels | None = None
    # by block and batch, for later blocks
    keys_values: dict[tuple[int, int], KeysValues] = field(default_factory=dict)

    def inputs(self, i: int, b: int, hidden: mx.array) -> BlockInputs:
        """All inputs of block i for batch b."""
        per_layer = None
        if self.per_layer:
            per_layer = self.per_layer(i, b)
        shared = None
        owner = self.owners[i]
        if owner is not None:
            shared = self.keys_values[owner, b]
        return BlockInputs(hidden, per_layer, shared)

    def keep(self, i: int, b: int, outputs: BlockOutputs) -> mx.array:
        """The hidden states that block i gave for batch b.

        Its keys and values are kept if a later block uses them.
        """
        if outputs.shared is not None and i in self.owners:
            self.keys_values[i, b] = outputs.shared
        return outputs.hidden


class Cotangents:
    """Cotangents of keys and values that later blocks have used.

    They are added up during the backward pass, until it reaches the block that made the keys and
    values.
    """

    def __init__(self, owners: Sequence[int | None]):
        self._owners = owners
        self._sums: dict[tuple[int, int], KeysValues] = {}

    def add(self, i: int, b: int, below: BlockInputs) -> list[mx.array]:
        """Add what block i sends back for batch b; the sums, lazy, for the caller to evaluate.

        below: the cotangents of the block's inputs. The list is empty where the block has used no
        other block's keys.
        """
        owner = self._owners[i]
        if owner is None or below.shared is None:
            return []
        keys, values, _ = below.shared
        before = self._sums.get((owner, b))
        if before is not None:
            keys = before.keys + keys
            values = before.values + values
        self._sums[owner, b] = KeysValues(keys, values)
        return [keys, values]

    def take(self, i: int, b: int) -> KeysValues | None:
        """Remove and return the sum for block i and batch b; None: no block has used its keys."""
        return self._sums.pop((i, b), None)
