"""Widths a block, and the repair of one block alone, against numpy."""

import itertools
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import unequal_widths  # noqa: E402


def test_the_widths_of_least_cost_are_those_of_all_combinations() -> None:
    """Dynamic programming finds what trying every combination finds."""
    rng = np.random.default_rng(0)
    sizes = (1, 2, 3)
    costs = []
    for _ in range(5):
        costs.append(dict(zip(sizes, rng.random(3).tolist(), strict=True)))
    for total in (6, 9, 13):
        widths = unequal_widths.least(costs, total)
        assert sum(widths) == total

        def cost(choice: tuple[int, ...] | list[int]) -> float:
            return sum(by_width[width] for by_width, width in zip(costs, choice, strict=True))

        combinations = itertools.product(sizes, repeat=len(costs))
        least = min(cost(choice) for choice in combinations if sum(choice) == total)
        assert cost(widths) == pytest.approx(least)


def test_a_block_is_repaired_as_least_squares_over_its_tokens() -> None:
    """The refit and both errors, against float64 over the tokens themselves."""
    rng = np.random.default_rng(1)
    activations = [mx.array(rng.normal(size=(1, 40, 12)).astype(np.float32)) for _ in range(4)]
    goals = [mx.array(rng.normal(size=(1, 40, 5)).astype(np.float32)) for _ in range(4)]
    down = rng.normal(size=(5, 12)).astype(np.float32)
    kept = np.array([0, 2, 3, 7, 8, 10])
    gone = np.array([1, 4, 5, 6, 9, 11])
    grams = unequal_widths.Grams(activations, goals)
    weight, error, left = grams.repaired(mx.array(down), kept)

    def rows(windows: list[int]) -> np.ndarray:
        inputs = np.concatenate([np.array(activations[i][0], np.float64) for i in windows])
        goal = np.concatenate([np.array(goals[i][0], np.float64) for i in windows])
        return np.asarray(inputs / np.sqrt(np.square(goal).mean(axis=1, keepdims=True)))

    learned = rows([0, 1, 2])
    gram = learned[:, kept].T @ learned[:, kept]
    ridge = np.sqrt(unequal_widths.LOCAL_RIDGE * np.trace(gram) / len(kept))
    left_hand = np.concatenate([learned[:, kept], ridge * np.eye(len(kept))])
    missing = learned[:, gone] @ down[:, gone].T
    right_hand = np.concatenate([missing, np.zeros((len(kept), 5))])
    update = np.linalg.lstsq(left_hand, right_hand, rcond=None)[0].T
    np.testing.assert_allclose(np.array(weight), down[:, kept] + update, atol=1e-4)
    judged = rows([3])
    lost = judged[:, gone] @ down[:, gone].T
    assert error == pytest.approx(np.square(lost).sum() / (40 * 5), rel=1e-4)
    rest = lost - judged[:, kept] @ update.T
    assert left == pytest.approx(np.square(rest).sum() / (40 * 5), rel=1e-4)


def test_the_stored_widths_have_equal_sums() -> None:
    """Every choice that was measured has the neurons of equal widths, in steps of 256."""
    folder = ROOT / "benchmarks" / "results" / "linux-x86_64"
    stored = json.loads((folder / "unequal_widths.json").read_text())
    for name, widths in stored["widths"].items():
        mean = int(name.split(",")[0])
        assert sum(widths) == mean * len(stored["costs"])
        assert all(width % unequal_widths.STEP == 0 for width in widths)
