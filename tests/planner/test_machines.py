"""The plan of several machines: blocks by hand, bytes by hand, refusals; what it says is what
`distill` does.
"""

from __future__ import annotations

import pytest

from mis_mlx.models.passing import pipeline_parallel


@pytest.mark.parametrize(
    ("layers", "keeps", "reading", "counts"),
    [
        (30, [30, 30], 5.0, [15, 15]),  # all in memory: halves
        (9, [9, 9, 9], 5.0, [3, 3, 3]),
        (10, [2, 8], 5.0, [2, 8]),  # room for all between them: as much as each has room for
        (12, [2, 8], 5.0, [2, 10]),  # reading 2 takes no longer than computing 10
        (20, [2, 2], 5.0, [10, 10]),
        (10, [0, 0], 0.5, [5, 5]),  # reading is for free beside the work
        (3, [0, 9], 4.0, [0, 3]),  # the small one has none
    ],
)
def test_blocks_go_where_they_cost_least(
    layers: int, keeps: list[int], reading: float, counts: list[int]
) -> None:
    """Pencil cases; where machines work one after the other, no division in two takes less."""
    assert pipeline_parallel.share_blocks(layers, keeps, reading) == counts
    assert sum(counts) == layers
    if len(keeps) == 2 and sum(keeps) < layers:

        def took(shares: list[int]) -> float:
            pairs = zip(shares, keeps, strict=True)
            return sum(max(count, reading * max(0, count - kept)) for count, kept in pairs)

        others = [took([first, layers - first]) for first in range(layers + 1)]
        assert took(counts) <= min(others)
