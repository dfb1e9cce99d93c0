"""Blocks left out: the streamed KL against the resident model, greedy and contiguous choices by
hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.ablations import block_removal
from mis_mlx.models import host_losses, load
from mis_mlx.types import Checkpoint


def by_hand(model: Checkpoint, batches: list[mx.array], without: Collection[int]) -> float:
    """KL of mlx-lm's whole model to itself without some layers, nats per token."""
    whole = load.resident(model, mx.float32)
    less = load.resident(model, mx.float32)
    less.model.layers = [layer for i, layer in enumerate(less.model.layers) if i not in without]
    kl = 0.0
    for tokens in batches:
        kl += float(
            host_losses.compared(whole(tokens)[0], less(tokens)[0], np.array(tokens[0]))[
                :, 0
            ].mean()
        ) / len(batches)
    return kl


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen2"])
def test_streamed_is_resident(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Nothing, one and two blocks left out, in one pass; nothing left out costs exactly nothing."""
    variants: list[set[int]] = [set(), {0}, {1}, {2}, {0, 2}]
    found = block_removal.kl_without(models(kind), batches, mx.float32, variants)
    want = [by_hand(models(kind), batches, v) for v in variants]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)  # another order of float32 sums
    assert found[0] == 0 and (found[1:] > 1e-4).all()


def test_greedy_measures_again(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The cheapest goes first; the second is the cheapest of those left, measured without the
    first.
    """
    one = [by_hand(llama, batches, {i}) for i in range(3)]
    first = int(np.argmin(one))
    two = {i: by_hand(llama, batches, {first, i}) for i in range(3) if i != first}
    second = min(two, key=two.__getitem__)
    assert block_removal.greedy(llama, batches, mx.float32, 2) == tuple(
        i for i in range(3) if i != first
    )
    assert block_removal.greedy(llama, batches, mx.float32, 1) == tuple(
        i for i in range(3) if i not in (first, second)
    )


def test_contiguous_are_neighbours(llama: Checkpoint, batches: list[mx.array]) -> None:
    """Two of three go: the first two or the last two, whichever costs less."""
    pairs = {0: by_hand(llama, batches, {1, 2}), 2: by_hand(llama, batches, {0, 1})}
    assert block_removal.contiguous(llama, batches, mx.float32, 1) == (
        min(pairs, key=pairs.__getitem__),
    )


def test_what_stays_by_kl_and_by_second_order(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The block that costs least by itself goes; of Fisher values the least goes."""
    one = [by_hand(llama, batches, {i}) for i in range(3)]
    kept = tuple(i for i in range(3) if i != int(np.argmin(one)))
    how = {"dtype": mx.float32, "keep": 2}
    assert block_removal.kept("kl", llama, batches, fisher={}, **how) == kept
    fisher = {(i, "layers"): np.array([value]) for i, value in enumerate((0.2, 0.1, 0.3))}
    assert block_removal.kept("fisher", llama, batches, fisher=fisher, **how) == (0, 2)
