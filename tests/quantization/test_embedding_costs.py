"""What rounding the head costs, against the Fisher information of its own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import precision
from mis_mlx.models.architectures.sizes import softcap
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass
from mis_mlx.quantization.embedding_costs import VocabularyCosts
from mis_mlx.types import Precision
from tests import family_checks, tiny

GROUP = 32
STEP = 1e-6
CAPPED = {"final_logit_softcapping": 0.5}


@pytest.mark.parametrize("policy", ["cpu", "metal"])
@pytest.mark.parametrize("changes", [{}, {**tiny.FAMILIES["gemma4_text"], **CAPPED}])
def test_a_head_under_a_softcap_costs_less(
    changes: dict[str, Any], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over positions and rows of p (1 - p), times the square of the cap's slope, which is
    found by differences in float64, times what a row's errors do to its logit.
    """
    monkeypatch.setenv(precision.POLICY, policy)
    folder = tiny.make(tmp_path / "m", **changes)
    model = load.open_checkpoint(folder, Precision(asked="float32"))
    costs = VocabularyCosts(model, GROUP)
    seen = list[mx.array]()

    def at_head(x: mx.array, *others: Any) -> None:
        seen.append(x)
        costs.at_head(x, *others)

    batches = [family_checks.TOKENS]
    visit = family_checks.block_gradients(model)
    backward_pass.input_gradients(model, batches, visit, seed=0, at_head=at_head)

    x = np.array(mx.concatenate(seen), np.float64)
    raw = x @ np.array(load.dense(model, f"{costs.head}.weight"), np.float64).T
    cap = softcap(model.config)

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
