"""Kept targets: written once, learned from without a teacher, and stopped anywhere the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.data import draws
from mis_mlx.data.token_windows import Windows, order
from mis_mlx.distillation import targets
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.distillation.targets import KeptTargets
from mis_mlx.maths.losses import loss_noise_factor
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage import logit_store
from mis_mlx.types import Checkpoint, MisError, Step
from tests import tiny
from tests.conftest import near
from tests.distillation.test_scales import everything
from tests.storage.test_checkpoint import flip
from tests.storage.test_logit_store import opened

RECIPE = TrainingConfig(
    iters=6,
    batch_size=2,
    grad_accumulation_steps=2,
    max_seq_length=16,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A smaller random llama of the same tokens."""
    folder = tmp_path_factory.mktemp("student") / "s"
    return load.open_checkpoint(
        tiny.make(folder, seed=5, num_hidden_layers=1, intermediate_size=256)
    )


def some(n: int = 80) -> Windows:
    """Windows of 16 tokens that count in part."""
    rng = np.random.default_rng(2)
    loss_mask = (rng.random((n, 16)) < 0.7).astype(np.float32)
    loss_mask[:, -1] = 0
    return Windows(rng.integers(0, 512, (n, 16)).astype(np.int32), loss_mask)


def write(llama: Checkpoint, data: Windows, folder: Path, **more: Any) -> logit_store.Targets:
    return targets.write_store(llama, data=data, folder=folder, **more)


def train(
    student: Checkpoint, source: KeptTargets, data: Windows, sigma: float = 0.0
) -> tuple[dict[str, np.ndarray], list[Step]]:
    """What was learned, and the steps."""
    made = BlockStudent(student, "weights")
    made.begin()
    factor = partial(loss_noise_factor, sigma, RECIPE.seed)
    steps = list(source.steps(made, data, RECIPE, factor=factor))
    return everything(made), steps


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".json", ".safetensors")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Checkpoint) -> Path:
    """An undisturbed store of 80 windows, 20 samples a position; do not write into it."""
    folder = tmp_path_factory.mktemp("whole") / "targets"
    assert write(llama, some(), folder, count=20).missing() == []
    return folder


def test_the_store_is_the_same_however_windows_pass(
    tmp_path: Path, llama: Checkpoint, whole: Path
) -> None:
    """80 windows in passes of 7: byte for byte the store of passes of 64."""
    seen = []
    show = lambda n, text: seen.append((n, text))  # noqa: E731
    write(llama, some(), tmp_path, count=20, windows_per_pass=7, show=show)
    assert bytes_of(tmp_path) == bytes_of(whole)
    assert [n for n, _ in seen] == list(range(1, 81))
    assert seen[-1][1].endswith(" bytes/token")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_kl_per_token(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint, temperature: float
) -> None:
    """With every token kept, the first step's loss is that of whole logits in float64: the sum over
    learnt positions over their number.
    """
    data = some()
    at = targets.visited_windows(data, replace(RECIPE, iters=1))
    store = write(llama, data.pick(at), tmp_path, top=512, temperature=temperature)
    made = BlockStudent(student, "weights")
    made.begin()
    step = next(KeptTargets(store, at).steps(made, data, replace(RECIPE, iters=1)))
    total = 0.0
    for window in at:
        logs = []
        for checkpoint in (llama, student):
            model = load.resident_model(checkpoint, mx.float32)
            z = np.array(model(mx.array(data.tokens[window][None]))[0], np.float64) / temperature
            logs.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
        total += float((kl * data.loss_mask[window]).sum())
    assert step.loss == pytest.approx(total / data.loss_mask[at].sum(), rel=near(1e-5, 1e-3))
    assert step.tokens == data.loss_mask[at].sum()


def test_only_visited_windows_need_targets(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint, whole: Path
) -> None:
    """Of 80 windows a run of six steps visits 24: others are a bug, and so are those of another
    store. Against their targets the loss falls.
    """
    data = some()
    at = targets.visited_windows(data, RECIPE)
    steps = [order(80, 4, step, RECIPE.seed) for step in range(6)]
    assert len(at) == 24
    assert set(at) == set(np.concatenate(steps).tolist())
    assert (np.diff(at) > 0).all()
    source = KeptTargets(write(llama, data.pick(at), tmp_path, top=512), at)
    losses = [step.loss for step in train(student, source, data)[1]]
    assert losses[-1] < 0.9 * losses[0]
    other = next(w for w in range(80) if w not in at)
    with pytest.raises(ValueError, match="are not all in"):
        source.micro_batch(data, np.array([other]))
    with pytest.raises(ValueError, match="5 windows for a store of 24"):
        KeptTargets(opened(tmp_path), at[:5])


