"""Sparse targets: what is drawn, what is kept, and that the sampled gradient is the full one in
expectation.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import slab_draws
from mis_mlx.maths.losses import Logits
from mis_mlx.types import MisError


def sample(
    logits: mx.array, count: int, seed: int, first: int, *, top: int = 0
) -> slab_draws.Target:
    """Targets of these logits, which come in slabs of 7 tokens."""

    def slabs() -> Iterator[tuple[int, Logits]]:
        for start in range(0, logits.shape[1], 7):
            yield start, lambda z, start=start: z[:, start : start + 7]

    return slab_draws.sample([logits], slabs, count, seed, [first], top=top)[0]


def softmax(z: np.ndarray) -> np.ndarray:
    """In float64."""
    top = z.max(-1, keepdims=True)
    powers = np.exp(z.astype(np.float64) - top)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize(("cut", "count"), [(1, 1), (5, 6), (13, 50)])
def test_positions_are_drawn_one_by_one(cut: int, count: int) -> None:
    """However positions are cut into calls, each gets the draws of its number; shares sum to 1; ids
    rise.
    """
    logits = mx.random.normal((13, 300), key=mx.random.key(0))

    whole = sample(logits, count, 3, 1000)
    parts = []
    for start in range(0, 13, cut):
        parts.append(sample(logits[start : start + cut], count, 3, 1000 + start))
    _, other_seed, _ = sample(logits, count, 4, 1000)
    _, other_positions, _ = sample(logits, count, 3, 1001)

    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(array, np.concatenate(pieces))
    sizes, ids, shares = whole
    ends = np.cumsum(sizes)
    for begin, end in zip(ends - sizes, ends, strict=True):
        assert shares[begin:end].sum() == pytest.approx(1)
        assert (np.diff(ids[begin:end]) > 0).all()
    assert not np.array_equal(ids, other_seed)
    assert not np.array_equal(ids, other_positions)


def test_logits_that_are_no_numbers_are_refused() -> None:
    """One NaN anywhere, and nothing is drawn from it."""
    logits = mx.zeros((2, 9))
    logits[1, 5] = float("nan")
    with pytest.raises(MisError, match="not numbers"):
        sample(logits, 3, 0, 0)


def test_the_likeliest_tokens_are_exact() -> None:
    """Of six tokens two have their probability, and the others share what is left, however they are
    drawn; with all six there is nothing to draw.
    """
    p = np.array([0.4, 0.05, 0.3, 0.1, 0.1, 0.05])
    logits = mx.array(np.log(p)[None].astype(np.float32))
    sizes, ids, shares = sample(logits, 4, 0, 0, top=2)
    found = dict(zip(ids.tolist(), shares.tolist(), strict=True))
    assert sizes.tolist() == [len(found)]
    assert found.pop(0) == pytest.approx(0.4)
    assert found.pop(2) == pytest.approx(0.3)
    assert sum(found.values()) == pytest.approx(0.3)
    assert all((4 * share / 0.3) % 1 == pytest.approx(0, abs=1e-5) for share in found.values())
    _, ids, shares = sample(logits, 4, 0, 0, top=9)
    assert ids.tolist() == list(range(6))
    assert shares == pytest.approx(p)


def test_windows_under_way_keep_their_targets_and_no_slab() -> None:
    """More of them take what they say of themselves (`state_bytes`), beside one slab at work."""
    n, width, vocab, top, count = 32, 8, 4096, 8, 4
    head = mx.random.normal((vocab, width), key=mx.random.key(0))
    windows = [mx.random.normal((n, width), key=mx.random.key(1 + i)) for i in range(24)]
    rows = vocab // 4

    def slabs() -> Iterator[tuple[int, Logits]]:
        for start in range(0, vocab, rows):
            yield start, lambda z, start=start: z @ head[start : start + rows].T

    def peak(some: int) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        slab_draws.sample(windows[:some], slabs, count, 0, range(0, n * some, n), top=top)
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        peak(1)
        few = peak(4)
        many = peak(24)
    finally:
        tracemalloc.stop()
    kept = 20 * n * slab_draws.state_bytes(top, count)
    assert many - few < 2 * kept
    assert many - few < 20 * n * rows * 8 / 4  # a running sum of a slab for each


@pytest.mark.parametrize("top", [0, 3])
def test_draws_have_the_teachers_shares(top: int) -> None:
    """4,000 positions of one softmax, 8 draws each: the mean share of each token is within 5
    standard errors of its probability, which the likeliest have exactly. Draws of a position are
    independent: a pair of them is equal with probability sum p^2.
    """
    logits = np.random.default_rng(0).normal(0, 1.5, 20).astype(np.float32)
    n = 4000
    count = 8
    p = softmax(logits)
    drawn = p.copy()
    drawn[np.argsort(p)[len(p) - top :]] = 0
    rest = drawn.sum()

    sizes, ids, shares = sample(mx.array(np.tile(logits, (n, 1))), count, 1, 0, top=top)

    mean = np.bincount(ids, shares, 20) / n
    standard_error = np.sqrt((rest * drawn - drawn**2) / (count * n))
    assert (np.abs(mean - p) <= 5 * standard_error + 1e-6).all()
    if not top:
        counts = np.round(count * shares)
        equal_pairs = np.bincount(np.repeat(np.arange(n), sizes), counts * (counts - 1.0))
        share = equal_pairs / (count * (count - 1))
        assert abs(share.mean() - (p**2).sum()) < 5 * share.std() / np.sqrt(n)
