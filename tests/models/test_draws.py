"""What is drawn: against mlx_lm's sampler and MLX's own draws of one text at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import pytest

from mis_mlx.models.opening import load
from mis_mlx.models.writing import draws
from mis_mlx.models.writing.draws import Draws, Sampling
from tests import launches

SEEDS = [3, 99, 2**31 + 5, (3 << 32) + 9, 0]


def log_probs(rows: int, vocab: int, spread: float, seed: int = 7) -> mx.array:
    """Of random logits: (rows, vocab)."""
    z = spread * mx.random.normal((rows, vocab), key=mx.random.key(seed))
    return z - mx.logsumexp(z, axis=-1, keepdims=True)


def drawn_alone(row: mx.array, sampling: Sampling, key: mx.array) -> int:
    """One token of one text (V,), by MLX's own function."""
    logits = row[None]
    if sampling.top_p < 1.0:
        logits = load.mlx_lm("sample_utils").apply_top_p(logits, sampling.top_p)
    return int(mx.random.categorical(logits / sampling.temperature, key=key).item())


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(0.8, 0.95), Sampling(1.3, 0.5)])
def test_a_batch_is_drawn_as_each_text_alone(sampling: Sampling) -> None:
    """The token that mx.random.categorical draws of a row alone by the text's own key, which is
    split once a token: whichever rows are beside it, and however often it was left out.
    """
    table = log_probs(len(SEEDS), 5000, 3.0)
    keys = [mx.random.key(seed) for seed in SEEDS]
    found = Draws(sampling, SEEDS)
    steps: list[Sequence[int]] = [range(5), [4, 1], [2], range(5), [0, 3]]
    for texts in steps:
        together = found(table[mx.array(list(texts))], texts).tolist()
        for text, token in zip(texts, together, strict=True):
            key, keys[text] = mx.random.split(keys[text])
            assert token == drawn_alone(table[text], sampling, key)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_reaches_the_tail(dtype: mx.Dtype) -> None:
    """Zipf over 49,152 tokens: 33 % of the draws are behind the thousandth token, 53 % behind the
    hundredth; token for token those of mx.random.categorical in the same type.
    """
    ranks = mx.arange(1, 49_153, dtype=mx.float32)
    row = (-mx.log(ranks) - mx.logsumexp(-mx.log(ranks))).astype(dtype)
    count = 200
    table = mx.broadcast_to(row, (count, len(ranks)))
    found = Draws(Sampling(1.0), range(count))(table, range(count))
    alone = [
        drawn_alone(row, Sampling(1.0), mx.random.split(mx.random.key(seed))[0])
        for seed in range(count)
    ]
    expected = mx.array(alone)
    for rank in (100, 1000):
        share = (expected >= rank).sum().item()
        assert share > 40
        assert abs((found >= rank).sum().item() - share) <= 2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_nucleus_of_probabilities_that_half_precision_rounded(dtype: mx.Dtype) -> None:
    """Of 0.5, 0.3, 0.15 and 5,000 rare ones, all 6 % too small, as bfloat16 rounds the normalizer
    of a model whose logits are around 25. Then the first three have 0.89 together, and a nucleus of
    0.94 would take in the rare ones.
    """
    likely = mx.log(mx.array([0.5, 0.3, 0.15]))
    rare = mx.full((5000,), math.log(0.05 / 5000))
    log_p = mx.concatenate([likely, rare]).astype(dtype)
    shifted = (log_p - 0.0625)[None].astype(dtype)
    count = 400
    table = mx.broadcast_to(shifted, (count, len(log_p)))
    tokens = Draws(Sampling(1.0, 0.94), range(count))(table, range(count))
    assert (tokens < 3).all().item()


@pytest.mark.usefixtures("cpu_policy")
def test_greedy_texts_beside_drawn_ones() -> None:
    """A text without a seed takes the likeliest token and no random number of the others; without a
    temperature all do.
    """
    table = log_probs(4, 50, 1.0)
    likeliest = mx.argmax(table, axis=-1).tolist()
    sampling = Sampling(1.2, 0.9)
    drawn = Draws(sampling, [5, 6])
    mixed = Draws(sampling, [5, None, 6, None])
    for _ in range(8):
        first, second = drawn(table[mx.array([0, 2])], range(2)).tolist()
        wanted = [first, likeliest[1], second, likeliest[3]]
        assert mixed(table, range(4)).tolist() == wanted
    assert mixed(table[1:2], [1]).tolist() == likeliest[1:2]
    assert Draws(sampling, [None, None])(table[:2], range(2)).tolist() == likeliest[:2]
    assert Draws(Sampling(0.0, 0.9), [1, 2, 3, 4])(table, range(4)).tolist() == likeliest


@pytest.mark.usefixtures("policy")
def test_a_nucleus_by_hand() -> None:
    """Of 0.5, 0.3, 0.15, 0.05 in any order: the fewest tokens that have as much together; the
    likeliest one always; tokens that are equally likely all.
    """
    p = mx.array([[0.05, 0.5, 0.15, 0.3], [0.3, 0.15, 0.05, 0.5]])

    def kept(p: mx.array, top_p: float) -> list[list[bool]]:
        return (draws.nucleus(mx.log(p), top_p) > -mx.inf).tolist()

    assert kept(p, 0.0001) == kept(p, 0.4)
    assert kept(p, 0.4) == [[False, True, False, False], [False, False, False, True]]
    assert kept(p, 0.79) == [[False, True, False, True], [True, False, False, True]]
    assert kept(p, 0.81) == [[False, True, True, True], [True, True, False, True]]
    assert kept(p, 0.96) == [[True] * 4] * 2
    assert kept(mx.array([[0.25, 0.5, 0.25, 0.0]]), 0.6) == [[True, True, True, False]]


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_a_nucleus_is_mlx_lms(spread: float, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the likeliest tokens that are looked at first have less than it takes. A token at
    the edge may be on either side by rounding.
    """
    monkeypatch.setattr(draws, "LIKELIEST", 64)
    table = log_probs(5, 3000, spread)
    expected = load.mlx_lm("sample_utils").apply_top_p(table, 0.95)
    found = draws.nucleus(table, 0.95)
    if policy == "cpu":
        assert mx.array_equal(found, expected)
    assert mx.all((found != expected).sum(axis=-1) <= 1).item()


@pytest.mark.usefixtures("metal")
def test_passes_of_a_nucleus() -> None:
    """A GPU reads every probability once for each of 30 bits, and launches three kernels for it:
    comparisons and sums of a row's sixteen parts; the sum of what that wrote; the next bound.
    """
    table = log_probs(3, 1600, 3.0)
    mx.eval(table)
    found = launches.counted(draws.nucleus(table, 0.95))
    passes = [name for name in found.elements() if name.count("Select") == 16]
    assert len(passes) == found["Sum"] == 30
    assert found.total() - found["View float32"] <= 3 * 30 + 5


@pytest.mark.usefixtures("cpu_policy")
def test_a_nucleus_does_not_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose nucleus is among the likeliest tokens, beside one that needs all."""
    monkeypatch.setattr(draws, "LIKELIEST", 64)
    table = mx.concatenate([log_probs(2, 3000, 6.0), log_probs(2, 3000, 0.1)])
    together = draws.nucleus(table, 0.95)
    for row, expected in zip(table, together, strict=True):
        assert mx.array_equal(draws.nucleus(row[None], 0.95)[0], expected)