def test_steps_take_kinds_of_text_in_their_shares(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint
) -> None:
    """Sixteen windows of a half and four of the other half: a run of 24 windows visits these four,
    and twelve of those.
    """
    data = some(20)
    kinds = np.repeat(np.array([0, 1], np.int32), [16, 4])
    data = Windows(data.tokens, data.loss_mask, kind=kinds, shares=(0.5, 0.5))
    at = targets.visited_windows(data, RECIPE)
    picked = data.pick(at)
    source = KeptTargets(write(llama, picked, tmp_path), at)
    assert picked.kind is not None
    assert picked.kind.tolist() == [0] * 12 + [1] * 4
    drawn = [draws.drawn_batch(data, 4, step, RECIPE.seed) for step in range(6)]
    assert set(at) == set(np.concatenate(drawn))
    assert (np.diff(at) > 0).all()
    steps = train(student, source, data)[1]
    assert [s.tokens for s in steps] == [data.loss_mask[step].sum() for step in drawn]


def test_halny_zero_is_plain_and_wind_scales_the_gradient(
    llama: Checkpoint, student: Checkpoint, whole: Path
) -> None:
    """sigma 0.1: the gradient of step k is (1 + eps_k) times the plain one."""
    source = KeptTargets(opened(whole), np.arange(80))
    calm, plain = train(student, source, some())
    stormy, windy = train(student, source, some(), sigma=0.1)
    factor = loss_noise_factor(0.1, 0, 0)
    assert factor != 1.0
    assert windy[0].loss == plain[0].loss
    assert windy[0].grad_norm == pytest.approx(factor * plain[0].grad_norm, rel=1e-5)
    assert any(not np.array_equal(calm[name], stormy[name]) for name in calm)


def test_others_are_refused(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint, whole: Path
) -> None:
    """Another teacher, other data, another seed or T: before the teacher is asked for anything."""
    folder = shutil.copytree(whole, tmp_path / "t")
    data = some()
    for checkpoint, windows, more, says in (
        (student, data, {}, "another teacher"),
        (llama, Windows(data.tokens[::-1].copy(), data.loss_mask), {}, "another data"),
        (llama, data, {"seed": 1}, "another seed"),
        (llama, data, {"temperature": 2.0}, "another temperature"),
    ):
        with pytest.raises(MisError, match=says):
            write(checkpoint, windows, folder, **{"count": 20, **more})
    assert bytes_of(folder) == bytes_of(whole)


def test_a_damaged_part_is_made_again_from_the_teacher(
    tmp_path: Path, llama: Checkpoint, whole: Path
) -> None:
    """One bit flipped: training refuses it, writing mends it and says so."""
    folder = shutil.copytree(whole, tmp_path / "t")
    flip(folder / "part-00001.safetensors")
    with pytest.raises(MisError, match=r"part-00001.safetensors is damaged"):
        KeptTargets(opened(folder), np.arange(80)).micro_batch(some(), np.array([40]))
    store = write(llama, some(), folder, count=20)
    assert len(store.notes) == 1
    assert bytes_of(folder) == bytes_of(whole)


def test_a_finished_store_does_not_open_its_teacher(
    llama: Checkpoint, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is there: no block is read."""
    monkeypatch.setattr(stream, "Stream", lambda *_, **__: pytest.fail("opened"))
    assert write(llama, some(), whole, count=20).missing() == []


def test_a_student_of_another_vocabulary_is_refused(tmp_path: Path, whole: Path) -> None:
    """It needs targets of its own."""
    source = KeptTargets(opened(whole), np.arange(80))
    other = load.open_checkpoint(tiny.make(tmp_path / "m", vocab_size=500, num_hidden_layers=1))
    with pytest.raises(MisError, match="for 512 tokens, but the student has 500"):
        next(source.steps(BlockStudent(other, "weights"), some(), RECIPE))
