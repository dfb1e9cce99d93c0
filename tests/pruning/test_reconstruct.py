"""The closed-form repair before training: lowers the error block by block, and touches nothing that
is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.hardware.stage_cost import WINDOWS
from mis_mlx.maths import reconstruction
from mis_mlx.maths.reconstruction import RIDGES
from mis_mlx.models.architectures import modules
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.pruning import reconstruct, slicing
from mis_mlx.types import GIB, Checkpoint, KeptUnits, Precision
from tests import peaks, tiny
from tests.conftest import mostly_thorough

ALL = (0, 1, 2)
SOME = tuple(range(0, 768, 3))


def random_windows(count: int, length: int = 64, first: int = 0) -> list[mx.array]:
    """So many windows; `first` is the seed of the first one."""
    made = []
    for seed in range(first, first + count):
        made.append(mx.random.randint(0, 512, (1, length), key=mx.random.key(seed)))
    return made


@pytest.fixture(scope="module")
def windows() -> list[mx.array]:
    """Six windows of 64 tokens."""
    return random_windows(6)


def test_who_judges_by_pencil() -> None:
    """Of one kind every fourth window, or the last of fewer; of several kinds the same of each,
    wherever its windows stand; a kind of one window only teaches, and where all are such, the last
    window judges.
    """
    assert reconstruction.held_out_windows([0] * 9) == [3, 7]
    assert reconstruction.held_out_windows([0] * 3) == [2]
    assert reconstruction.held_out_windows([5]) == [0]
    assert reconstruction.held_out_windows([0, 1] * 4) == [6, 7]
    assert reconstruction.held_out_windows([1, 0, 0, 1, 0, 0, 0, 0, 0]) == [3, 5]
    assert reconstruction.held_out_windows([0, 0, 0, 0, 1]) == [3]
    assert reconstruction.held_out_windows([0, 0, 2]) == [1]
    assert reconstruction.held_out_windows([0, 1, 2]) == [2]


def student_of(
    teacher: Checkpoint, keep: KeptUnits, out: Path, dtype: str = "float32", **sizes: int
) -> Checkpoint:
    """The teacher cut to these sizes."""
    shape = replace(shape_of(teacher.config), layers=len(keep.layers), **sizes)
    slicing.write_student(teacher, shape, keep=keep, out=out, dtype=dtype)
    return load.open_checkpoint(out)


def mended_model(student: Checkpoint, repaired: dict[str, mx.array]) -> Checkpoint:
    """The student's folder with the new weights, beside the old one."""
    arrays = {n: load.dense(student, n) for n in student.tensors} | repaired
    out = student.path.with_name("mended")
    model_writer.write_model(
        student.config,
        arrays.__getitem__,
        source=student.path,
        out=out,
        dtype="float32",
    )
    return load.open_checkpoint(out)


def stream_error(
    teacher: Checkpoint,
    student: Checkpoint,
    basis: np.ndarray,
    windows: list[mx.array],
    layers: tuple[int, ...] = ALL,
) -> list[float]:
    """At the end of each student block: sum over tokens of |missing|^2 / mean square of the
    teacher's stream.

    basis (64, d): into the student's channels. layers: the teacher's that the student has. Behind a
    norm channels count by their own size.
    """
    big = stream.Stream(teacher, mx.float32)
    small = stream.Stream(student, mx.float32)
    at = {0: list(big.embed(windows))}
    for i, block in big.blocks():
        at[i + 1] = list(big.run_block(block, list(at[i])))
    hidden = small.embed(windows)
    errors = []
    for entrance, (_, block) in zip([*layers[1:], 3], small.blocks(), strict=True):
        small.run_block(block, hidden)
        goals = np.concatenate([np.array(want, np.float64)[0] @ basis for want in at[entrance]])
        found = np.concatenate([np.array(got, np.float64)[0] for got in hidden])
        root_mean_square = np.sqrt(np.square(goals).mean(-1, keepdims=True))
        missing = (goals - found) / root_mean_square
        sizes = 1.0
        if reconstruct.POST_MLP_NORM in block:
            sizes = np.square(goals / root_mean_square).mean(0)
        error = np.square(missing) / sizes
        errors.append(float(error.sum()))
    return errors


