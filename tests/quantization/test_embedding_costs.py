"""What rounding the head costs, against the Fisher information of its own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import slab_draws
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass
from mis_mlx.quantization.embedding_costs import VocabularyCosts
from mis_mlx.types import Precision
from tests import family_checks, tiny

GROUP = 32
STEP = 1e-6
CAPPED = {"final_logit_softcapping": 0.5}


@pytest.mark.parametrize("at_once", [backward_pass.HEAD_AT_ONCE, 0], ids=["whole", "slabs"])
@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("changes", [{}, {**tiny.FAMILIES["gemma4_text"], **CAPPED}])
def test_a_head_under_a_softcap_costs_less(
    changes: dict[str, Any],
    at_once: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sum over positions and rows of p (1 - p), times the square of the cap's slope, which is
    found by differences in float64, times what a row's errors do to its logit.
    """
    monkeypatch.setattr(backward_pass, "HEAD_AT_ONCE", at_once)
    folder = tiny.make(tmp_path / "m", **changes)
    model = load.open_checkpoint(folder, Precision(asked="float32"))
    costs = VocabularyCosts(model, GROUP)
    seen = list[mx.array]()

    def at_head(x: mx.array, above: mx.array, slopes: mx.array | None, first: int) -> None:
        if not first:  # the same positions come with every slab
            seen.append(x)
        costs.at_head(x, above, slopes, first)

    batches = [family_checks.TOKENS]
    visit = family_checks.block_gradients(model)
    backward_pass.input_gradients(model, batches, visit, seed=0, at_head=at_head)

    x = np.array(mx.concatenate(seen), np.float64)
    raw = x @ np.array(load.dense(model, f"{costs.head}.weight"), np.float64).T
    cap = family(model.config).softcap

    def capped(raw: np.ndarray) -> np.ndarray:
        return cap * np.tanh(raw / cap) if cap else raw

    slope = (capped(raw + STEP) - capped(raw - STEP)) / (2 * STEP)
    z = capped(raw)
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    squares = np.square(x).reshape(len(x), -1, GROUP).sum(axis=-1)
    errors = squares @ np.array(costs.variances[costs.head], np.float64).T
    wanted = (p * (1 - p) * slope**2 * errors).sum()
    assert costs.squares[costs.head] == pytest.approx(wanted, rel=1e-3)
    if cap:
        assert slope.min() < 0.9  # the cap is felt


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_a_head_in_slabs_sends_back_what_the_whole_one_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same tokens drawn, at the first block's inputs; of two batches in one go."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES.get(family, {"tie_word_embeddings": False}))
    model = load.open_checkpoint(folder, Precision(asked="float32"))
    batches = [family_checks.TOKENS, family_checks.TOKENS[:, ::-1]]
    drawn = list[np.ndarray]()
    sample = slab_draws.sample

    def noted(*given: Any, **how: Any) -> list[slab_draws.Target]:
        targets = sample(*given, **how)
        drawn.extend(ids for _, ids, _ in targets)
        return targets

    monkeypatch.setattr(slab_draws, "sample", noted)
    monkeypatch.setattr(backward_pass, "HEAD_AT_ONCE", 0)
    visit = family_checks.block_gradients(model)
    in_slabs = backward_pass.input_gradients(model, batches, visit, seed=3)
    assert [len(ids) for ids in drawn] == [12, 12]
    left = [int(token) for ids in drawn for token in ids]

    def again(z: mx.array, key: mx.array) -> mx.array:
        return mx.array([left.pop(0) for _ in range(len(z))])

    monkeypatch.setattr(mx.random, "categorical", again)
    monkeypatch.setattr(backward_pass, "HEAD_AT_ONCE", 10**9)
    whole = backward_pass.input_gradients(model, batches, visit, seed=3)
    assert not left
    for ours, theirs in zip(in_slabs, whole, strict=True):
        assert mx.abs(ours - theirs).max().item() <= 1e-4 * mx.abs(theirs).max().item()
