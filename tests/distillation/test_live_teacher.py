"""Teacher and student: resident or streamed, whole or in micro-batches, it is the same step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.compute import streams, token_losses
from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.maths.losses import loss_noise_factor
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures import modules
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.types import Checkpoint, Step
from tests import tiny
from tests.conftest import near


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A smaller random llama of the same tokens."""
    folder = tmp_path_factory.mktemp("student") / "s"
    return load.open_checkpoint(
        tiny.make(folder, seed=5, num_hidden_layers=1, intermediate_size=256)
    )


@pytest.fixture(scope="module")
def data() -> Windows:
    """Twenty windows of 16 tokens; some windows count in part only."""
    rng = np.random.default_rng(2)
    loss_mask = (rng.random((20, 16)) < 0.7).astype(np.float32)
    loss_mask[:, -1] = 0
    loss_mask[3] = 0
    return Windows(rng.integers(0, 512, (20, 16)).astype(np.int32), loss_mask)


RECIPE = TrainingConfig(iters=3, batch_size=4, max_seq_length=16, learning_rate=1e-2)


def distil(
    teacher: Checkpoint,
    student: Checkpoint,
    data: Windows,
    recipe: TrainingConfig = RECIPE,
    *,
    resident: bool = True,
    temperature: float = 1.0,
    sigma: float = 0.0,
) -> tuple[nn.Module, list[Step]]:
    model = load.resident_model(student, mx.float32)
    source = live_teacher.StreamedTeacher(teacher, None if resident else 0, temperature=temperature)
    steps = live_teacher.steps(
        WholeModel(model, GuardedAdamW()),
        source,
        data,
        recipe,
        factor=partial(loss_noise_factor, sigma, recipe.seed),
    )
    return model, list(steps)


def furthest(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of any weight."""
    pairs = zip(tree_flatten(a.parameters()), tree_flatten(b.parameters()), strict=True)
    return max(mx.abs(x - y).max().item() for (_, x), (_, y) in pairs)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_streamed_teacher_says_what_a_resident_one_says(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Hidden states and logits, bit for bit, for every kind."""
    resident, streamed = (live_teacher.StreamedTeacher(models(kind), room) for room in (None, 0))
    for a, b in zip(resident.hidden(batches), streamed.hidden(batches), strict=True):
        assert mx.array_equal(a, b)
        assert mx.array_equal(resident.logits(a[0]), streamed.logits(b[0]))


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_a_head_that_both_have_is_read_once(
    models: Callable[[str], Checkpoint],
    batches: list[mx.array],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a student's frozen head that is the teacher's: the same loss and gradient, and its own
    is never read.
    """
    (hidden,) = live_teacher.StreamedTeacher(models(kind)).hidden(batches[:1])
    hidden, loss_mask = hidden.reshape(-1, hidden.shape[-1]), mx.ones(hidden.shape[1])
    head = modules.dense_weight(stream.Stream(models(kind)).head())
    found = []
    for same_head in (False, True):
        source = live_teacher.StreamedTeacher(models(kind), same_head=same_head)
        if same_head:
            monkeypatch.setattr(
                stream.Stream, "head", lambda self: pytest.fail("the head was read")
            )
        loss = source.token_loss(own_head=True)
        for either in (loss, TokenLoss(loss.by_mlx)):
            found.append(either.gradients(0.9 * hidden, head, loss_mask, hidden, frozen_head=True))
    for (loss, slope, _), (other, others, _) in zip(found[:2], found[2:], strict=True):
        assert float(loss) == pytest.approx(float(other), rel=near(0.0, 1e-3))
        assert float(loss) > 0
        assert mx.allclose(slope, others, rtol=near(0.0, 0.05), atol=near(0.0, 1e-3))


def test_streaming_does_not_change_the_student(
    llama: Checkpoint, student: Checkpoint, data: Windows
) -> None:
    """Three steps with either teacher: the same losses and weights to the last bit."""
    a, steps_a = distil(llama, student, data)
    b, steps_b = distil(llama, student, data, resident=False)
    assert [s.loss for s in steps_a] == [s.loss for s in steps_b]
    assert furthest(a, b) == 0.0


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("batch_size", [4, 3, 1])
def test_lanes_do_not_change_the_student(
    llama: Checkpoint,
    student: Checkpoint,
    data: Windows,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    """Windows side by side and the vocabulary by numpy, beside MLX's own gradient of the whole
    batch: one step.
    """
    recipe = replace(RECIPE, iters=1, batch_size=batch_size)
    with monkeypatch.context() as patched:
        patched.setattr(token_losses, "TokenLoss", lambda by_mlx, _: TokenLoss(by_mlx))
        _, (one,) = distil(llama, student, data, recipe)
    monkeypatch.setattr(streams, "count", lambda: 2)
    _, (two,) = distil(llama, student, data, recipe)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_kl_per_token(
    llama: Checkpoint, student: Checkpoint, data: Windows, temperature: float
) -> None:
    """The first step's loss, from whole logits in float64: sum over learnt positions over their
    number.
    """
    _, steps = distil(llama, student, data, temperature=temperature)
    from mis_mlx.data.token_windows import order

    at = order(20, 4, 0, 0)
    total = 0.0
    for w in at:
        logs = []
        for checkpoint in (llama, student):
            z = np.array(
                load.resident_model(checkpoint, mx.float32)(mx.array(data.tokens[w][None]))[0],
                np.float64,
            )
            z /= temperature
            logs.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        total += float(((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1) * data.loss_mask[w]).sum())
    assert steps[0].loss == pytest.approx(total / data.loss_mask[at].sum(), rel=1e-5)
    assert steps[0].tokens == data.loss_mask[at].sum()


def test_halny_zero_is_plain_and_wind_scales_the_gradient(
    llama: Checkpoint, student: Checkpoint, data: Windows
) -> None:
    """sigma 0: exactly plain KL. sigma 0.1: the gradient of step k is (1 + eps_k) times the plain
    one.
    """
    calm, plain = distil(llama, student, data)
    again, _ = distil(llama, student, data, sigma=0.0)
    assert furthest(calm, again) == 0.0
    stormy, windy = distil(llama, student, data, sigma=0.1)
    factor = loss_noise_factor(0.1, 0, 0)
    assert factor != 1.0
    assert windy[0].loss == plain[0].loss
    assert windy[0].grad_norm == pytest.approx(factor * plain[0].grad_norm, rel=1e-5)
    assert furthest(calm, stormy) > 0


def test_micro_batches_line_up(llama: Checkpoint) -> None:
    """Tokens, mask and the teacher's hidden states of a micro-batch belong to the same
    positions.
    """
    tokens = mx.random.randint(0, 512, (2, 8), key=mx.random.key(0))
    loss_mask = mx.array([[1.0] * 7 + [0.0], [0.0] * 8])
    teacher = live_teacher.StreamedTeacher(llama, None)
    ((got, mask, hidden),) = teacher.micro_batches([(tokens, loss_mask)])
    assert mx.array_equal(got, tokens)
    assert mask.tolist() == [1.0] * 7 + [0.0] * 9
    assert mx.array_equal(hidden, teacher.hidden([tokens])[0].reshape(16, 64))
