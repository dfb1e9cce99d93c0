"""Students against their teacher: loss, KL and agreement equal the plain formulas on whole logits."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.data.token_windows import Windows
from mis_mlx.evaluation import comparison
from mis_mlx.models import load
from mis_mlx.types import Checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def held_out() -> Windows:
    """Five windows of 40 tokens; the last column never counts, and of window 1 only a part does."""
    rng = np.random.default_rng(0)
    learn = np.ones((5, 40), np.float32)
    learn[:, -1] = 0
    learn[1, :30] = 0
    return Windows(rng.integers(0, 512, (5, 40)).astype(np.int32), learn)


def log_p(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities (T - 1, V) of the resident model, float64."""
    z = np.array(load.resident(checkpoint, mx.float32)(mx.array(tokens[None]))[0, :-1], np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


@pytest.mark.usefixtures("cpu_policy")
def test_against_float64(tmp_path: Path, llama: Checkpoint, held_out: Windows) -> None:
    """Per window, masked positions left out: nll, KL(teacher || student), same top token (1e-5)."""
    other = load.open_checkpoint(tiny.make(tmp_path / "other", seed=1))
    found = comparison.compare({"teacher": llama, "student": other}, held_out)
    for w in range(5):
        t, s = log_p(llama, held_out.tokens[w]), log_p(other, held_out.tokens[w])
        learn, next_token = held_out.learn[w][:-1], held_out.tokens[w][1:]
        n = learn.sum()
        at = np.arange(39)
        assert found["teacher", "nll"][w] == pytest.approx((-t[at, next_token] * learn).sum() / n, abs=1e-5)
        assert found["student", "nll"][w] == pytest.approx((-s[at, next_token] * learn).sum() / n, abs=1e-5)
        assert found["student", "kl"][w] == pytest.approx(((np.exp(t) * (t - s)).sum(-1) * learn).sum() / n, abs=1e-5)
        assert found["student", "top1"][w] == pytest.approx(((t.argmax(-1) == s.argmax(-1)) * learn).sum() / n)
    assert set(found) == {("teacher", "nll"), ("student", "nll"), ("student", "kl"), ("student", "top1")}


def test_rows_have_intervals_and_perplexity() -> None:
    """exp of the mean loss and of its bounds, over five windows."""
    nll, ppl = comparison.rows_of({("m", "nll"): np.array([1.0, 2.0, 3.0, 2.0, 2.0])})
    assert (nll.metric, nll.value, nll.n) == ("nll", 2.0, 5)
    assert nll.low is not None and nll.high is not None and nll.low < 2.0 < nll.high
    assert (ppl.value, ppl.low, ppl.high) == (math.exp(2.0), math.exp(nll.low), math.exp(nll.high))


def test_windows_are_chosen_evenly(held_out: Windows) -> None:
    """Spread over the text, first and last included; all of them when more are asked for."""
    for count, kept in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (99, list(range(5)))):
        assert (comparison.chosen(held_out, count).tokens == held_out.tokens[kept]).all()
