"""Scales that learn block by block: the same bytes in every residency and place, in little memory,
after any end of the process too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mis_mlx.compute.precision import POLICY
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import pipeline, targets
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.hardware import memory
from mis_mlx.maths import rounding
from mis_mlx.models.architectures.families import mixture
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format, scale_state
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import lazy
from mis_mlx.types import Checkpoint, MisError, Step
from tests import disks, peaks, tiny
from tests.conftest import mostly_slow
from tests.distillation import students
from tests.faults.broken import KILLED, Killed, breaking

STEPS = 3
ALL_KINDS = {
    **{kind: {"model_type": "llama", **changes} for kind, changes in tiny.KINDS.items()},
    **{
        kind: {"num_hidden_layers": 7, "model_type": kind, **c} for kind, c in tiny.FAMILIES.items()
    },
}
# A mixture of experts is rounded, and nothing of it learns (packed_format.of_mixture).
KINDS = {kind: config for kind, config in ALL_KINDS.items() if not mixture(config)}
HIDDEN = ".tmp-scales-1"  # of a process that is gone, for whoever comes next
Everything = dict[str, np.ndarray]


def pair(place: Path, kind: str, **changes: Any) -> tuple[Checkpoint, Checkpoint]:
    """A tiny teacher, and itself in 4 bits."""
    teacher = load.open_checkpoint(tiny.make(place / "teacher", **{**KINDS[kind], **changes}))
    return teacher, tiny.packed(teacher, place / "packed", 32)


def text(windows: int = 12) -> Windows:
    """Windows of 16 tokens."""
    tokens = np.random.default_rng(0).integers(0, 512, (windows, 16)).astype(np.int32)
    return Windows(tokens, np.ones((windows, 16), np.float32))


def recipe(packed: Checkpoint) -> DistillationConfig:
    """A few large steps, each of two micro-batches."""
    asked = DistillationConfig(batch_size=2, grad_accumulation_steps=2)
    return pipeline.tuning_recipe(asked, packed, STEPS, 1e-2)


def kept_targets(teacher: Checkpoint, packed: Checkpoint, folder: Path) -> targets.KeptTargets:
    """The teacher's targets for `text`, every token in them."""
    return students.kept(teacher, text(), recipe(packed), folder, top=512)


def scaled(packed: Checkpoint, place: Path, *, on_disk: bool, kept: int = 0) -> BlockStudent:
    """A student whose scales learn, in memory or in files in `place`."""
    state: scale_state.LearnedState = scale_state.InMemory()
    if on_disk:
        state = scale_state.OnDisk(place / HIDDEN)
    return BlockStudent(packed, "scales", kept=kept, state=state)


def train(
    models: tuple[Checkpoint, Checkpoint],
    place: Path,
    stop: int | None = None,
    **how: Any,
) -> tuple[Everything, list[float]]:
    """What a student of these models has after all steps, and norms; its checkpoints are in
    `place`. how: of `scaled`.
    """
    teacher, packed = models
    source = kept_targets(teacher, packed, teacher.path.with_name("targets"))

    def training(made: BlockStudent, start: int) -> Iterator[Step]:
        return source.steps(made, text(), recipe(packed), start)

    made = scaled(packed, place, **how)
    steps = students.run(made, place / "steps", training, stop=stop)
    found = everything(made)
    for name in found.keys() & packed.tensors.keys():
        assert np.array_equal(np.array(made.learned(name)), found[name])
    assert made.learned("model.embed_tokens.scales") is None
    return found, [step.grad_norm for step in steps]


def everything(student: BlockStudent) -> Everything:
    """Values and moments by full name, wherever they are."""
    found: dict[str, mx.array] = {}
    for named in student.arrays().values():
        if isinstance(named, protocol.Written):
            tensors, _ = check(named.path)
            named = lazy(tensors, tensors)
        found |= named
    return {name: np.array(array) for name, array in found.items()}


