"""A noisy course as its mean."""

from collections.abc import Sequence

from mis_mlx.reporting.run_reader import Point


def smoothed(points: Sequence[Point]) -> tuple[list[Point], int]:
    """(the mean of each point and its neighbours, how many that are); fewer at either end."""
    width = max(3, len(points) // 20 | 1)
    half = width // 2
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    means = []
    for number, (place, _) in enumerate(points):
        reach = min(half, number, len(points) - 1 - number)
        first = number - reach
        last = number + reach + 1
        means.append((place, (totals[last] - totals[first]) / (last - first)))
    return means, width
