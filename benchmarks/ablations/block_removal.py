"""Which blocks a model can do without: its KL to itself with sets of blocks left out, in one
streamed pass.

Every variant is the model itself up to the first block that it leaves out; from there on it marches
beside it, so all of them see each block while it is in memory. Does not write anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mis_mlx.compute import host_losses
from mis_mlx.maths import losses
from mis_mlx.maths.importance import Key, select_blocks
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.types import Checkpoint


def kl_without(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    dtype: mx.Dtype,
    variants: Sequence[Collection[int]],
) -> np.ndarray:
    """KL(model || model without the blocks of a variant), nats per token, (len(variants),). Token
    ids [(B, T)].

    Holds the hidden states of all variants: (len(variants) + 1) arrays (B, T, D) a batch.
    """
    source = stream.Stream(checkpoint, dtype)
    whole = source.embed(batches)
    begun: dict[int, stream.Hidden] = {}
    for i, block in source.blocks():
        for v, without in enumerate(variants):
            if i in without:
                begun.setdefault(v, list(whole))
            elif v in begun:
                source.run_block(block, begun[v])
        source.run_block(block, whole)
    source.norm(whole)
    head = source.head()
    rows = losses.chunk_rows(shape_of(checkpoint.config).vocab) // 2
    found = np.zeros(len(variants))
    for hidden in begun.values():
        source.norm(hidden)
    for b, h in enumerate(whole):
        flat = h.reshape(-1, h.shape[-1])
        for start in range(0, len(flat), rows):
            at = slice(start, start + rows)
            whole_logits = load.logits(head, flat[at])
            any_token = np.zeros(len(flat[at]), int)
            for v, hidden in begun.items():
                less = load.logits(head, hidden[b].reshape(flat.shape)[at])
                found[v] += float(
                    host_losses.compared(whole_logits * 1, less, any_token)[:, 0].sum()
                )
    return found / sum(h.shape[0] * h.shape[1] for h in whole)


def kept(
    how: str,
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    dtype: mx.Dtype,
    keep: int,
    fisher: Mapping[Key, np.ndarray],
) -> tuple[int, ...]:
    """Layers to keep. how: kl (those go whose absence costs least, one by one), greedy, contiguous,
    or fisher (by second order, ablations/fisher_importance).
    """
    layers = range(int(checkpoint.config["num_hidden_layers"]))
    if how == "fisher":
        return select_blocks({i: float(fisher[i, "layers"][0]) for i in layers}, keep)
    if how == "kl":
        costs = kl_without(checkpoint, batches, dtype, [{i} for i in layers])
        return select_blocks(dict(enumerate(costs.tolist())), keep)
    return {"greedy": greedy, "contiguous": contiguous}[how](checkpoint, batches, dtype, keep)


def greedy(
    checkpoint: Checkpoint, batches: Sequence[mx.array], dtype: mx.Dtype, keep: int
) -> tuple[int, ...]:
    """Layers to keep: the block that costs least goes, then the others are measured anew without
    it, and so on.
    """
    kept = list(range(int(checkpoint.config["num_hidden_layers"])))
    gone: list[int] = []
    while len(kept) > keep:
        costs = kl_without(checkpoint, batches, dtype, [{*gone, i} for i in kept])
        gone.append(kept.pop(int(costs.argmin())))
    return tuple(kept)


def contiguous(
    checkpoint: Checkpoint, batches: Sequence[mx.array], dtype: mx.Dtype, keep: int
) -> tuple[int, ...]:
    """Layers to keep when those that go are neighbours: the run whose absence costs least (arXiv
    2408.11796).
    """
    layers = int(checkpoint.config["num_hidden_layers"])
    runs = [range(first, first + layers - keep) for first in range(keep + 1)]
    gone = runs[int(kl_without(checkpoint, batches, dtype, runs).argmin())]
    return tuple(i for i in range(layers) if i not in gone)
