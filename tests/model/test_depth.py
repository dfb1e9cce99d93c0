"""Blocks left out: the streamed KL against the resident model, greedy and contiguous choices by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import losses
from mis_mlx.model import depth, load
from mis_mlx.types import Checkpoint


def by_hand(model: Checkpoint, batches: list[mx.array], without: Collection[int]) -> float:
    """KL of mlx-lm's whole model to itself without some layers, nats per token."""
    whole, less = load.resident(model, mx.float32), load.resident(model, mx.float32)
    less.model.layers = [layer for i, layer in enumerate(less.model.layers) if i not in without]
    kl = 0.0
    for tokens in batches:
        reference = losses.Reference(whole(tokens)[0], tokens[0])
        kl += float(reference.compare(less(tokens)[0])[1].mean()) / len(batches)
    return kl


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen2"])
def test_streamed_is_resident(models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str) -> None:
    """Nothing, one and two blocks left out, in one pass; nothing left out costs exactly nothing."""
    variants: list[set[int]] = [set(), {0}, {1}, {2}, {0, 2}]
    found = depth.kl_without(models(kind), batches, mx.float32, variants)
    want = [by_hand(models(kind), batches, v) for v in variants]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)  # another order of float32 sums
    assert found[0] == 0 and (found[1:] > 1e-4).all()


def test_greedy_measures_again(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The cheapest goes first; the second is the cheapest of those left, measured without the first."""
    one = [by_hand(llama, batches, {i}) for i in range(3)]
    first = int(np.argmin(one))
    two = {i: by_hand(llama, batches, {first, i}) for i in range(3) if i != first}
    second = min(two, key=two.__getitem__)
    assert depth.greedy(llama, batches, mx.float32, 2) == tuple(i for i in range(3) if i != first)
    assert depth.greedy(llama, batches, mx.float32, 1) == tuple(i for i in range(3) if i not in (first, second))


def test_contiguous_are_neighbours(llama: Checkpoint, batches: list[mx.array]) -> None:
    """Two of three go: the first two or the last two, whichever costs less."""
    pairs = {0: by_hand(llama, batches, {1, 2}), 2: by_hand(llama, batches, {0, 1})}
    assert depth.contiguous(llama, batches, mx.float32, 1) == (min(pairs, key=pairs.__getitem__),)
