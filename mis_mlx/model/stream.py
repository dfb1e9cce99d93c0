"""Passes over a model one block at a time: read, use on every batch, free, next.

Layer-major: every batch goes through block i before block i+1 is read, so the weights are read once per
pass however many batches there are. Does not know why the pass is made; whoever needs to look inside a
block hands in `Tap`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mis_mlx.model import load
from mis_mlx.types import Checkpoint, MisError


class Tap(nn.Module):
    """Stands where `inner` stood and remembers what went into it: (B, T, in)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self._seen: list[mx.array] = []  # underscore: not a parameter

    def __call__(self, x: mx.array) -> mx.array:
        """`inner(x)`, with x kept until `take`."""
        self._seen.append(x)
        return self.inner(x)

    def take(self) -> mx.array:
        """The input of the last call, forgotten here."""
        return self._seen.pop()


def blocks(checkpoint: Checkpoint, dtype: mx.Dtype) -> Iterator[tuple[int, nn.Module, Any]]:
    """(i, block i with evaluated weights, args) for every block in order; one block in memory at a time."""
    args = load.model_args(checkpoint.config)
    for i in range(checkpoint.config["num_hidden_layers"]):
        made = load.block(checkpoint, i, args, dtype)
        yield i, into_memory(made, f"{checkpoint.path}: model.layers.{i}."), args
        del made
        mx.clear_cache()


def embed(checkpoint: Checkpoint, batches: Sequence[mx.array], dtype: mx.Dtype) -> list[mx.array]:
    """Token ids [(B, T)] -> hidden states [(B, T, D)] at the input of the first block."""
    table = into_memory(load.embedding(checkpoint, dtype), f"{checkpoint.path}: model.embed_tokens.")
    hidden = [table(tokens) for tokens in batches]
    mx.eval(hidden)
    return hidden


def forward(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    dtype: mx.Dtype,
    tap: Callable[[nn.Module], None] | None = None,
    look: Callable[[int, int, nn.Module, mx.array, mx.array], list[mx.array]] | None = None,
) -> tuple[list[mx.array], list[list[list[mx.array]]]]:
    """One streamed pass: token ids [(B, T)] -> final hidden states [(B, T, D)], after the last norm.

    `tap(block)` may put Taps into a block before it is used; `look(i, b, block, into, out)` returns lazy
    statistics of batch b in block i, which are evaluated with the block's output and returned as
    [block][batch][statistic]. The arithmetic is that of the resident model, operation for operation.
    """
    hidden = embed(checkpoint, batches, dtype)
    seen: list[list[list[mx.array]]] = []
    for i, made, args in blocks(checkpoint, dtype):
        if tap:
            tap(made)
        seen.append([])
        for b, into in enumerate(hidden):
            out = made(into, load.mask(args, made, into))
            found = look(i, b, made, into, out) if look else []
            mx.eval(out, *found)
            seen[-1].append(found)
            hidden[b] = out
    norm = into_memory(load.final_norm(checkpoint, dtype), f"{checkpoint.path}: model.norm.")
    hidden = [norm(h) for h in hidden]
    mx.eval(hidden)
    return hidden, seen


def through(block: nn.Module, args: Any, hidden: Sequence[mx.array]) -> list[mx.array]:
    """Every batch's hidden states (B, T, D) through one block, evaluated batch by batch."""
    out = []
    for into in hidden:
        out.append(block(into, load.mask(args, block, into)))
        mx.eval(out[-1])
    return out


def settle(*arrays: Any) -> None:
    """Evaluate now: what these were made of may be freed, or changed, after this line."""
    mx.eval(*arrays)


def resident_forward(model: nn.Module, batches: Sequence[mx.array]) -> list[mx.array]:
    """The same final hidden states from a model that is in memory whole."""
    hidden = []
    for tokens in batches:
        hidden.append(model.model(tokens))
        mx.eval(hidden[-1])
    return hidden


def into_memory(module: nn.Module, where: str = "") -> nn.Module:
    """Evaluate a lazily opened module and return it; from here on its bytes are in memory.

    MisError names the first tensor that holds NaN or infinity, with `where` before its name: a model with
    one such weight answers nothing but token 0, without a word.
    """
    named: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    bad = {name: (~mx.isfinite(a)).sum() for name, a in named.items() if mx.issubdtype(a.dtype, mx.floating)}
    mx.eval(module.parameters(), bad)
    for name, count in bad.items():
        if count.item():
            raise MisError(f"{where}{name} holds {count.item()} values that are not numbers: download the model again")
    return module
