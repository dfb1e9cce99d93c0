"""Scales that learn block by block: the same bytes in every residency and place, in little memory,
after any end of the process too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import product
from pathlib import Path

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
from mis_mlx.models.architectures.families import mixture
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format, scale_state
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK, Files
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import lazy
from mis_mlx.types import Checkpoint, MisError
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


def kept_targets(teacher: Checkpoint, packed: Checkpoint, folder: Path) -> targets.KeptTargets:
    """The teacher's targets for `text`, every token in them."""
    return students.kept(teacher, text(), recipe(packed), folder, top=512)


class Trained:
    """A student on its way, with checkpoints in `place`. on_disk: its scales are in files."""

    def __init__(
        self,
        teacher: Checkpoint,
        packed: Checkpoint,
        place: Path,
        *,
        on_disk: bool,
        kept: int = 0,
        files: Files = DISK,
    ):
        self.state: scale_state.LearnedState = scale_state.InMemory()
        if on_disk:
            self.state = scale_state.OnDisk(place / HIDDEN, files)
        self.student = BlockStudent(packed, "scales", kept=kept, state=self.state)
        self.norms: list[float] = []
        self._source = kept_targets(teacher, packed, teacher.path.with_name("targets"))
        self._recipe = recipe(packed)
        self._steps = place / "steps"
        self._files = files

    def run(self, until: int | None = None) -> Everything:
        """All steps from the newest checkpoint on, a checkpoint after each; what it has then.

        until: the last step to make.
        """
        start = 0
        saved = protocol.newest(self._steps, self._files)
        if saved:
            start = saved.number
            arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
            self.student.restore(arrays, saved.state["optimizer"])
        else:
            self.student.begin()
            self._files.make_folder(self._steps)
            self.save(0)
        for step in self._source.steps(self.student, text(), self._recipe, start):
            self.norms.append(step.grad_norm)
            self.save(step.number)
            if step.number == until:
                break
        return everything(self.student)

    def save(self, number: int) -> None:
        arrays = {key: named for key, named in self.student.arrays().items() if named}
        state = {"arrays": list(arrays), "optimizer": self.student.memory()}
        protocol.save_step(self._steps, number, arrays, state, files=self._files)


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
    teacher, packed = pair(tmp_path, kind)
    layers = packed.config["num_hidden_layers"]
    in_memory = Trained(teacher, packed, tmp_path / "memory", on_disk=False)
    in_memory.student.begin()
    before = everything(in_memory.student)
    want = in_memory.run()
    assert sum(name.endswith(".scales.m") for name in want)
    assert sum(name.endswith(".scales") for name in want) == len(
        [path for path in packed_format.formats(packed) if path.startswith("model.layers.")]
    )
    values = [name for name in before if name in packed.tensors]
    assert not [name for name in values if np.array_equal(before[name], want[name])]
    for on_disk, kept in ((False, layers), (True, 1)):
        other = Trained(teacher, packed, tmp_path / f"other-{kept}", on_disk=on_disk, kept=kept)
        assert_equal(other.run(), want)
        assert other.norms == in_memory.norms
        for name in values:
            learned = other.student.learned(name)
            assert learned is not None
            assert np.array_equal(np.array(learned), want[name])
        assert other.student.learned("model.embed_tokens.scales") is None


