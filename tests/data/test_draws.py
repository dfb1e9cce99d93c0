"""One draw for every use: each kind of text in its share, in every beginning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mis_mlx.data import draws, preparation, token_windows
from mis_mlx.data.token_windows import Windows

BUILT_IN = tuple(preparation.SHARES.values())


def of_kinds(counts: Sequence[int], shares: Sequence[float]) -> Windows:
    """So many windows of each kind, each of two tokens that no other one has."""
    firsts = np.cumsum([0, *counts])
    parts = list[Windows]()
    for first, count in zip(firsts, counts, strict=False):
        ids = np.arange(2 * first, 2 * (first + count), dtype=np.int32)
        loss_mask = np.ones((count, 2), np.float32)
        parts.append(Windows(ids.reshape(count, 2), loss_mask))
    return token_windows.mixed_kinds(parts, shares)


def seen(windows: Windows, drawn: np.ndarray, kind: int) -> np.ndarray:
    """How many windows of a kind each beginning of a draw has."""
    return np.cumsum(windows.kind[drawn] == kind)


def furthest(windows: Windows, drawn: np.ndarray) -> float:
    """By how many windows, at the most, a beginning of a draw has more or fewer of a kind than its
    share.
    """
    lengths = np.arange(1, len(drawn) + 1)
    shares = enumerate(windows.shares)
    return max(np.abs(seen(windows, drawn, kind) - lengths * share).max() for kind, share in shares)


def test_a_draw_by_pencil() -> None:
    """Halves take turns; of 3/4 and 1/4 the fourth comes where its half is due, in the middle."""
    halves = of_kinds([9, 9], [1, 1])
    quarters = of_kinds([9, 9], [3, 1])

    of_halves = draws.drawn_sequence(halves, 6, (0,))
    of_quarters = draws.drawn_sequence(quarters, 8, (0,))

    assert halves.kind[of_halves].tolist() == [0, 1, 0, 1, 0, 1]
    assert quarters.kind[of_quarters].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(("kinds", "most"), [(1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5), (6, 2.0)])
def test_any_shares_are_in_every_beginning(kinds: int, most: float) -> None:
    """Forty random sets of shares: give or take one window of up to three kinds, and little more of
    more kinds. A longer draw begins with a shorter one, and consists of batches.
    """
    rng = np.random.default_rng(kinds)
    for seed in range(40):
        counts = rng.integers(1, 40, kinds).tolist()
        windows = of_kinds(counts, rng.dirichlet(np.ones(kinds)).tolist())
        count = int(rng.integers(1, 300))

        drawn = draws.drawn_sequence(windows, count, (seed,))

        assert furthest(windows, drawn) <= most + 1e-9, windows.shares
        lengths = np.arange(1, count + 1)
        for kind, share in enumerate(windows.shares):  # one whole window of it is due
            assert seen(windows, drawn, kind)[lengths * share >= 1].all(), windows.shares
        batches = [draws.drawn_batch(windows, 8, step, seed) for step in range(3)]
        whole = draws.drawn_sequence(windows, 24, (seed,))
        assert drawn[:24].tolist() == whole[:count].tolist()
        assert kinds == 1 or np.concatenate(batches).tolist() == whole.tolist()


def test_a_kind_that_is_used_up_begins_anew() -> None:
    """Three windows of a half: each comes once in every three, and not always in the same order."""
    windows = of_kinds([3, 1000], [1, 1])

    drawn = draws.drawn_sequence(windows, 60, (0,))

    kinds = windows.kind[drawn]
    small = drawn[kinds == 0].reshape(-1, 3)
    large = drawn[kinds == 1]
    assert np.sort(small).tolist() == [[0, 1, 2]] * 10
    assert len(set(map(tuple, small.tolist()))) > 1
    assert len(set(large.tolist())) == 30
    other = draws.drawn_sequence(windows, 60, (1,))
    assert other.tolist() != drawn.tolist()
    assert windows.kind[other].tolist() == kinds.tolist()


def test_what_has_no_share_or_no_windows_is_not_drawn() -> None:
    """A share of 0, and a kind of which there is none: as many of the others are drawn."""
    windows = of_kinds([5, 5, 5], [1, 0, 1])
    lacking = Windows(
        windows.tokens[:10],
        windows.loss_mask[:10],
        kind=windows.kind[:10],
        shares=(0.25, 0.25, 0.5),
    )

    in_order = draws.drawn_sequence(windows, 40, (0,))
    some = draws.drawn_windows(windows, 40, (0,))
    drawn = draws.drawn_sequence(lacking, 40, (0,))

    assert set(windows.kind[in_order]) == {0, 2}
    assert set(windows.kind[some]) == {0, 2}
    assert len(drawn) == 40
    assert set(lacking.kind[drawn]) == {0, 1}


@pytest.mark.parametrize("counts", [(300, 300, 300, 300), (40, 3, 9, 2), (1, 1, 1, 1)])
def test_some_windows_never_come_twice(counts: tuple[int, ...]) -> None:
    """As many as asked for, or all; in their shares until a kind is used up."""
    windows = of_kinds(counts, BUILT_IN)
    for seed in range(5):
        for count in (1, 7, 64, 5000):
            drawn = draws.drawn_windows(windows, count, (seed, 1, 1))

            assert len(drawn) == min(count, sum(counts))
            assert len(set(drawn.tolist())) == len(drawn)
            used = np.array([seen(windows, drawn, kind) for kind in range(4)])
            all_left = (used < np.array(counts)[:, None]).all(axis=0)
            until = all_left.argmin() or len(drawn)
            assert furthest(windows, drawn[:until]) <= 1 + 1e-9


def test_one_kind_is_drawn_as_it_was() -> None:
    """Bit for bit: the permutation of a seed and a use, and `token_windows.order`."""
    tokens = np.arange(40, dtype=np.int32).reshape(20, 2)
    windows = Windows(tokens, np.ones((20, 2), np.float32))

    for key in ((0, 1, 1), (7, 2, 1)):
        wanted = np.random.default_rng(list(key)).permutation(20)[:9]
        assert draws.drawn_windows(windows, 9, key).tolist() == wanted.tolist()
    for step in range(12):
        wanted = token_windows.order(20, 6, step, 5)
        assert draws.drawn_batch(windows, 6, step, 5).tolist() == wanted.tolist()
    again = preparation.calibration(windows, 3, seed=7, use=2)
    at = np.random.default_rng([7, 2, 1]).permutation(20)[:3]
    wanted = [[tokens[number].tolist()] for number in at]
    assert [window.tolist() for window in again] == wanted


def test_shares_of_tokens_by_pencil() -> None:
    """Half of the draw is two windows of token 0 and 1, half is one window of token 1 twice: 1/4
    and 3/4. As one kind, every token counts alike: 2 of 6 and 4 of 6.
    """
    loss_mask = np.ones((2, 2), np.float32)
    first = Windows(np.array([[0, 1], [1, 0]], np.int32), loss_mask)
    second = Windows(np.array([[1, 1]], np.int32), loss_mask[:1])

    halves = token_windows.mixed_kinds([first, second], [1, 1])
    one_kind = token_windows.concatenated([first, second])

    shares = draws.token_counts(halves, vocab=3)
    as_one = draws.token_counts(one_kind, vocab=3)

    assert shares.tolist() == pytest.approx([1 / 4, 3 / 4, 0])
    assert as_one.tolist() == pytest.approx([2 / 6, 4 / 6, 0])
    # where a kind has no windows, the others make up the whole
    assert draws.token_counts(halves.pick(slice(0, 2)), vocab=2).tolist() == [0.5, 0.5]