def test_an_unpruned_student_stays_as_it_is(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """Nothing is missing, so nothing changes."""
    keep = KeptUnits(ALL, {}, "")
    student = student_of(llama, keep, tmp_path / "s")

    repaired, left = reconstruct.reconstruct(llama, student, keep, windows)

    assert not repaired
    assert left == [1.0] * 3


CUTS = {
    "ffn": (KeptUnits(ALL, {(i, "ffn"): SOME for i in ALL}, ""), {"ffn": 256}),
    "hidden": (KeptUnits(ALL, {(-1, "hidden"): tuple(range(16, 64))}, ""), {"hidden": 48}),
    "layers": (KeptUnits((0, 2), {(i, "ffn"): SOME for i in (0, 2)}, ""), {"ffn": 256}),
    "last layer": (KeptUnits((0, 1), {(i, "ffn"): SOME for i in (0, 1)}, ""), {"ffn": 256}),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    mostly_thorough(
        [*(("llama", name) for name in CUTS), ("gemma3_text", "ffn")],
        ("llama", "hidden"),
        of_several=True,
    ),
)
def test_the_error_falls_block_by_block(
    tmp_path: Path,
    models: Callable[[str], Checkpoint],
    windows: list[mx.array],
    kind: str,
    name: str,
) -> None:
    """On other windows, teacher and mended student passed apart, each block ends nearer to the
    teacher's stream; with a norm behind its MLP each but the last, which can add more to a small
    error than to a large one.
    """
    keep, sizes = CUTS[name]
    teacher = models(kind)
    student = student_of(teacher, keep, tmp_path / "s", **sizes)
    channels = list(keep.kept.get((-1, "hidden"), range(64)))
    judging: dict[str, Any] = dict(
        basis=np.eye(64)[:, channels],
        windows=random_windows(6, first=100),
        layers=keep.layers,
    )

    taught = windows + random_windows(18, first=1000)
    repaired, left = reconstruct.reconstruct(teacher, student, keep, taught)

    before = stream_error(teacher, student, **judging)
    after = stream_error(teacher, mended_model(student, repaired), **judging)
    nearer = [a < b for a, b in zip(after, before, strict=True)]
    assert all(nearer if kind == "llama" else nearer[:2])
    assert sum(after) < 0.9 * sum(before)
    assert all(0 < share < 1 for share in left)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("count", "length"), mostly_thorough([(1, 64), (2, 12), (4, 12)], (2, 12), of_several=True)
)
def test_few_tokens_do_not_spoil_a_student(
    tmp_path: Path, models: Callable[[str], Checkpoint], count: int, length: int, kind: str
) -> None:
    """Fewer tokens than the FFN has columns, which plain least squares learns by heart: on other
    windows no block ends further from the teacher than it was. One window leaves nothing to judge
    by, and all as it was.
    """
    keep, sizes = CUTS["ffn"]
    teacher = models(kind)
    student = student_of(teacher, keep, tmp_path / "s", **sizes)
    few = random_windows(count, length)
    others = random_windows(6, first=100)

    repaired, left = reconstruct.reconstruct(teacher, student, keep, few)

    before = stream_error(teacher, student, np.eye(64), others)
    after = stream_error(teacher, mended_model(student, repaired), np.eye(64), others)
    assert all(a <= 1.001 * b for a, b in zip(after, before, strict=True)), (after, before)
    if count == 1:
        assert after == before
        assert left == [1.0] * 3


