"""Scales that learn block by block: the same bits in every residency, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, packed_student, pipeline
from mis_mlx.distillation.whole_model import value_and_grad
from mis_mlx.models.architectures.families import mixture
from mis_mlx.models.opening import load
from mis_mlx.quantization import learned_scales, packed_format
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow

STEPS = 3
ALL_KINDS = {
    **{kind: {"model_type": "llama", **changes} for kind, changes in tiny.KINDS.items()},
    **{
        kind: {"num_hidden_layers": 7, "model_type": kind, **c} for kind, c in tiny.FAMILIES.items()
    },
}
# A mixture of experts is rounded, and nothing of it learns (packed_format.of_mixture).
KINDS = {kind: config for kind, config in ALL_KINDS.items() if not mixture(config)}
SHOWN = ("llama",)


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[str], tuple[Checkpoint, Checkpoint]]:
    """`packed(kind)`: a tiny teacher, and itself in 4 bits."""
    return lambda kind: pair(tmp_path, kind)


def pair(place: Path, kind: str) -> tuple[Checkpoint, Checkpoint]:
    """A tiny teacher, and itself in 4 bits."""
    teacher = load.open_checkpoint(tiny.make(place / "teacher", **KINDS[kind]))
    plan = packed_format.formats_of(teacher.config, 32)
    packed_format.write_quantized(teacher, place / "packed", plan, DISK)
    return teacher, load.open_checkpoint(place / "packed")


def text(windows: int = 12) -> Windows:
    """Windows of 16 tokens."""
    tokens = np.random.default_rng(0).integers(0, 512, (windows, 16)).astype(np.int32)
    return Windows(tokens, np.ones((windows, 16), np.float32))


def recipe(packed: Checkpoint) -> DistillationConfig:
    """A few large steps, each of two micro-batches."""
    asked = DistillationConfig(batch_size=2, grad_accumulation_steps=2)
    return pipeline.tuning_recipe(asked, packed, STEPS, 1e-2)


def learned(
    teacher: Checkpoint, packed: Checkpoint, kept: int, source: live_teacher.TargetSource | None
) -> dict[str, np.ndarray]:
    """What a student has learned in the end."""
    source = source or live_teacher.StreamedTeacher(teacher, None)
    student = packed_student.PackedStudent(packed, kept)
    for _ in live_teacher.steps(student, source, text(), recipe(packed)):
        pass
    return {name: np.array(array) for name, array in student.learned().items()}


@pytest.mark.parametrize("kind", mostly_slow(KINDS, *SHOWN, thorough=["lfm2"]))
def test_the_same_bits_in_every_residency(
    packed: Callable[[str], tuple[Checkpoint, Checkpoint]], kind: str
) -> None:
    """With no block kept, some, and all of them: the same scales, biases and norms to the bit; all
    of every block have changed.
    """
    teacher, student = packed(kind)
    layers = student.config["num_hidden_layers"]
    streamed = learned(teacher, student, 0, None)
    for kept in (1, layers):
        other = learned(teacher, student, kept, None)
        assert streamed.keys() == other.keys()
        assert all(np.array_equal(other[name], streamed[name]) for name in streamed)
    before = packed_student.PackedStudent(student, 0).learned()
    unchanged = [name for name in before if np.array_equal(before[name], streamed[name])]
    assert not unchanged
    assert sum(name.endswith(".scales") for name in before) == len(
        [path for path in packed_format.formats(student) if path.startswith("model.layers.")]
    )


@pytest.mark.usefixtures("cpu_policy")  # a GPU keeps packed weights, which have no gradient
@pytest.mark.parametrize("kind", mostly_slow(KINDS, "llama", "biased", "qwen3_5_text"))
def test_gradients_are_those_of_one_graph(
    packed: Callable[[str], tuple[Checkpoint, Checkpoint]], kind: str
) -> None:
    """Block by block, gradients are what MLX gives of the whole dense model: a scale's is the sum
    over its group of integer times the weight's, a norm's is its own.
    """
    teacher, student = packed(kind)
    model = load.resident_model(student, mx.float32)
    batches = live_teacher.step_micro_batches(
        live_teacher.StreamedTeacher(teacher, None), text(), recipe(student), 0
    )
    source = live_teacher.StreamedTeacher(teacher, None)
    dense_loss = value_and_grad(model, source.token_loss())
    summed: dict[str, mx.array] = {}
    for batch in batches:
        _, grads = dense_loss(model, *batch)
        for name, gradient in tree_flatten(grads):
            summed[name] = summed.get(name, mx.array(0.0)) + gradient
    ours = packed_student.PackedStudent(student, 0)
    found = gradients_by_name(ours, batches, source)
    for path, kind_of_format in packed_format.formats(student).items():
        if not path.startswith("model.layers."):
            continue
        groups = summed[f"{path}.weight"].reshape(*found[f"{path}.biases"].shape, -1)
        near(found[f"{path}.biases"], groups.sum(axis=-1))
        assert kind_of_format.group == groups.shape[-1]
    for name in found:
        if "norm" in name:
            near(found[name], summed[name])


def gradients_by_name(
    student: packed_student.PackedStudent,
    batches: Sequence[Any],
    source: live_teacher.TargetSource,
) -> dict[str, mx.array]:
    """A step's gradients of all that learns, by name in the whole model."""
    found = student.look(batches, source.token_loss())
    named = {packed_student.NORM: found.norm}
    for i, vector in enumerate(reversed(found.blocks)):
        for name, gradient in student._by_name(i, vector).items():
            named[f"model.layers.{i}.{name}"] = gradient
    return named


def near(found: mx.array, want: mx.array) -> None:
    """To a thousandth of the largest."""
    largest = float(mx.abs(want).max())
    np.testing.assert_allclose(np.array(found), np.array(want), atol=1e-3 * largest)


def test_stored_targets_need_no_head(
    packed: Callable[[str], tuple[Checkpoint, Checkpoint]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against a store with every token in it a student learns what it learns from the teacher, to
    rounding, and never reads its head whole.
    """
    teacher, student = packed("untied")
    data = text()
    visited = live_teacher.visited_windows(data, recipe(student))
    store = live_teacher.write_store(
        teacher,
        lambda: live_teacher.StreamedTeacher(teacher),
        data.pick(visited),
        tmp_path / "targets",
        DISK,
        top=512,
    )
    live = learned(teacher, student, 0, None)
    monkeypatch.setattr(learned_scales.PackedStream, "head", None)
    stored = learned(teacher, student, 0, live_teacher.CachedTeacher(store, visited))
    for name, array in live.items():
        np.testing.assert_allclose(stored[name], array, rtol=2e-3, atol=1e-4)
