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
from mis_mlx.compute.slab_losses import sparse_kl_gradients
from mis_mlx.maths.losses import Logits
from mis_mlx.types import MisError
from tests.compute.test_slab_losses import in_slabs
from tests.maths.test_losses import problem


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


def padded(sizes: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> tuple[mx.array, mx.array]:
    """Ragged samples as (n, m) ids and weights."""
    filled = np.arange(sizes.max()) < sizes[:, None]
    wide = np.zeros(filled.shape, np.int32)
    weights = np.zeros(filled.shape, np.float32)
    wide[filled] = ids
    weights[filled] = shares
    return mx.array(wide), mx.array(weights)


def test_a_sample_by_pencil() -> None:
    """All the mass on one token: it is drawn every time. Two positions, two tokens, seven draws."""
    logits = mx.array([[0.0, 200.0, 0.0], [200.0, 0.0, 0.0]])

    sizes, ids, shares = sample(logits, 7, 0, 0)

    assert sizes.tolist() == [1, 1]
    assert ids.tolist() == [1, 0]
    assert shares.tolist() == [1, 1]


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


def test_draws_are_independent_and_have_the_teachers_shares() -> None:
    """4,000 positions of one softmax, 8 draws each.

    Counts of each token against N p: chi-square with 19 degrees of freedom, under its 1 - 1e-6
    quantile (64). Independence within a position: a pair of draws is equal with probability sum
    p^2; 5 standard errors.
    """
    logits = np.random.default_rng(0).normal(0, 1.5, 20).astype(np.float32)
    n = 4000
    count = 8
    p = softmax(logits)
    expected = n * count * p

    sizes, ids, shares = sample(mx.array(np.tile(logits, (n, 1))), count, 1, 0)

    counts = np.round(count * shares)
    seen = np.bincount(ids, counts, 20)
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 64
    position = np.repeat(np.arange(n), sizes)
    equal_pairs = np.bincount(position, counts * (counts - 1.0))
    share = equal_pairs / (count * (count - 1))
    standard_error = share.std() / np.sqrt(n)
    assert abs(share.mean() - (p**2).sum()) < 5 * standard_error


def test_logits_that_are_no_numbers_are_refused() -> None:
    """One NaN anywhere, and nothing is drawn from it."""
    logits = mx.zeros((2, 9))
    logits[1, 5] = float("nan")
    with pytest.raises(MisError, match="not numbers"):
        sample(logits, 3, 0, 0)


@pytest.mark.parametrize(("top", "temperature"), [(0, 1.0), (6, 1.0), (6, 2.0)])
def test_sampled_gradients_are_unbiased(top: int, temperature: float) -> None:
    """The mean gradient of 400 stores of 10 samples approaches that of the full KL; that of the
    likeliest 6 alone never does.

    A sampled gradient in a hidden state is W^T (p_s - w): mean that of the full KL, covariance
    R W^T (diag r - r r^T / R) W / N, where r is what is drawn from, all of it R. So each of 104
    components, over its standard error, is N(0, 1): the largest stays under 5 (P = 6e-5). Top-k
    misses the same mean by more than ten standard errors of plain draws (18).
    """
    p = problem()
    p["learn"] = mx.ones_like(p["learn"])
    z = p["teacher"] @ p["teacher_head"].T / temperature  # as a store ranks and draws
    stores = 400
    count = 10

    def on_targets(ids: mx.array, weights: mx.array) -> np.ndarray:
        _, gradient = sparse_kl_gradients(
            p["student"],
            in_slabs(p["head"]),
            p["learn"],
            ids,
            weights,
            temperature=temperature,
        )
        return np.array(gradient, np.float64)

    def on_a_store(seed: int) -> np.ndarray:
        sizes, ids, shares = sample(z, count, seed, 0, top=top)
        return on_targets(*padded(sizes, ids, shares))

    likeliest = mx.argpartition(z, -6, axis=-1)[:, -6:]
    shares_of_six = mx.softmax(mx.take_along_axis(z, likeliest, axis=-1), axis=-1)
    share = softmax(np.array(z))
    np.put_along_axis(share, np.argsort(share)[:, len(share[0]) - top :], 0.0, axis=1)
    w = np.array(p["head"], np.float64)
    rest = share.sum(axis=1, keepdims=True)
    variance = (rest * (share @ w**2) - (share @ w) ** 2) / (count * stores)
    standard_error = np.sqrt(variance) / temperature

    own = softmax(np.array(p["student"] @ p["head"].T / temperature))
    wanted = (own - softmax(np.array(z))) @ w / temperature
    mean = np.mean([on_a_store(seed) for seed in range(stores)], axis=0)
    biased = on_targets(likeliest, shares_of_six)

    assert np.abs((mean - wanted) / standard_error).max() < 5
    assert np.abs((biased - wanted) / standard_error).max() > 10


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
