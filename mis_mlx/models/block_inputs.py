"""What goes into a block beside hidden states: channels of its own for every token, keys and values
of another block.

Most families have none of it: their blocks are called with hidden states, a mask and perhaps a
cache, as ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.models import config
from mis_mlx.models.families import family

PART = 2**22  # numbers of the table of per-layer inputs that are computed at a time


class KeysValues(NamedTuple):
    """What a block has computed for others to use: keys and values (B, K, T, d), and where the
    first query stands.
    """

    keys: mx.array
    values: mx.array
    offset: Any = 0


@dataclass(frozen=True)
class BlockInputs:
    """All that one batch brings into one block."""

    hidden: mx.array  # (B, T, D)
    per_layer: mx.array | None = None  # (B, T, P)
    shared: KeysValues | None = None  # of an earlier block, which this one uses

    @property
    def arrays(self) -> list[mx.array]:
        """Those that a gradient can flow back to; `like` takes as many."""
        per_layer = [] if self.per_layer is None else [self.per_layer]
        shared = [] if self.shared is None else [self.shared.keys, self.shared.values]
        return [self.hidden, *per_layer, *shared]

    def like(self, arrays: Sequence[mx.array]) -> "BlockInputs":
        """The same inputs made of other `arrays`, such as their gradients."""
        left = list(arrays)
        hidden = left.pop(0)
        per_layer = None if self.per_layer is None else left.pop(0)
        shared = self.shared
        if shared is not None:
            shared = KeysValues(left[0], left[1], shared.offset)
        return BlockInputs(hidden, per_layer, shared)

    def rows(self, start: int, stop: int) -> "BlockInputs":
        """Those of some of the batch's windows."""
        per_layer = None if self.per_layer is None else self.per_layer[start:stop]
        shared = self.shared
        if shared is not None:
            shared = KeysValues(shared.keys[start:stop], shared.values[start:stop], shared.offset)
        return BlockInputs(self.hidden[start:stop], per_layer, shared)


class BlockOutputs(NamedTuple):
    """What a block gives: hidden states (B, T, D), and keys and values where the family lets others
    use them. Or the cotangents of these; `shared` is None then where no later block has used any.
    """

    hidden: mx.array
    shared: KeysValues | None = None

    def arrays(self, like: "BlockOutputs") -> list[mx.array]:
        """Hidden states; keys and values too where `like` has them."""
        if self.shared is None or like.shared is None:
            return [self.hidden]
        return [self.hidden, self.shared.keys, self.shared.values]


def run(block: nn.Module, inputs: BlockInputs, mask: Any, cache: Any = None) -> BlockOutputs:
    """One block of mlx-lm's on one batch; lazy."""
    more: dict[str, Any] = {}
    if inputs.per_layer is not None:
        more["per_layer_input"] = inputs.per_layer
    if inputs.shared is not None:
        more["shared_kv"] = inputs.shared[:2]
        more["offset"] = inputs.shared.offset
    return _outputs(block(inputs.hidden, mask, cache=cache, **more))


