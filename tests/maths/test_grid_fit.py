"""Grids fitted to groups: all candidates at once are one after the other, in few launches and
bounded memory.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import gptq, rounding
from tests import launches

BITS = (2, *rounding.CANDIDATE_BITS)


class Grids(NamedTuple):
    """Of groups (R, G), with their mean squared errors: (R,) each."""

    scales: mx.array
    biases: mx.array
    errors: mx.array


def groups_of(rows: int, group: int) -> mx.array:
    """Weights with heavy tails (rows, G); a group of zeros, one of equal ones, one of outliers."""
    weights = np.random.default_rng(rows + group).standard_t(4, size=(rows, group))
    weights[0] = 0
    weights[1] = 0.5
    weights[2, :3] = 1e4
    return mx.array(weights.astype(np.float32))


def costs_of(group: int) -> mx.array:
    """What errors of a group's columns cost (G,)."""
    costs = np.random.default_rng(group).uniform(0.1, 9, size=group)
    return mx.array(costs.astype(np.float32))


def levels_on(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The nearest integers (R, G)."""
    levels = mx.round((groups - biases[:, None]) / scales[:, None])
    return mx.clip(levels, 0, 2**bits - 1)


def fitted_in_turn(groups: mx.array, bits: int, costs: mx.array) -> Grids:
    """The same fit written as a loop: each candidate replaces the best one where it is better."""
    size = groups.shape[1]
    shares = costs / costs.sum()

    def mean(values: mx.array) -> mx.array:
        return (values * shares).sum(axis=1)

    def error(scales: mx.array, biases: mx.array) -> mx.array:
        levels = levels_on(groups, scales, biases, bits)
        scale = scales.astype(mx.float16).astype(mx.float32)
        bias = biases.astype(mx.float16).astype(mx.float32)
        rounded = levels * scale[:, None] + bias[:, None]
        return mean(mx.square(groups - rounded))

    def better(best: Grids, scales: mx.array, biases: mx.array) -> Grids:
        usable = mx.abs(scales) > 1e-12
        errors = error(mx.where(usable, scales, 1.0), biases)
        wins = usable & (errors < best.errors)
        offered = Grids(scales, biases, errors)
        pairs = zip(offered, best, strict=True)
        chosen = [mx.where(wins, ours, theirs) for ours, theirs in pairs]
        mx.eval(chosen)
        return Grids(*chosen)

    _, scales, biases = mx.quantize(groups, group_size=size, bits=bits)
    scale = scales[:, 0]
    bias = biases[:, 0]
    best = Grids(scale, bias, error(scale, bias))
    step = rounding.RANGE_STEPS.get(bits)
    ends = [1.0] if step is None else [1.0 - step * number for number in range(4)]
    for low_share, high_share in product(ends, repeat=2):
        low = groups.min(axis=1) * low_share
        width = groups.max(axis=1) * high_share - low
        best = better(best, width / (2**bits - 1), low)
    for _ in range(2):
        levels = levels_on(groups, best.scales, best.biases, bits)
        off_mean = levels - mean(levels)[:, None]
        variance = mx.maximum(mean(mx.square(off_mean)), 1e-9)
        slope = mean(off_mean * groups) / variance
        best = better(best, slope, mean(groups) - slope * mean(levels))
    return best


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", rounding.GROUPS)
def test_all_candidates_at_once_are_one_after_the_other(group: int, bits: int) -> None:
    """To the bit, in one slab of groups and in several."""
    for rows in (5, 3000):
        groups = groups_of(rows, group)
        costs = costs_of(group)
        scales, biases = rounding.fit_grids(groups, bits, costs, fused=False)
        wanted = fitted_in_turn(groups, bits, costs)
        assert mx.array_equal(scales.reshape(-1), wanted.scales)
        assert mx.array_equal(biases.reshape(-1), wanted.biases)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_fused_gives_the_same_integers(bits: int) -> None:
    """But for one in 500: a compiler may round a product and a sum at once."""
    weight = np.array(groups_of(96, 128))
    inputs = np.random.default_rng(1).normal(size=(512, 128)) + 1
    gram = inputs.T @ inputs
    chosen = []
    for fused in (False, True):
        factor = gptq.factorize(gram.copy())
        packed = gptq.rounded([mx.array(weight)], factor, 64, bits, fused=fused)[0]
        chosen.append(np.array(rounding.integers(packed[0], 64, bits)))
    assert (chosen[0] != chosen[1]).mean() < 1 / 500


@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_columns_takes_few_launches(bits: int) -> None:
    """A tenth of the 553 that one candidate after the other took; all groups of one in a slab."""
    columns = groups_of(3072, 64)
    costs = costs_of(64)
    mx.eval(columns, costs)
    grids = rounding.fit_grids(columns, bits, costs, fused=True)
    assert launches.counted(grids).total() <= launches.FIT_LAUNCHES < 553 / 10


@pytest.mark.parametrize("fused", [False, True])
def test_memory_does_not_grow_with_the_candidates(fused: bool) -> None:
    """Four times as many groups: as many candidates at once."""
    most = rounding.FUSED_CANDIDATES if fused else rounding.CANDIDATES
    in_a_slab = most // (16 * 64)
    peaks = []
    for slabs in (2, 8):
        columns = groups_of(slabs * in_a_slab, 64)
        costs = costs_of(64)
        mx.eval(columns, costs)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(rounding.fit_grids(columns, 4, costs, fused=fused))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 2 * 4 * most
    assert peaks[1] < 1.5 * peaks[0]  # not four; what two threads hold at once differs a little
