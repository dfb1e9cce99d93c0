"""Cached distillation: written once, trained without a teacher, and stopped anywhere it is the
same.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.data import draws
from mis_mlx.data.token_windows import Windows, order
from mis_mlx.distillation import live_teacher
from mis_mlx.distillation.whole_model import WholeModel, value_and_grad
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import load
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage import logit_store
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError, Step
from tests import conftest, tiny
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


def write(llama: Checkpoint, data: Windows, folder: Path, **more: object) -> logit_store.Targets:
    return live_teacher.write_store(
        llama,
        lambda: live_teacher.StreamedTeacher(llama),
        data=data,
        folder=folder,
        files=DISK,
        **more,
    )  # type: ignore[arg-type]


def train(
    student: Checkpoint,
    source: live_teacher.TargetSource,
    data: Windows,
    recipe: TrainingConfig = RECIPE,
) -> tuple[nn.Module, list[Step]]:
    model = load.resident_model(student, mx.float32)
    return model, list(live_teacher.steps(WholeModel(model, GuardedAdamW()), source, data, recipe))


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
    """80 windows in passes of 7, with a resident teacher: byte for byte the store of passes of 64,
    streamed.
    """
    seen = []
    teacher = live_teacher.StreamedTeacher(llama, None)
    how = {"count": 20, "windows_per_pass": 7, "show": lambda n, text: seen.append((n, text))}
    live_teacher.write_store(
        llama, lambda: teacher, data=some(), folder=tmp_path, files=DISK, **how
    )
    assert bytes_of(tmp_path) == bytes_of(whole)
    assert [n for n, _ in seen] == list(range(1, 81))
    assert seen[-1][1].endswith(" bytes/token")


def test_what_is_stored_is_drawn_from_the_teacher(llama: Checkpoint, whole: Path) -> None:
    """Over 80 windows the mean share of each token is the teacher's mean softmax: 512 tokens within
    5 s.e.
    """
    data = some()
    shares = []
    model = load.resident_model(llama, mx.float32)
    for window in data.tokens:
        shares.append(np.array(mx.softmax(model(mx.array(window[None]))[0], axis=-1), np.float64))
    p = np.concatenate(shares)
    ids, got = opened(whole).windows(range(80))
    mean = np.bincount(ids.reshape(-1), got.reshape(-1), 512) / len(p)
    error = np.sqrt((p * (1 - p)).mean(axis=0) / (20 * len(p)))
    assert np.abs((mean - p.mean(axis=0)) / error).max() < 5


def near(live: list[Step]) -> Any:
    """What losses against targets with every token in them are: the live ones, whatever rounds."""
    return pytest.approx([s.loss for s in live], rel=conftest.near(1e-4, 1e-3))


def test_only_visited_windows_need_targets(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint
) -> None:
    """Of 80 windows a run of six steps visits 24: a store of those trains as it should, others are
    a bug.
    """
    data = some()
    at = live_teacher.visited_windows(data, RECIPE)
    steps = [order(80, 4, step, RECIPE.seed) for step in range(6)]
    assert len(at) == 24
    assert set(at) == set(np.concatenate(steps).tolist())
    assert (np.diff(at) > 0).all()
    picked = Windows(data.tokens[at], data.loss_mask[at])
    source = live_teacher.CachedTeacher(write(llama, picked, tmp_path, top=512), at)
    live = train(student, live_teacher.StreamedTeacher(llama, None), data)[1]
    assert [s.loss for s in train(student, source, data)[1]] == near(live)
    other = next(w for w in range(80) if w not in at)
    with pytest.raises(ValueError, match="are not all in"):
        source.micro_batches([(mx.zeros((1, 16)), mx.zeros((1, 16)))], [np.array([other])])
    with pytest.raises(ValueError, match="5 windows for a store of 24"):
        live_teacher.CachedTeacher(opened(tmp_path), at[:5])


def test_steps_take_kinds_of_text_in_their_shares(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint
) -> None:
    """Sixteen windows of a half and four of the other half: a run of 24 windows visits these four,
    and twelve of those; a store of the visited ones trains as it should.
    """
    data = some(20)
    kinds = np.repeat(np.array([0, 1], np.int32), [16, 4])
    data = Windows(data.tokens, data.loss_mask, kind=kinds, shares=(0.5, 0.5))

    at = live_teacher.visited_windows(data, RECIPE)
    picked = data.pick(at)
    source = live_teacher.CachedTeacher(write(llama, picked, tmp_path, top=512), at)

    assert picked.kind.tolist() == [0] * 12 + [1] * 4
    steps = [draws.drawn_batch(data, 4, step, RECIPE.seed) for step in range(6)]
    assert set(at) == set(np.concatenate(steps))
    assert (np.diff(at) > 0).all()
    live = train(student, live_teacher.StreamedTeacher(llama, None), data)[1]
    assert [s.loss for s in train(student, source, data)[1]] == near(live)
    assert [s.tokens for s in live] == [data.loss_mask[step].sum() for step in steps]


def test_another_teacher_other_data_or_another_seed_are_refused(
    tmp_path: Path, llama: Checkpoint, student: Checkpoint, whole: Path
) -> None:
    """Before the teacher is asked for anything."""
    folder = shutil.copytree(whole, tmp_path / "t")
    data = some()
    for checkpoint, windows, more, says in (
        (student, data, {}, "another teacher"),
        (llama, Windows(data.tokens[::-1].copy(), data.loss_mask), {}, "another data"),
        (llama, data, {"seed": 1}, "another seed"),
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
    source = live_teacher.CachedTeacher(opened(folder), np.arange(len(some().tokens)))
    with pytest.raises(MisError, match=r"part-00001.safetensors is damaged"):
        source.micro_batches([(mx.zeros((1, 16)), mx.zeros((1, 16)))], [np.array([40])])
    store = write(llama, some(), folder, count=20)
    assert len(store.notes) == 1
    assert bytes_of(folder) == bytes_of(whole)


def test_a_finished_store_does_not_open_its_teacher(llama: Checkpoint, whole: Path) -> None:
    """Everything is there: the function that opens the teacher is not called."""

    def teacher() -> live_teacher.StreamedTeacher:
        raise AssertionError("opened")

    assert (
        live_teacher.write_store(
            llama, teacher, data=some(), folder=whole, files=DISK, count=20
        ).missing()
        == []
    )
    with pytest.raises(AssertionError, match="opened"):
        live_teacher.write_store(
            llama, teacher, data=some(3), folder=whole.parent / "new", files=DISK
        )


def test_what_a_store_cannot_do_is_said(whole: Path, student: Checkpoint) -> None:
    """A student of another vocabulary needs its own."""
    source = live_teacher.CachedTeacher(opened(whole), np.arange(len(some().tokens)))
    model = load.resident_model(student, mx.float32)
    model.model.embed_tokens.weight = model.model.embed_tokens.weight[:500]
    arguments = source.micro_batches(
        [(mx.zeros((1, 16), mx.int32), mx.ones((1, 16)))], [np.array([0])]
    )[0]
    with pytest.raises(MisError, match="for 512 tokens, but the student has 500"):
        value_and_grad(model, source.token_loss())(model, *arguments)
