"""hardware/ledger.py: what is alive together adds up, and what is welcome takes what is left."""

from __future__ import annotations

import pytest

from mis_mlx.hardware.ledger import Ledger, headroom_bytes, needed_bytes
from mis_mlx.hardware.memory import process_bytes

MIB = 2**20


def test_moments_come_one_after_the_other() -> None:
    """What is held all the time counts in each, and the largest moment decides."""
    ledger = Ledger()
    assert ledger.peak_bytes == 0
    ledger.hold("slots", 5, count=2)
    ledger.moment("forward", activations=3, logits=4)
    ledger.moment("update", made=6)
    assert ledger.peak_bytes == 10 + 7
    ledger.hold("head", 1)
    assert ledger.peak_bytes == 11 + 7


@pytest.mark.parametrize(("most", "found"), [(100, 30), (7, 7)])
def test_a_budget_is_filled_and_no_more(most: int, found: int) -> None:
    """With the process around it the budget is met, by as many as are asked for at the most."""
    ledger = Ledger(100 * MIB, gpu=False)
    left = 30 * MIB + MIB // 2
    ledger.hold("weights", 99 * MIB - process_bytes(100 * MIB, False) - left)
    ledger.moment("step", work=MIB)
    assert ledger.room_bytes == left
    assert ledger.fill("blocks", MIB, most) == found
    assert needed_bytes(100 * MIB, ledger.peak_bytes, False) == 100 * MIB - left + found * MIB
    assert ledger.room_bytes == headroom_bytes(100 * MIB, ledger.peak_bytes, False)


def test_nothing_is_filled_where_the_rest_does_not_fit() -> None:
    ledger = Ledger(MIB, gpu=False)
    ledger.hold("weights", 2 * MIB)
    assert ledger.fill("blocks", 1, 10) == 0
    assert ledger.peak_bytes == 2 * MIB
