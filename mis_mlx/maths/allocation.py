"""Bits for every matrix under a limit on their mean: the next bit goes where it saves most per bit."""

from collections.abc import Mapping


def allocate(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """{name: bits} with mean bits, weighed by sizes, of at most `mean_bits`; {} when even the fewest are too many.

    costs: {name: {bits: cost}}, the same bits for all. Greedy along each name's lower convex hull, which is the best
    there is but for the last step (Lagrange; what does not fit any more is passed over)."""
    start = {name: min(cost) for name, cost in costs.items()}
    room = sum((mean_bits - start[name]) * size for name, size in sizes.items())
    if room < 0:
        return {}
    steps = [
        (saved / added, name, bits) for name, cost in costs.items() for saved, added, bits in _hull(cost, sizes[name])
    ]
    chosen, stuck = dict(start), set[str]()
    for _, name, bits in sorted(steps, key=lambda s: -s[0]):  # a hull's steps save less and less: in their order
        added = (bits - chosen[name]) * sizes[name]
        if name in stuck or added > room:
            stuck.add(name)
            continue
        chosen[name], room = bits, room - added
    return chosen


def _hull(cost: Mapping[int, float], size: int) -> list[tuple[float, int, int]]:
    """[(cost saved, weights times bits added, bits then)] from the fewest bits on, steepest first."""
    bits, steps = sorted(cost), []
    at = 0
    while at + 1 < len(bits):
        steepest = max(range(at + 1, len(bits)), key=lambda j: (cost[bits[at]] - cost[bits[j]]) / (bits[j] - bits[at]))
        if (saved := cost[bits[at]] - cost[bits[steepest]]) <= 0:
            break
        steps.append((saved, (bits[steepest] - bits[at]) * size, bits[steepest]))
        at = steepest
    return steps
