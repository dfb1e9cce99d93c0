"""Which windows of a training text a use draws: every kind of text in its share, in every draw.

Calibration, the choice of tokens, repair, rounding, tuning and training all draw here. Two draws of
one use hold the same amount of each kind, whatever the seed; they only differ in which windows of a
kind these are.
"""

from collections.abc import Sequence

import numpy as np

from mis_mlx.data.token_windows import Windows, order


def drawn_sequence(
    windows: Windows,
    count: int,
    key: Sequence[int],
    again: bool = True,
) -> np.ndarray:
    """Indices (`count`,) of windows, drawn by random numbers of `key`.

    The first n of a longer sequence are those of n. Every beginning of it has each kind in its
    share, give or take one window (two, of more than three kinds).

    again: a kind whose windows are used up begins anew, in another order. Without it each window
    comes once, the other kinds take the place of what is used up, and the sequence is as long as
    there are windows, at the most. ValueError for windows of one kind.
    """
    if windows.kind is None:
        raise ValueError("windows of one kind have no shares: permute them")
    # A kind without windows cannot be drawn: the others have its share.
    counts = np.bincount(windows.kind, minlength=len(windows.shares))
    shares = {}
    for kind, share in enumerate(windows.shares):
        if share > 0 and counts[kind]:
            shares[kind] = share
    total = sum(shares.values())
    numbers = []
    times = []
    for kind, share in shares.items():
        of_kind = np.flatnonzero(windows.kind == kind)
        wanted = len(of_kind)
        if again:
            # one more than its share of the draw, because a kind may be a window ahead
            due = count * share / total
            wanted = int(np.ceil(due)) + 1
        # Each round has its own random numbers, so that a longer draw begins as a shorter one.
        rounds = -(-wanted // len(of_kind))
        orders = []
        for number in range(rounds):
            rng = np.random.default_rng([*key, kind, number])
            orders.append(rng.permutation(of_kind))
        numbers.append(np.concatenate(orders)[:wanted])
        # The n-th window of a kind is due when its share of the draw has come to n and a half.
        middles = np.arange(wanted) + 0.5
        times.append(middles / share)
    # Merged by time, every beginning of the sequence has the kinds in their shares. The stable sort
    # puts the first kind first where two are due together: the same draw on every machine.
    by_time = np.argsort(np.concatenate(times), kind="stable")
    drawn = np.concatenate(numbers)[by_time]
    return drawn[:count]


def drawn_windows(windows: Windows, count: int, key: Sequence[int]) -> np.ndarray:
    """Indices of up to `count` different windows, each kind in its share."""
    if windows.kind is not None:
        return drawn_sequence(windows, count, key, again=False)
    rng = np.random.default_rng(list(key))
    permutation = rng.permutation(len(windows.tokens))
    return permutation[:count]


def drawn_batch(windows: Windows, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices (`batch_size`,) of the windows of optimizer step `step`, counted from 0.

    A pure function of its arguments, so a resumed run draws what an uninterrupted one would.
    Windows of one kind come as in `token_windows.order`.
    """
    if windows.kind is None:
        return order(len(windows.tokens), batch_size, step, seed)
    start = step * batch_size
    drawn = drawn_sequence(windows, start + batch_size, (seed,))
    return drawn[start:]


def token_counts(windows: Windows, vocab: int) -> np.ndarray:
    """(`vocab`,) share of each token in a draw that has every kind in its share."""
    if windows.kind is None:
        counts = np.bincount(windows.tokens.reshape(-1), minlength=vocab)
        return counts / counts.sum()
    shares = np.zeros(vocab)
    for kind, share in enumerate(windows.shares):
        of_kind = windows.kind == kind
        tokens = windows.tokens[of_kind].reshape(-1)
        # Counted within the kind first: a kind with many windows weighs no more than its share.
        if len(tokens):
            counts = np.bincount(tokens, minlength=vocab)
            shares += share * counts / tokens.size
    return shares / shares.sum()