def assert_equal(found: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == want.keys()
    different = [name for name in want if not np.array_equal(found[name], want[name])]
    assert not different


@pytest.mark.parametrize(
    ("kind", "policy"),
    mostly_slow(
        product(KINDS, ("cpu", "metal")),
        ("llama", "cpu"),
        thorough=[("lfm2", "cpu"), ("llama", "metal")],
        of_several=True,
    ),
)
def test_the_same_bytes_in_every_residency(
    tmp_path: Path, kind: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and on disk, with integers of no block kept, of one, and of all: values, moments
    and norms to the bit. Scales, biases and norms of every block have changed.
    """
    monkeypatch.setenv(POLICY, policy)
    models = pair(tmp_path, kind)
    packed = models[1]
    begun = scaled(packed, tmp_path, on_disk=False)
    begun.begin()
    before = everything(begun)
    want, norms = train(models, tmp_path / "memory", on_disk=False)
    assert sum(name.endswith(".scales.m") for name in want)
    assert sum(name.endswith(".scales") for name in want) == len(
        [path for path in packed_format.formats(packed) if path.startswith("model.layers.")]
    )
    values = [name for name in before if name in packed.tensors]
    assert not [name for name in values if np.array_equal(before[name], want[name])]
    for on_disk, kept in ((False, packed.config["num_hidden_layers"]), (True, 1)):
        found, others = train(models, tmp_path / f"other-{kept}", on_disk=on_disk, kept=kept)
        assert_equal(found, want)
        assert others == norms


@pytest.mark.usefixtures("cpu_policy")  # a GPU keeps packed weights, which have no gradient
@pytest.mark.parametrize("kind", mostly_slow(KINDS, "llama", "biased", "qwen3_5_text"))
def test_gradients_are_those_of_one_graph(tmp_path: Path, kind: str) -> None:
    """Block by block, gradients are what MLX gives of the whole dense model: a scale's is the sum
    over its group of integer times the weight's; those of norms and of layers' biases are theirs.
    """
    teacher, packed = pair(tmp_path, kind)
    source = kept_targets(teacher, packed, tmp_path / "targets")
    batches = source.micro_batches(text(), recipe(packed), 0)
    model = load.resident_model(packed, mx.float32)

    def plain(model: nn.Module, *batch: mx.array) -> mx.array:
        tokens, mask, ids, shares = batch
        z = model(tokens).reshape(mask.size, -1)
        log_q = z - mx.logsumexp(z, axis=1, keepdims=True)
        return -((shares * mx.take_along_axis(log_q, ids, 1)).sum(1) * mask).sum()

    summed: dict[str, mx.array] = {}
    for batch in batches:
        _, grads = nn.value_and_grad(model, plain)(model, *batch)
        for name, gradient in tree_flatten(grads):
            summed[name] = summed.get(name, mx.array(0.0)) + gradient
    student = BlockStudent(packed, "scales")
    student.begin()
    _, found = students.gradients_of(student, batches, source.loss)
    for path, kind_of_format in packed_format.formats(packed).items():
        if not path.startswith("model.layers."):
            continue
        groups = summed.pop(f"{path}.weight").reshape(*found[f"{path}.biases"].shape, -1)
        assert kind_of_format.group == groups.shape[-1]
        words = lazy(packed.tensors, [f"{path}.weight"])[f"{path}.weight"]
        levels = rounding.unpacked(words, kind_of_format.bits)
        near(found.pop(f"{path}.biases"), groups.sum(axis=-1))
        near(found.pop(f"{path}.scales"), (groups * levels.reshape(groups.shape)).sum(axis=-1))
    assert "model.norm.weight" in found
    assert (kind in ("biased", "qwen2")) == any(name.endswith(".bias") for name in found)
    for name, gradient in found.items():
        near(gradient, summed[name])


def near(found: mx.array, want: mx.array) -> None:
    """To a thousandth of the largest."""
    largest = float(mx.abs(want).max())
    np.testing.assert_allclose(np.array(found), np.array(want), atol=1e-3 * largest)


@pytest.mark.thorough
def test_a_checkpoint_of_one_goes_on_in_the_other(tmp_path: Path) -> None:
    """Begun in memory and ended on disk, and the other way round."""
    models = pair(tmp_path, "llama")
    want, _ = train(models, tmp_path / "whole", on_disk=False)
    for first in (False, True):
        place = tmp_path / f"from-{first}"
        with pytest.raises(students.Killed):
            train(models, place, stop=2, on_disk=first)
        assert_equal(train(models, place, on_disk=not first)[0], want)


def test_a_file_of_a_step_never_changes(tmp_path: Path) -> None:
    """Checkpoints share their files with the state, without a copy, and keep their bytes while the
    state goes on; no unit has more than one file in the state.
    """
    models = pair(tmp_path, "llama")
    place = tmp_path / "run"
    with pytest.raises(students.Killed):
        train(models, place, stop=2, on_disk=True)
    step = place / "steps" / "step-00000002"
    kept = {path.name: sha256(path) for path in step.glob("model-*")}
    files = list((place / HIDDEN).iterdir())
    shared = {path.stat().st_ino for path in step.glob("model-*")}
    assert {path.stat().st_ino for path in files} == shared
    train(models, place, on_disk=True)
    assert {path.name: sha256(path) for path in step.glob("model-*")} == kept
    units = models[1].config["num_hidden_layers"] + 1  # blocks, and the final norm
    assert len(list((place / HIDDEN).iterdir())) == units == len(kept)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


OTHERS = [5 / 64, 22 / 64, 31 / 64, 40 / 64, 63 / 64]


# Shares of the way: in a step's update, its checkpoint, and between them.
@pytest.mark.parametrize(
    "share", mostly_slow([n / 64 for n in range(1, 65)], 49 / 64, thorough=OTHERS)
)
def test_ended_anywhere_it_comes_to_the_same_bytes(tmp_path: Path, share: float) -> None:
    """The process ends at some operation of the disk; the next one sweeps, goes on, and ends with
    the same bytes, which the newest checkpoint holds too.
    """
    models = pair(tmp_path, "llama")
    kept_targets(*models, tmp_path / "targets")
    with breaking(0, KILLED) as operations:
        want, _ = train(models, tmp_path / "whole", on_disk=True)
    place = tmp_path / "cut"
    at = max(1, round(share * len(operations)))
    with pytest.raises(Killed), breaking(at, KILLED):
        train(models, place, on_disk=True)
    if place.exists():
        protocol.sweep(place)
    assert_equal(train(models, place, on_disk=True)[0], want)
    last = protocol.newest(place / "steps")
    assert last
    whole = tmp_path / "whole" / "steps" / last.path.name
    for path in last.path.glob("*.safetensors"):
        assert sha256(path) == sha256(whole / path.name)


def test_a_full_disk_is_a_sentence_and_costs_no_step(tmp_path: Path) -> None:
    """The disk fills up in the update of a step: both numbers; with room again the run goes on from
    its checkpoint to the same bytes.
    """
    models = pair(tmp_path, "llama")
    want, _ = train(models, tmp_path / "whole", on_disk=True)
    with disks.small_disk(tmp_path / "disk") as sized:
        place = sized(20_000) / "run"
        with pytest.raises(students.Killed):
            train(models, place, stop=1, on_disk=True)
        used = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        sized(used // 1024)
        with pytest.raises(MisError, match="Not enough disk space in .* needs .* free; "):
            train(models, place, on_disk=True)
        sized(20_000)
        assert_equal(train(models, place, on_disk=True)[0], want)


@pytest.mark.thorough
def test_the_peak_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Twelve blocks on disk take what four take, and the inputs of eight more, which are a
    sixteenth of their states.
    """
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
    seen = []
    for layers in (4, 12):
        place = tmp_path / str(layers)
        teacher, packed = pair(place, "llama", **sizes, num_hidden_layers=layers)
        source = kept_targets(teacher, packed, place / "targets")
        with peaks.of_mlx() as peak:
            student = scaled(packed, place, on_disk=True)
            student.begin()
            for _ in source.steps(student, text(), recipe(packed)):
                memory.give_back(cache=False)
        seen.append(peak.nbytes)
    states = sum(array.nbytes for array in everything(student).values()) * 8 / 12
    assert seen[1] - seen[0] < states / 4