@pytest.mark.usefixtures("cpu_policy")  # a GPU keeps packed weights, which have no gradient
@pytest.mark.parametrize("kind", mostly_slow(KINDS, "llama", "biased", "qwen3_5_text"))
def test_gradients_are_those_of_one_graph(tmp_path: Path, kind: str) -> None:
    """Block by block, gradients are what MLX gives of the whole dense model: a scale's is the sum
    over its group of integer times the weight's, a norm's is its own.
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
        groups = summed[f"{path}.weight"].reshape(*found[f"{path}.biases"].shape, -1)
        near(found[f"{path}.biases"], groups.sum(axis=-1))
        assert kind_of_format.group == groups.shape[-1]
    norms = [name for name in found if "norm" in name]
    assert "model.norm.weight" in norms
    for name in norms:
        near(found[name], summed[name])


def near(found: mx.array, want: mx.array) -> None:
    """To a thousandth of the largest."""
    largest = float(mx.abs(want).max())
    np.testing.assert_allclose(np.array(found), np.array(want), atol=1e-3 * largest)


@pytest.mark.thorough
def test_a_checkpoint_of_one_goes_on_in_the_other(tmp_path: Path) -> None:
    """Begun in memory and ended on disk, and the other way round."""
    teacher, packed = pair(tmp_path, "llama")
    want = Trained(teacher, packed, tmp_path / "whole", on_disk=False).run()
    for first in (False, True):
        place = tmp_path / f"from-{first}"
        Trained(teacher, packed, place, on_disk=first).run(until=2)
        assert_equal(Trained(teacher, packed, place, on_disk=not first).run(), want)


def test_a_file_of_a_step_never_changes(tmp_path: Path) -> None:
    """Checkpoints share their files with the state, without a copy, and keep their bytes while the
    state goes on; no unit has more than one file in the state.
    """
    teacher, packed = pair(tmp_path, "llama")
    trained = Trained(teacher, packed, tmp_path / "run", on_disk=True)
    trained.run(until=2)
    step = tmp_path / "run" / "steps" / "step-00000002"
    written = trained.state.entries()
    for key, file in written.items():
        assert file.path.samefile(step / f"{key}.safetensors")
    hashes = {path.name: sha256(path) for path in step.glob("model-*")}
    trained.run()
    assert {path.name: sha256(path) for path in step.glob("model-*")} == hashes
    units = packed.config["num_hidden_layers"] + 1  # blocks, and the final norm
    assert len(list((tmp_path / "run" / HIDDEN).iterdir())) == units == len(hashes)


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
    teacher, packed = pair(tmp_path, "llama")
    kept_targets(teacher, packed, teacher.path.with_name("targets"))
    with breaking(0, KILLED) as operations:
        want = Trained(teacher, packed, tmp_path / "whole", on_disk=True).run()
    place = tmp_path / "cut"
    at = max(1, round(share * len(operations)))
    with pytest.raises(Killed), breaking(at, KILLED):
        Trained(teacher, packed, place, on_disk=True).run()
    if place.exists():
        protocol.sweep(place)
    assert_equal(Trained(teacher, packed, place, on_disk=True).run(), want)
    last = protocol.newest(place / "steps")
    assert last
    whole = tmp_path / "whole" / "steps" / last.path.name
    for path in last.path.glob("*.safetensors"):
        assert sha256(path) == sha256(whole / path.name)


def test_a_full_disk_is_a_sentence_and_costs_no_step(tmp_path: Path) -> None:
    """The disk fills up in the update of a step: both numbers; with room again the run goes on from
    its checkpoint to the same bytes.
    """
    teacher, packed = pair(tmp_path, "llama")
    want = Trained(teacher, packed, tmp_path / "whole", on_disk=True).run()
    with disks.small_disk(tmp_path / "disk") as sized:
        place = sized(20_000) / "run"
        Trained(teacher, packed, place, on_disk=True).run(until=1)
        used = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        sized(used // 1024)
        with pytest.raises(MisError, match="Not enough disk space in .* needs .* free; "):
            Trained(teacher, packed, place, on_disk=True).run()
        sized(20_000)
        assert_equal(Trained(teacher, packed, place, on_disk=True).run(), want)


@pytest.mark.thorough
def test_the_peak_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Twelve blocks take what four take, and the inputs of eight more; in memory they take eight
    more states.
    """
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024, "dtype": "F32"}
    peak: dict[tuple[int, bool], int] = {}
    learning = 0
    for layers in (4, 12):
        place = tmp_path / str(layers)
        config = {**sizes, "num_hidden_layers": layers}
        teacher = load.open_checkpoint(tiny.make(place / "teacher", **config))
        plan = packed_format.formats_of(teacher.config, 32)
        packed_format.write_quantized(teacher, place / "packed", plan, DISK)
        packed = load.open_checkpoint(place / "packed")
        source = kept_targets(teacher, packed, place / "targets")
        for on_disk in (False, True):
            seen = peaks.Peak()
            state: scale_state.LearnedState = scale_state.InMemory()
            if on_disk:
                state = scale_state.OnDisk(place / HIDDEN, DISK)
            student = BlockStudent(packed, "scales", state=state)
            student.begin()
            for _ in source.steps(student, text(), recipe(packed)):
                memory.give_back(cache=False)
            del student
            peak[layers, on_disk] = mx.get_peak_memory() - seen._before
            learning = sum(array.size for array in state.values("model.layers.0.").values())
            del state
    state_bytes = 8 * 12 * learning
    # Inputs are a sixteenth of that; when the next block is read differs from pass to pass.
    assert peak[12, True] - peak[4, True] < state_bytes / 4
    assert peak[12, False] - peak[4, False] > 0.8 * state_bytes
