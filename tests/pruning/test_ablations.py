"""What distillation may do beside plain KL: cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, whole_model
from mis_mlx.distillation.live_teacher import StreamedTeacher, TextTargets
from mis_mlx.distillation.whole_model import WholeModel, value_and_grad
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.types import Checkpoint, MisError, Step
from tests import tiny
from tests.distillation.test_strategies import JOB
from tests.peaks import allocated

RECIPE = DistillationConfig(
    iters=4,
    batch_size=2,
    grad_accumulation_steps=2,
    max_seq_length=16,
    learning_rate=1e-2,
    warmup=1,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"cross_entropy": 0.3},
    "softer": {"cross_entropy": 0.3, "temperature": 2.0},
}


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


def distil(source: live_teacher.TargetSource, student: Checkpoint, data: Windows) -> list[Any]:
    """Losses, norms, and all weights after RECIPE."""
    model = load.resident_model(student, mx.float32)
    steps = list(live_teacher.steps(WholeModel(model, GuardedAdamW()), source, data, RECIPE))
    return facts(steps) + [p.tolist() for _, p in tree_flatten(model.parameters())]


def facts(steps: list[Step]) -> list[Any]:
    return [(s.loss, s.grad_norm, s.tokens) for s in steps]


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("name", ["narrow", "deep"])
@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_the_formula(
    llama: Checkpoint, students: dict[str, Checkpoint], data: Windows, name: str, c: float
) -> None:
    """L = (1 - c) KL + c CE: written out on whole logits and differentiated by MLX."""
    source = StreamedTeacher(llama, None, direct=True, temperature=1.0, cross_entropy=c)
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
        each = (1 - c) * (mx.exp(logs) * (logs - own)).sum(axis=-1)
        each = (
            each - c * mx.take_along_axis(own, mx.roll(tokens, -1, 1).reshape(-1, 1), axis=-1)[:, 0]
        )
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


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cross_entropy": 1.5}, "cross_entropy is 1.5: give a number from 0 to 1"),
        ({"cross_entropy": float("nan")}, "cross_entropy is nan"),
        (
            {"targets": "cached", "cross_entropy": 0.1},
            "cross_entropy needs the teacher itself, but targets: cached",
        ),
    ],
)
def test_what_does_not_go_together_is_a_sentence(asked: dict[str, Any], said: str) -> None:
    """The flag, what it clashes with, and what to do; the defaults and each flag by itself pass."""
    DistillationConfig().check()
    DistillationConfig(cross_entropy=1.0).check()
    with pytest.raises(MisError) as caught:
        DistillationConfig(**asked).check()
    assert str(caught.value).startswith(said)


def test_training_with_cross_entropy_stays_under_the_plan(
    tmp_path: Path, models: Callable[[str], Checkpoint]
) -> None:
    """A large vocabulary and cross-entropy: MLX's own peak is under the plan's, no more than 4
    times.
    """
    vocab = 8192
    length = 64
    teacher = load.open_checkpoint(
        tiny.make(tmp_path / "big", vocab_size=vocab, num_hidden_layers=6)
    )
    small = tiny.make(
        tmp_path / "small", seed=1, vocab_size=vocab, num_hidden_layers=4, intermediate_size=512
    )
    student = load.open_checkpoint(small)
    rng = np.random.default_rng(0)
    data = Windows(
        rng.integers(0, vocab, (12, length)).astype(np.int32), np.ones((12, length), np.float32)
    )
    recipe = replace(RECIPE, iters=2, max_seq_length=length)
    mx.clear_cache()
    before = mx.get_active_memory()
    model = load.resident_model(student, mx.float32)
    source = StreamedTeacher(teacher, 0, direct=False, temperature=2.0, cross_entropy=0.5)
    steps = list(live_teacher.steps(WholeModel(model, GuardedAdamW()), source, data, recipe))
    peak = max(s.peak_bytes for s in steps) - before
    sizes = {"batch_size": 2, "grad_accumulation_steps": 2, "max_seq_length": length}
    job = replace(
        JOB, teacher=model_of(teacher), student=model_of(student), cross_entropy=0.5, **sizes
    )
    planned = whole_model.resident_cost(job, 2, 0).peak_bytes
    assert planned / 4 < peak < allocated(planned), (peak / 2**20, planned / 2**20)
