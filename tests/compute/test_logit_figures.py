"""What two models' logits say of each other, in parts of the vocabulary, beside float64."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import logit_figures


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("cuts", [[0, 50], [0, 17, 34, 50], [*range(51)]])
@pytest.mark.usefixtures("policy")
def test_what_a_comparison_says(cuts: list[int]) -> None:
    """Each column beside its formula in float64, the vocabulary whole, in parts, and token by
    token.
    """
    teacher = 3 * mx.random.normal((21, 50), key=mx.random.key(1))
    noise = 3 * mx.random.normal((21, 50), key=mx.random.key(2))
    student = 0.5 * noise + teacher
    targets = np.random.default_rng(3).integers(0, 50, 21)
    log_t = log_softmax(np.array(teacher, np.float64))
    log_s = log_softmax(np.array(student))
    at = (np.arange(21), targets)
    kl = (np.exp(log_t) * (log_t - log_s)).sum(1)
    same = log_t.argmax(1) == log_s.argmax(1)
    assert 0 < same.sum() < 21
    want = np.stack([-log_t[at], -log_s[at], kl, same], 1)

    parts = []
    for start, end in pairwise(cuts):
        of_teacher = teacher[:, start:end]
        of_student = student[:, start:end]
        parts.append(logit_figures.compared(of_teacher, of_student, targets, start))

    found = logit_figures.over_parts(parts)
    np.testing.assert_allclose(found[:, :4], want, atol=1e-5)
    shared = np.minimum(np.exp(log_t), np.exp(log_s)).sum(1)
    if len(cuts) == 51:  # a part of one token leaves no choice
        np.testing.assert_allclose(found[:, 4], shared, atol=1e-5)


@pytest.mark.usefixtures("policy")
def test_how_often_two_models_can_draw_the_same_token() -> None:
    """Estimated from one token of each part, and right in the mean of many predictions."""
    teacher = mx.repeat(2 * mx.random.normal((1, 30), key=mx.random.key(1)), 4000, axis=0)
    student = mx.repeat(2 * mx.random.normal((1, 30), key=mx.random.key(2)), 4000, axis=0)
    targets = np.zeros(4000, np.int64)
    p = np.exp(log_softmax(np.array(teacher[0], np.float64)[None]))
    q = np.exp(log_softmax(np.array(student[0], np.float64)[None]))
    parts = []
    for start, end in ((0, 9), (9, 30)):
        of_teacher = mx.array(teacher[:, start:end])
        of_student = mx.array(student[:, start:end])
        parts.append(logit_figures.compared(of_teacher, of_student, targets, start))
    shared = logit_figures.over_parts(parts)[:, 4]
    assert shared.std() > 0.05
    assert shared.mean() == pytest.approx(np.minimum(p, q).sum(), abs=0.02)


@pytest.mark.usefixtures("policy")
def test_a_token_of_no_probability_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal models, whose last token has none: where the others' shares add up to less than 1 by
    rounding, a chance above that sum still draws one that has.
    """
    monkeypatch.setattr(np.random, "default_rng", lambda _: Highest())
    z = mx.zeros((1, 3001))
    z[:, -1] = -200.0
    p = logit_figures.compared(z + 0, z + 0, np.array([0]))
    assert logit_figures.over_parts([p])[0, 4] == pytest.approx(1.0, abs=1e-3)


class Highest:
    """The largest chance that there is."""

    def random(self, count: int, kind: type) -> np.ndarray:
        """(count,) of it."""
        return np.full(count, np.nextafter(kind(1), kind(0)))


def test_a_comparison_by_pencil() -> None:
    """Two tokens, teacher 3 : 1, student 1 : 1: losses ln 4/3 and ln 2, KL = 0.75 ln 1.5 + 0.25 ln
    0.5; of two tokens that are alike the first is the top one.
    """
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)

    def found(student: list[float]) -> np.ndarray:
        teacher = mx.array([[np.log(3.0), 0.0]])
        right = np.array([0])
        part = logit_figures.compared(teacher, mx.array([student]), right)
        return logit_figures.over_parts([part])

    want = [[np.log(4 / 3), np.log(2), kl, 1.0]]
    np.testing.assert_allclose(found([0.0, 0.0])[:, :4], want, atol=1e-6)
    assert found([0.0, 1.0])[0, 3] == 0.0
