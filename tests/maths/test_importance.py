"""Importance, AAIS and who is kept: by pencil."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import importance
from mis_mlx.maths.importance import Sums
from mis_mlx.types import Air, MisError


def sums_of(samples: np.ndarray, weights: list[float]) -> Sums:
    """Statistics of samples (batches, channels) of one token each, one weight a batch."""
    out = Sums(*np.zeros((2, samples.shape[1])))
    for sample, weight in zip(samples, weights, strict=True):
        out.add(sample**2, weight)
    return out


def air(celsius: float | None, metres: float | None = 832.0) -> Air:
    return Air(celsius, altitude_m=metres)


def test_samples_by_pencil() -> None:
    """Channel: sum of a^2. Block: 1 - cosine."""
    x = mx.array([[[3.0, 4.0, 0.0, -2.0], [-3.0, 4.0, 6.0, 8.0]]])
    assert importance.square_sample(x).tolist() == [18.0, 32.0, 36.0, 68.0]
    into = mx.array([[[1.0, 0.0], [1.0, 0.0]]])
    out = mx.array([[[2.0, 0.0], [0.0, 5.0]]])
    assert importance.block_sample(into, out).item() == pytest.approx((0 + 1) / 2)


def test_a_warm_batch_changes_who_is_kept() -> None:
    """Pencil: channel 0 fires 2 at 10 °C, channel 1 fires 1.5 and 1.5; at 10 and 30 °C, in °C, 1
    wins.

    Plain: sqrt(4) = 2 < sqrt(4.5), so let channel 0 fire 2.2: 2.2 > 2.12 and 0 is kept. With T_b =
    10, 30: channel 0 has 22 / h, channel 1 has sqrt(15^2 + 45^2) / h = 47.4 / h and is kept
    instead.
    """
    samples = np.array([[2.2, 1.5], [0.0, 1.5]])
    sums = sums_of(samples, [10.0, 30.0])

    by_square = importance.rms(sums)
    by_weather = importance.aais(sums, 832.0)
    at_two_metres = importance.aais(sums, 2.0)

    assert importance.top(by_square, 1) == (0,)
    assert importance.top(by_weather, 1) == (1,)
    assert at_two_metres.tolist() == pytest.approx([11.0, np.sqrt(2250) / 2])


def test_groups_are_judged_by_all_their_heads() -> None:
    """Two groups of two: 3-4-5; and the heads of a group that goes cannot stay."""
    scores = np.array([3.0, 4.0, 0.0, 4.5])
    np.testing.assert_allclose(importance.group_scores(scores, 2), [5, 4.5])
    assert importance.top_in_groups(scores, 2, 1, 1) == (1,)


def test_weight_is_kelvin() -> None:
    """8 °C weigh 281.15 K, frost a little less; an unknown temperature 1; the sea's altitude is
    refused.
    """
    assert importance.weight_of(air(8.0)) == pytest.approx(281.15)
    assert importance.weight_of(air(-3.0)) == pytest.approx(270.15)
    assert importance.weight_of(air(None)) == importance.weight_of(Air()) == 1.0
    with pytest.raises(MisError, match="altitude"):
        importance.weight_of(air(8.0, 0.0))


def test_ties_keep_the_lower_index() -> None:
    """Equal scores: the first stay; the result is sorted."""
    assert importance.top(np.array([1.0, 2.0, 2.0, 1.0, 1.0]), 3) == (0, 1, 2)
    assert importance.top(np.zeros(5), 2) == (0, 1)
    assert importance.select_blocks({0: 0.5, 1: 0.1, 2: 0.1, 3: 0.9}, 3) == (0, 1, 3)


def test_heads_are_kept_group_by_group() -> None:
    """The three best heads of four are in one group; still each group keeps its share."""
    scores = np.array([9.0, 8.0, 7.0, 6.0, 0.3, 0.1, 0.2, 0.4])
    assert importance.top_in_groups(scores, 2, 4, 2) == (0, 1, 4, 7)
    for keep in (2, 4, 6, 8):
        kept = importance.top_in_groups(scores, 2, keep, 2)
        of_first_group = [head for head in kept if head < 4]
        assert len(of_first_group) == keep // 2
        assert len(kept) == keep


def layers(weight: float) -> list[Sums]:
    """Three layers of 1,024 channels whose importance falls smoothly."""
    falling = np.exp(-np.arange(1024) / 400.0)
    made = []
    for scale in (1.0, 1.1, 0.9):
        samples = np.stack([falling * scale] * 2)
        made.append(sums_of(samples, [weight, weight]))
    return made


def test_the_size_follows_the_conditions() -> None:
    """At 8 °C and 832 m the fixed size; higher is smaller, one multiple at least; warmer larger."""

    def size(weight: float, altitude_m: float = 832.0, multiple: int = 128) -> int:
        statistics = layers(weight)
        return importance.conditions_size(statistics, 512, multiple=multiple, altitude_m=altitude_m)

    assert size(281.15, multiple=256) == 512
    low = size(281.15, altitude_m=100.0)
    reference = size(281.15)
    high = size(281.15, altitude_m=2500.0)
    assert 1024 >= low > reference == 512 > high >= 128
    assert size(310.0, multiple=16) > size(281.15, multiple=16)
