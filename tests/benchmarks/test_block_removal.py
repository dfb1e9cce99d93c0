"""Blocks left out: the streamed KL against the resident model, greedy and contiguous choices by
hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.ablations import block_removal
from mis_mlx.compute import host_losses
from mis_mlx.models import load
from mis_mlx.types import Checkpoint


def by_hand(model: Checkpoint, batches: list[mx.array], without: Collection[int]) -> float:
    """KL of mlx-lm's whole model to itself without some layers, nats per token."""
    whole = load.resident_model(model, mx.float32)
    less = load.resident_model(model, mx.float32)
    less.model.layers = [layer for i, layer in enumerate(less.model.layers) if i not in without]
    means = []
    for tokens in batches:
        targets = np.array(tokens[0])
        compared = host_losses.compared(whole(tokens)[0], less(tokens)[0], targets)
        means.append(float(compared[:, 0].mean()))
    return float(np.mean(means))


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen2"])
def test_streamed_is_resident(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Nothing, one and two blocks left out, in one pass; nothing left out costs exactly nothing."""
    variants: list[set[int]] = [set(), {0}, {1}, {2}, {0, 2}]
    want = [by_hand(models(kind), batches, without) for without in variants]

    found = block_removal.kl_without(models(kind), batches, mx.float32, variants)

    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)  # another order of float32 sums
    assert found[0] == 0
    assert (found[1:] > 1e-4).all()


def test_greedy_measures_again(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The cheapest goes first; the second is the cheapest of those left, measured without the
    first.
    """
    one = [by_hand(llama, batches, {i}) for i in range(3)]
    first = int(np.argmin(one))
    two = {i: by_hand(llama, batches, {first, i}) for i in range(3) if i != first}
    second = min(two, key=two.__getitem__)
    without_one = sorted({0, 1, 2} - {first})
    without_two = sorted({0, 1, 2} - {first, second})

    assert block_removal.greedy(llama, batches, mx.float32, 2) == tuple(without_one)
    assert block_removal.greedy(llama, batches, mx.float32, 1) == tuple(without_two)


def test_contiguous_are_neighbours(llama: Checkpoint, batches: list[mx.array]) -> None:
    """Two of three go: the first two or the last two, whichever costs less."""
    without_last = by_hand(llama, batches, {1, 2})
    without_first = by_hand(llama, batches, {0, 1})
    stays = 0 if without_last <= without_first else 2

    assert block_removal.contiguous(llama, batches, mx.float32, 1) == (stays,)


def test_what_stays_by_kl_and_by_second_order(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The block that costs least by itself goes; of Fisher values the least goes."""
    costs = [by_hand(llama, batches, {i}) for i in range(3)]
    dearer = sorted({0, 1, 2} - {int(np.argmin(costs))})
    fisher = {(i, "layers"): np.array([value]) for i, value in enumerate((0.2, 0.1, 0.3))}
    how = {"dtype": mx.float32, "keep": 2}

    assert block_removal.kept("kl", llama, batches, fisher={}, **how) == tuple(dearer)
    assert block_removal.kept("fisher", llama, batches, fisher=fisher, **how) == (0, 2)
