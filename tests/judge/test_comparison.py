"""Students against their teacher: loss, KL and agreement, beside the plain formulas."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.data.token_windows import Windows
from mis_mlx.judge import comparison
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.types import Checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def held_out() -> Windows:
    """Five windows of 40 tokens; the last column never counts, and of window 1 only a part does."""
    rng = np.random.default_rng(0)
    loss_mask = np.ones((5, 40), np.float32)
    loss_mask[:, -1] = 0
    loss_mask[1, :30] = 0
    return Windows(rng.integers(0, 512, (5, 40)).astype(np.int32), loss_mask)


def log_p(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities (T - 1, V) of the resident model, float64."""
    model = load.resident_model(checkpoint, mx.float32)
    logits = np.array(model(mx.array(tokens[None]))[0, :-1], np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.usefixtures("cpu_policy")
def test_against_float64(
    tmp_path: Path, llama: Checkpoint, held_out: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per window, masked positions left out: nll, KL(teacher || student), same top token (1e-5).
    Never more positions at a time than a chunk has, nor tokens than a part of the head.
    """
    seen = list[tuple[int, ...]]()
    logits = load.wide_logits

    def watched(head: nn.Module, hidden: mx.array) -> mx.array:
        made = logits(head, hidden)
        seen.append(made.shape)
        return made

    monkeypatch.setattr(comparison.load, "wide_logits", watched)
    monkeypatch.setattr(comparison, "CHUNK", 8)
    monkeypatch.setattr(stream, "HEAD_PART", 100 * 64)
    monkeypatch.setattr(comparison, "GROUP", held_out.tokens.shape[1])
    other = load.open_checkpoint(tiny.make(tmp_path / "other", seed=1))
    found = comparison.compare({"teacher": llama, "student": other}, held_out)
    assert {tokens for _, tokens in seen} == {100, 12}
    assert max(count for count, _ in seen) == 8
    assert sum(count for count, _ in seen) == 2 * 6 * held_out.loss_mask.sum()

    for w in range(5):
        teacher = log_p(llama, held_out.tokens[w])
        student = log_p(other, held_out.tokens[w])
        loss_mask = held_out.loss_mask[w][:-1]
        at = (np.arange(39), held_out.tokens[w][1:])
        kl = (np.exp(teacher) * (teacher - student)).sum(-1)
        same = teacher.argmax(-1) == student.argmax(-1)
        wanted = {
            ("teacher", "nll"): np.average(-teacher[at], weights=loss_mask),
            ("student", "nll"): np.average(-student[at], weights=loss_mask),
            ("student", "kl"): np.average(kl, weights=loss_mask),
            ("student", "top1"): np.average(same, weights=loss_mask),
        }
        shared = np.minimum(np.exp(teacher), np.exp(student)).sum(-1)
        ear = found["student", "ear"][w]
        assert ear == pytest.approx(np.average(shared, weights=loss_mask), abs=0.1)
        wanted["student", "ear"] = ear
        assert found["student", "top1"][w] == pytest.approx(wanted["student", "top1"])
        assert {key: values[w] for key, values in found.items()} == pytest.approx(wanted, abs=1e-5)


def test_rows_have_intervals_and_perplexity() -> None:
    """exp of the mean loss and of its bounds, over five windows."""
    nll, ppl = comparison.rows_of({("m", "nll"): np.array([1.0, 2.0, 3.0, 2.0, 2.0])})
    assert (nll.metric, nll.value, nll.n) == ("nll", 2.0, 5)
    assert nll.low is not None
    assert nll.high is not None
    assert nll.low < 2.0 < nll.high
    assert (ppl.value, ppl.low, ppl.high) == (math.exp(2.0), math.exp(nll.low), math.exp(nll.high))


def test_a_window_without_predictions_has_no_mean(llama: Checkpoint, held_out: Windows) -> None:
    """It has no figure per token; bits per byte are a ratio of sums: it adds nothing."""
    loss_mask = held_out.loss_mask.copy()
    loss_mask[2] = 0
    text_bytes = np.array([100, 100, 0, 100, 100])
    windows = Windows(held_out.tokens, loss_mask, text_bytes)
    others = windows.pick([0, 1, 3, 4])

    rows = comparison.rows_of(comparison.compare({"m": llama}, windows), windows)
    fewer = comparison.rows_of(comparison.compare({"m": llama}, others), others)

    assert [(row.metric, row.n) for row in rows] == [
        ("nll", 4),
        ("ppl", 4),
        ("bpb", 5),
        ("tpb", 5),
    ]
    assert [row.value for row in rows] == pytest.approx([row.value for row in fewer], rel=1e-6)


def test_windows_are_chosen_evenly(held_out: Windows) -> None:
    """Spread over the text, first and last included; all of them when more are asked for."""
    for count, kept in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (99, list(range(5)))):
        found = comparison.spread_windows(held_out, count)
        assert (found.tokens == held_out.tokens[kept]).all()