def by_windows(
    block: nn.Module, inputs: BlockInputs, mask: Callable[[mx.array], Any]
) -> BlockOutputs:
    """One block on one batch, whose windows go side by side; lazy. mask(hidden): of some
    windows.
    """
    count = len(inputs.hidden)
    size = -(-count // lanes.count())
    pieces = [inputs.rows(start, start + size) for start in range(0, count, size)]
    found = list[BlockOutputs]()
    for number, piece in enumerate(pieces):
        with lanes.lane(number):
            found.append(run(block, piece, mask(piece.hidden)))
    if len(found) == 1:
        return found[0]
    hidden = mx.concatenate([each.hidden for each in found])
    made = [each.shared for each in found if each.shared is not None]
    if not made:
        return BlockOutputs(hidden)
    keys = mx.concatenate([each.keys for each in made])
    values = mx.concatenate([each.values for each in made])
    return BlockOutputs(hidden, KeysValues(keys, values, made[0].offset))


def _outputs(given: Any) -> BlockOutputs:
    if isinstance(given, tuple):
        hidden, (keys, values), offset = given
        return BlockOutputs(hidden, KeysValues(keys, values, offset))
    return BlockOutputs(given)


@dataclass
class Sides:
    """Of a pass that goes through all blocks: what its batches bring into each, beside their hidden
    states.

    owners: for each block the one whose keys and values it uses, or None. per_layer(i, b): channels
    (B, T, P) of batch b for block i; None where the family has none.
    """

    owners: Sequence[int | None]
    per_layer: Callable[[int, int], mx.array] | None = None
    # by block and batch, for blocks to come
    made: dict[tuple[int, int], KeysValues] = field(default_factory=dict)

    def inputs(self, i: int, b: int, hidden: mx.array) -> BlockInputs:
        """All that batch b brings into block i."""
        per_layer = self.per_layer(i, b) if self.per_layer else None
        owner = self.owners[i]
        return BlockInputs(hidden, per_layer, None if owner is None else self.made[owner, b])

    def keep(self, i: int, b: int, outputs: BlockOutputs) -> mx.array:
        """The hidden states that block i gave for batch b; its keys and values are kept if a later
        block uses them.
        """
        if outputs.shared is not None and i in self.owners:
            self.made[i, b] = outputs.shared
        return outputs.hidden


class Cotangents:
    """Of keys and values that later blocks have used, added up on the way back until it reaches who
    made them.
    """

    def __init__(self, owners: Sequence[int | None]):
        self._owners = owners
        self._sums: dict[tuple[int, int], KeysValues] = {}

    def add(self, i: int, b: int, below: BlockInputs) -> list[mx.array]:
        """What block i sends back of the b-th batch; lazy, returned for whoever evaluates it."""
        owner = self._owners[i]
        if owner is None or below.shared is None:
            return []
        before = self._sums.get((owner, b))
        keys, values, _ = below.shared
        if before is not None:
            keys = before.keys + keys
            values = before.values + values
        self._sums[owner, b] = KeysValues(keys, values)
        return [keys, values]

    def take(self, i: int, b: int) -> KeysValues | None:
        """The sum for block i, which goes."""
        return self._sums.pop((i, b), None)


def plain(values: Mapping[str, Any]) -> bool:
    """Whether blocks of a model of this config take hidden states and nothing else."""
    owned = any(owner is not None for owner in config.key_owners(values))
    return not owned and not family(values).per_layer


def of_config(
    values: Mapping[str, Any], per_layer: Callable[[int, int], mx.array] | None = None
) -> Sides:
    """Of a pass through a model of this config."""
    return Sides(config.key_owners(values), per_layer)


class TokenChannels:
    """The channels that every block gets for each token of some batches: a function of the token
    and the block alone.

    So they are computed once for each token that occurs: (n, L, P).
    """

    def __init__(self, values: Mapping[str, Any], batches: Sequence[mx.array]):
        self.width = int(values[family(values).per_layer])
        self.layers = int(values["num_hidden_layers"])
        tokens = [np.array(batch) for batch in batches]
        flat = np.concatenate([t.reshape(-1) for t in tokens]) if tokens else np.zeros(0, np.int32)
        self.ids, places = np.unique(flat, return_inverse=True)
        ends = np.cumsum([t.size for t in tokens])[:-1]
        parts = np.split(places.reshape(-1), ends) if tokens else []
        self._places = [
            mx.array(p.reshape(t.shape).astype(np.int32))
            for p, t in zip(parts, tokens, strict=True)
        ]
        self._table: mx.array | None = None

    def fill(self, channels: Callable[[np.ndarray], mx.array], dtype: mx.Dtype) -> None:
        """channels(ids (m,)) -> (m, L, P) of this type: asked for some tokens at a time."""
        bits = {2: mx.uint16, 4: mx.uint32}[dtype.size]  # numpy has no bfloat16
        found: Any = mx.zeros((len(self.ids), self.layers, self.width), bits)
        into = np.asarray(memoryview(found))  # evaluates
        step = max(1, PART // (self.layers * self.width))
        for start in range(0, len(self.ids), step):
            some = channels(self.ids[start : start + step])
            into[start : start + step] = np.asarray(some.view(bits))
        self._table = found.view(dtype)

    def __call__(self, i: int, b: int) -> mx.array:
        """(B, T, P) of batch b for block i."""
        assert self._table is not None
        return self._table[:, i][self._places[b]]


def of_model(model: nn.Module, tokens: mx.array, embedded: mx.array) -> Sides:
    """Of a pass of one batch through a model that `load.resident` has made, with gradients that
    flow back.
    """
    values = model._config
    if not family(values).per_layer:
        return of_config(values)
    inner = model.model
    # mlx-lm names these two with an underscore; `tests/models/test_gemma4.py` notices when they go.
    channels = inner._project_per_layer_inputs(embedded, inner._get_per_layer_inputs(tokens))
    return of_config(values, lambda i, b: channels[:, :, i])
