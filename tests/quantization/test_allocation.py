"""Bits under a limit on their mean."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mis_mlx.quantization.bit_allocation import allocate

BITS = (3, 4, 5, 6, 8)


def random_costs(seed: int, count: int = 5) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """Costs that fall about fourfold a bit, with noise that makes some of them no hull at all."""
    rng = np.random.default_rng(seed)

    def cost(bits: int) -> float:
        return float(rng.lognormal(0, 2) * 4.0 ** (3 - bits) * rng.lognormal(0, 0.5))

    costs = {}
    for k in range(count):
        costs[f"m{k}"] = {bits: cost(bits) for bits in BITS}
    sizes = {name: int(rng.integers(1, 4)) for name in costs}
    return costs, sizes


def spent(chosen: dict[str, int], sizes: dict[str, int]) -> float:
    """Mean bits."""
    total = sum(chosen[name] * size for name, size in sizes.items())
    return total / sum(sizes.values())


LIMITS = 2 * (3.5, 4.0, 4.5, 6.0)


@pytest.mark.parametrize(("seed", "limit"), list(enumerate(LIMITS)))
def test_keeps_to_the_limit_and_is_near_the_best(seed: int, limit: float) -> None:
    """Of all 3,125 choices: never over, and no worse than the best with one matrix's largest step
    less to spend.
    """
    costs, sizes = random_costs(seed)

    def cost(choice: dict[str, int]) -> float:
        return sum(costs[name][bits] for name, bits in choice.items())

    slack = 5 * max(sizes.values()) / sum(sizes.values())
    stricter = max(3.0, limit - slack)
    best = math.inf
    for bits in itertools.product(BITS, repeat=len(costs)):
        choice = dict(zip(costs, bits, strict=True))
        if spent(choice, sizes) <= stricter:
            best = min(best, cost(choice))

    chosen = allocate(costs, sizes, limit)

    assert spent(chosen, sizes) <= limit + 1e-12
    assert cost(chosen) <= best + 1e-12


def test_by_pencil() -> None:
    """One bit to spend on two equal matrices goes where it saves more; a matrix twice as large
    needs two.
    """
    costs = {"a": {3: 1.0, 4: 0.5}, "b": {3: 1.0, 4: 0.4}}
    equal = {"a": 1, "b": 1}
    larger_b = {"a": 1, "b": 2}

    assert allocate(costs, equal, 3.5) == {"a": 3, "b": 4}
    assert allocate(costs, larger_b, 3.4) == {"a": 4, "b": 3}
    assert allocate(costs, equal, 4.0) == {"a": 4, "b": 4}
    assert allocate(costs, equal, 2.9) == {}


def test_one_that_is_most_of_the_model_gets_its_bits_before_the_small_ones() -> None:
    """Greedily the ten small ones would take the bit that the large one needs whole, and leave it
    none.
    """
    costs = {"large": {3: 10.0, 4: 1.0}}
    sizes = {"large": 20}
    for k in range(10):
        costs[f"s{k}"] = {3: 1.0, 4: 0.5, 8: 0.1}
        sizes[f"s{k}"] = 1

    chosen = allocate(costs, sizes, 3.81)

    assert chosen["large"] == 4
    assert sorted(chosen.values()) == [3] * 6 + [4] * 5


def test_a_step_that_only_costs_is_not_taken() -> None:
    """More bits that measure worse, by luck, are passed over; a later better one is not."""
    ever_worse = {3: 1.0, 4: 2.0, 5: 3.0}
    better_later = {3: 1.0, 4: 2.0, 5: 0.1}

    assert allocate({"a": ever_worse}, {"a": 1}, 8.0) == {"a": 3}
    assert allocate({"a": better_later}, {"a": 1}, 8.0) == {"a": 5}