@pytest.mark.usefixtures("cpu_policy")
def test_against_lstsq_in_float64(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """Block 0's new down_proj is numpy's weighted ridge solution from activations taken out by
    hand.
    """
    keep, sizes = CUTS["ffn"]
    student = student_of(llama, keep, tmp_path / "s", **sizes)
    repaired, _ = reconstruct.reconstruct(llama, student, keep, windows)
    big = stream.Stream(llama, mx.float32)
    small = stream.Stream(student, mx.float32)
    _, teacher_block = next(big.blocks())
    wanted = big.run_block(teacher_block, big.embed(windows))
    _, block = next(small.blocks())
    block.mlp.down_proj = modules.InputRecorder(block.mlp.down_proj)
    rows_a = list[np.ndarray]()
    rows_r = list[np.ndarray]()
    for into, want in zip(small.embed(windows), wanted, strict=True):
        (out,) = small.run_block(block, [into])
        goal = np.array(want, np.float64).reshape(-1, 64)
        weight = 1 / np.sqrt(np.square(goal).mean(-1, keepdims=True))
        inputs = np.array(block.mlp.down_proj.take(), np.float64).reshape(-1, 256)
        found = np.array(out, np.float64).reshape(-1, 64)
        rows_a.append(weight * inputs)
        rows_r.append(weight * (goal - found))

    def solution(ridge: float, at: list[int]) -> np.ndarray:
        a = np.concatenate([rows_a[b] for b in at])
        r = np.concatenate([rows_r[b] for b in at])
        damping = np.sqrt(ridge * np.square(a).sum() / 256)
        damped = np.vstack([a, damping * np.eye(256)])
        goals = np.vstack([r, np.zeros((256, 64))])
        found, *_ = np.linalg.lstsq(damped, goals, rcond=None)
        return np.asarray(found)

    judge = 3  # the fourth window
    seen = [b for b in range(6) if b != judge]
    errors = []
    for ridge in RIDGES:
        left = rows_r[judge] - rows_a[judge] @ solution(ridge, seen)
        errors.append(np.square(left).sum())
    assert min(errors) < np.square(rows_r[judge]).sum()
    update = solution(RIDGES[int(np.argmin(errors))], list(range(6)))
    name = "model.layers.0.mlp.down_proj.weight"
    change = np.array(repaired[name]) - np.array(load.dense(student, name))
    np.testing.assert_allclose(change, update.T, atol=1e-4 * np.abs(update).max())
    assert np.abs(update).max() > 0.01  # there was something to mend


def test_each_kind_of_text_judges_a_block(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out windows come with their kinds, of six with three kinds the second of each."""
    seen = list[list[int]]()
    real = reconstruction.remaining_error

    def watched(held_out: Sequence[reconstruction.HeldOut], update: np.ndarray) -> float:
        seen.append([rows.kind for rows in held_out])
        return real(held_out, update)

    monkeypatch.setattr(reconstruction, "remaining_error", watched)
    keep, sizes = CUTS["ffn"]
    student = student_of(llama, keep, tmp_path / "s", **sizes)

    _, left = reconstruct.reconstruct(llama, student, keep, windows, kinds=[2, 0, 1, 0, 2, 1])

    assert seen == [[0, 2, 1]] * (3 * len(RIDGES))
    assert all(0 < share <= 1 for share in left)


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("dtype", "item"),
    mostly_thorough(product(("F32", "BF16"), (0, 4)), ("BF16", 4), of_several=True),
)
def test_a_repair_stays_under_the_plan(
    tmp_path: Path, dtype: Any, item: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLX and numpy hold, the student in one file or in parts, hidden states in memory."""
    teacher = load.open_checkpoint(
        tiny.make(
            tmp_path / "t",
            dtype=dtype,
            hidden_size=256,
            intermediate_size=1536,
            num_hidden_layers=3,
        )
    )
    keep = KeptUnits(ALL, {(i, "ffn"): tuple(range(768)) for i in ALL}, "")
    student = student_of(teacher, keep, tmp_path / "s", ffn=768)
    windows = random_windows(6, length=128)
    job = DistillationSpec(
        teacher=model_of(teacher),
        student=model_of(student),
        iters=1,
        reconstruct_samples=6,
        max_seq_length=128,
    )
    planned = reconstruct.repair_cost(job, GIB, item)
    assert planned.stays == ({WINDOWS: 6} if item else {})
    put = (lambda name, weight: mx.eval(weight)) if item else None
    with peaks.counted(monkeypatch, (reconstruct, "fit_down_proj")) as peak:
        mx.set_cache_limit(0)
        reconstruct.reconstruct(teacher, student, keep, windows, put=put)
    assert planned.peak_bytes / 4 < peak.nbytes < peaks.allocated(planned.peak_bytes)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float16"), ("gemma3_text", "bfloat16")])
def test_what_is_repaired_is_float32(
    tmp_path: Path,
    models: Callable[[str], Checkpoint],
    windows: list[mx.array],
    kind: str,
    dtype: str,
) -> None:
    """Whatever the two models compute in: it is put into a student that trains in float32."""
    teacher = replace(models(kind), precision=Precision(dtype=dtype))
    layers = range(shape_of(teacher.config).layers)
    keep = KeptUnits(tuple(layers), {(i, "ffn"): SOME for i in layers}, "")
    student = student_of(teacher, keep, tmp_path / "s", ffn=len(SOME))
    student = replace(student, precision=teacher.precision)

    repaired, _ = reconstruct.reconstruct(teacher, student, keep, windows)

    assert repaired
    assert {array.dtype for array in repaired.values()} == {mx.float32}
