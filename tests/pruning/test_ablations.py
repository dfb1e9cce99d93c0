"""Gradients of a distillation, and plain training on text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher
from mis_mlx.distillation.live_teacher import StreamedTeacher, TextTargets
from mis_mlx.distillation.whole_model import WholeModel, value_and_grad
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import load
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.types import Checkpoint
from tests import tiny

RECIPE = DistillationConfig(
    iters=4,
    batch_size=2,
    grad_accumulation_steps=2,
    max_seq_length=16,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Random students of the tiny llama's tokens: two narrow blocks, and one as wide as the
    teacher's.
    """
    root = tmp_path_factory.mktemp("students")
    sizes: dict[str, dict[str, Any]] = {
        "narrow": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "deep": {"num_hidden_layers": 1},
    }
    made = {n: tiny.make(root / n, seed=5, intermediate_size=256, **s) for n, s in sizes.items()}
    return {name: load.open_checkpoint(folder) for name, folder in made.items()}


@pytest.fixture(scope="module")
def data() -> Windows:
    """Twelve windows of 16 tokens, some counted in part; the last column never is."""
    rng = np.random.default_rng(2)
    loss_mask = (rng.random((12, 16)) < 0.7).astype(np.float32)
    loss_mask[:, -1] = 0
    return Windows(rng.integers(0, 512, (12, 16)).astype(np.int32), loss_mask)


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("name", ["narrow", "deep"])
def test_the_gradient_is_that_of_the_formula(
    llama: Checkpoint, students: dict[str, Checkpoint], data: Windows, name: str
) -> None:
    """KL written out on whole logits and differentiated by MLX."""
    source = StreamedTeacher(llama, None, direct=True)
    cut = live_teacher.step_micro_batches(
        source, data, replace(RECIPE, grad_accumulation_steps=1), 0
    )
    student, teacher = (load.resident_model(m, mx.float32) for m in (students[name], llama))
    tokens, loss_mask, *_ = cut[0]
    logs = teacher(tokens).reshape(32, -1)
    logs = logs - mx.logsumexp(logs, axis=-1, keepdims=True)

    def naive() -> mx.array:
        z = student(tokens)
        own = (z - mx.logsumexp(z, axis=-1, keepdims=True)).reshape(32, -1)
        each = (mx.exp(logs) * (logs - own)).sum(axis=-1)
        return (each * loss_mask).sum()

    loss, wanted = nn.value_and_grad(student, naive)()
    gradient_of = value_and_grad(student, source.token_loss())
    (value, _), got = gradient_of(student, *cut[0])
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    largest = max(mx.abs(g).max().item() for _, g in tree_flatten(wanted))
    for (n, a), (_, b) in zip(tree_flatten(got), tree_flatten(wanted), strict=True):
        assert mx.abs(a - b).max().item() < 1e-5 * largest, n


def test_the_text_as_source_is_cross_entropy(llama: Checkpoint, data: Windows) -> None:
    """Plain training of any resident model: the first loss is mlx's own cross-entropy, and it
    falls.
    """
    few = Windows(data.tokens[:4], data.loss_mask[:4])
    model = load.resident_model(llama, mx.float32)
    z = model(mx.array(few.tokens))
    tokens = mx.array(few.tokens)
    loss_mask = mx.array(few.loss_mask)
    wanted = (
        nn.losses.cross_entropy(z[:, :-1], tokens[:, 1:]) * loss_mask[:, :-1]
    ).sum() / loss_mask.sum()
    steps = list(
        live_teacher.steps(
            WholeModel(model, GuardedAdamW()), TextTargets(), few, replace(RECIPE, iters=12)
        )
    )
    assert steps[0].loss == pytest.approx(wanted.item(), rel=1e-5)
    assert steps[-1].loss < 0.8 * steps[0].loss
