"""Grids fitted to groups, in few launches and bounded memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import gptq, rounding
from tests import launches, peaks

BITS = (2, *rounding.CANDIDATE_BITS)


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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", rounding.GROUPS)
def test_columns_that_cost_more_are_nearer(group: int, bits: int) -> None:
    """Weighed by the costs, the error is less than on a grid for equal ones, in several slabs too;
    and in no group is it more than on MLX's.
    """
    groups = groups_of(3000, group)
    costs = costs_of(group)

    def errors(scales: mx.array, biases: mx.array) -> mx.array:
        scale, bias = (array.reshape(-1, 1) for array in (scales, biases))
        levels = mx.clip(mx.round((groups - bias) / scale), 0, 2**bits - 1)
        stored = (array.astype(mx.float16).astype(mx.float32) for array in (scale, bias))
        scale, bias = stored
        return mx.square(groups - levels * scale - bias) @ (costs / costs.sum())

    fitted = errors(*rounding.fit_grids(groups, bits, costs, fused=False))
    equal = errors(*rounding.fit_grids(groups, bits, mx.ones(group), fused=False))
    _, *plain = mx.quantize(groups, group_size=group, bits=bits)
    assert (fitted <= 1.0001 * errors(*plain) + 1e-9).all().item()
    assert fitted[3:].sum().item() < 0.99 * equal[3:].sum().item()


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
        chosen.append(np.array(rounding.unpacked(packed[0], bits)))
    assert (chosen[0] != chosen[1]).mean() < 1 / 500


@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_columns_takes_few_launches(bits: int) -> None:
    """A tenth of the 553 that one candidate after the other took; all groups of one in a slab."""
    columns = groups_of(3072, 64)
    costs = costs_of(64)
    mx.eval(columns, costs)
    grids = rounding.fit_grids(columns, bits, costs, fused=True)
    assert launches.counted(grids).total() <= launches.FIT_LAUNCHES < 553 / 10


def test_the_numbers_that_a_fit_writes_are_counted() -> None:
    """The plan's count for a weight, beside MLX's graph: a grid of 8 bits, which has one candidate,
    takes a third.
    """
    groups = groups_of(8, 64)
    written = dict[int, float]()
    for bits in (3, 4, 5, 6, 8):
        count = 0

        def look(told: dict[str, Any]) -> None:
            nonlocal count
            if told["type"] == "primitive" and told["name"] not in launches.VIEWS | {"Reduce"}:
                count += sum(math.prod(shape) for _, shape, _ in told["outputs"])

        mx.export_function(look, partial(rounding.fit_grids, bits=bits), groups)
        written[bits] = count / groups.size
    eight = written.pop(8)
    for found in written.values():
        assert 0.97 * rounding.FITTED_NUMBERS < found <= rounding.FITTED_NUMBERS
    assert eight < rounding.FITTED_NUMBERS / 3


@pytest.mark.parametrize("fused", [False, True])
def test_memory_does_not_grow_with_the_candidates(fused: bool) -> None:
    """Four times as many groups: as many candidates at once."""
    most = rounding.FUSED_CANDIDATES if fused else rounding.CANDIDATES
    in_a_slab = most // (16 * 64)
    seen = []
    for slabs in (2, 8):
        columns = groups_of(slabs * in_a_slab, 64)
        costs = costs_of(64)
        mx.eval(columns, costs)
        with peaks.of_mlx() as peak:
            mx.eval(rounding.fit_grids(columns, 4, costs, fused=fused))
        seen.append(peak.nbytes)
    assert seen[0] < 2 * 4 * most
    assert seen[1] < 1.5 * seen[0]  # not four; what two threads hold at once differs a little
