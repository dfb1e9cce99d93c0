"""Which windows of a training text are taken for a use: every kind of text in its share, in every
draw.

Calibration, the choice of tokens, repair, rounding, tuning and training all draw here. Two draws of
one use are alike in what they hold, whatever the seed, and only differ in which windows of a kind
these are.
"""

from collections.abc import Sequence

import numpy as np

from mis_mlx.data.token_windows import Windows, order


def sequence(windows: Windows, count: int, key: Sequence[int], again: bool = True) -> np.ndarray:
    """Indices (`count`,) of windows, drawn by random numbers of `key`; the first n of a longer
    sequence are those of n.

    Every beginning of it has each kind in its share, give or take one window (two, of more than
    three kinds). again: a kind whose windows are used up begins anew, in another order; else each
    window comes once, the other kinds take the place of what is used up, and the sequence is as
    long as there are windows, at the most.
    """
    if windows.kind is None:
        raise ValueError("windows of one kind have no shares: permute them")
    numbers = list[np.ndarray]()
    times = list[np.ndarray]()
    present = [
        kind
        for kind, share in enumerate(windows.shares)
        if share > 0 and (windows.kind == kind).any()
    ]
    total = sum(windows.shares[kind] for kind in present)
    for kind in present:
        share = windows.shares[kind]
        of_kind = np.flatnonzero(windows.kind == kind)
        wanted = int(np.ceil(count * share / total)) + 1 if again else len(of_kind)
        rounds = -(-wanted // len(of_kind))
        orders = [
            np.random.default_rng([*key, kind, each]).permutation(of_kind) for each in range(rounds)
        ]
        numbers.append(np.concatenate(orders)[:wanted])
        # The n-th window of a kind is due when its share of the draw has come to n and a half.
        times.append((np.arange(wanted) + 0.5) / share)
    by_time = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(numbers)[by_time][:count]


def some(windows: Windows, count: int, key: Sequence[int]) -> np.ndarray:
    """Indices of up to `count` different windows, each kind in its share."""
    if windows.kind is not None:
        return sequence(windows, count, key, again=False)
    return np.random.default_rng(list(key)).permutation(len(windows.tokens))[:count]


def batch(windows: Windows, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices (`batch_size`,) of the windows of optimizer step `step`, from 0 on: a pure function
    of its arguments. Windows of one kind come as in `token_windows.order`.
    """
    if windows.kind is None:
        return order(len(windows.tokens), batch_size, step, seed)
    return sequence(windows, (step + 1) * batch_size, (seed,))[step * batch_size :]


def token_counts(windows: Windows, vocab: int) -> np.ndarray:
    """(`vocab`,) how often each token comes up, as a share of all that a draw of every kind in its
    share holds.
    """
    if windows.kind is None:
        counts = np.bincount(windows.tokens.reshape(-1), minlength=vocab)
        return counts / counts.sum()
    shares = np.zeros(vocab)
    for kind, share in enumerate(windows.shares):
        tokens = windows.tokens[windows.kind == kind]
        if len(tokens):
            shares += share * np.bincount(tokens.reshape(-1), minlength=vocab) / tokens.size
    return shares / shares.sum()
