"""Scales that learn with their state on disk: the same bytes as in memory, after any end of the
process too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute.precision import POLICY
from mis_mlx.distillation import live_teacher, packed_student
from mis_mlx.hardware import memory
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format, scale_state
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK, Files
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import lazy
from mis_mlx.types import Checkpoint, MisError
from tests import disks, peaks, tiny
from tests.conftest import mostly_slow
from tests.distillation.test_packed_student import KINDS, pair, recipe, text
from tests.faults.broken import KILLED, Killed, breaking

SHOWN = (("llama", "cpu"),)
HIDDEN = ".tmp-scales-1"  # of a process that is gone, for whoever comes next
Everything = dict[str, np.ndarray]


class Trained:
    """A student on its way, with checkpoints in `place`. held: None for a state in memory."""

    def __init__(
        self,
        teacher: Checkpoint,
        packed: Checkpoint,
        place: Path,
        *,
        held: int | None,
        kept: int = 0,
        files: Files = DISK,
    ):
        self.state: scale_state.ScaleState = scale_state.InMemory()
        if held is not None:
            self.state = scale_state.OnDisk(place / HIDDEN, held, files)
        self.student = packed_student.PackedStudent(packed, kept, state=self.state)
        self.norms: list[float] = []
        self._source = live_teacher.StreamedTeacher(teacher, None)
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
            self._files.make_folder(self._steps)
            self.save(0)
        steps = live_teacher.steps(self.student, self._source, text(), self._recipe, start)
        for step in steps:
            self.norms.append(step.grad_norm)
            self.save(step.number)
            if step.number == until:
                break
        return everything(self.student)

    def save(self, number: int) -> None:
        arrays = self.student.arrays()
        state = {"arrays": list(arrays), "optimizer": self.student.memory()}
        protocol.save_step(self._steps, number, arrays, state, files=self._files)


def everything(student: packed_student.PackedStudent) -> Everything:
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
        *SHOWN,
        thorough=[("lfm2", "cpu"), ("llama", "metal")],
        of_several=True,
    ),
)
def test_the_same_bytes_in_memory_and_on_disk(
    tmp_path: Path, kind: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, moments and the norms that the guard sees, with gradients of no block in memory and
    of all of them.
    """
    monkeypatch.setenv(POLICY, policy)
    teacher, packed = pair(tmp_path, kind)
    layers = packed.config["num_hidden_layers"]
    in_memory = Trained(teacher, packed, tmp_path / "memory", held=None)
    want = in_memory.run()
    assert sum(name.endswith(".scales.m") for name in want)
    for held, kept in ((0, 1), (layers, 0)):
        on_disk = Trained(teacher, packed, tmp_path / f"disk-{held}", held=held, kept=kept)
        assert_equal(on_disk.run(), want)
        assert on_disk.norms == in_memory.norms
        learned = on_disk.student.learned()
        assert {name: True for name in learned} == {name: name in want for name in learned}
        assert all(np.array_equal(np.array(learned[name]), want[name]) for name in learned)


@pytest.mark.thorough
def test_a_checkpoint_of_one_goes_on_in_the_other(tmp_path: Path) -> None:
    """Begun in memory and ended on disk, and the other way round."""
    teacher, packed = pair(tmp_path, "llama")
    want = Trained(teacher, packed, tmp_path / "whole", held=None).run()
    for first, then in ((None, 0), (0, None)):
        place = tmp_path / f"from-{first}"
        Trained(teacher, packed, place, held=first).run(until=2)
        assert_equal(Trained(teacher, packed, place, held=then).run(), want)


def test_a_file_of_a_step_never_changes(tmp_path: Path) -> None:
    """Checkpoints share their files with the state, without a copy, and keep their bytes while the
    state goes on; no block has more than one file in the state.
    """
    teacher, packed = pair(tmp_path, "llama")
    trained = Trained(teacher, packed, tmp_path / "run", held=0)
    trained.run(until=2)
    step = tmp_path / "run" / "steps" / "step-00000002"
    written = trained.state.entries()
    for key, file in written.items():
        assert file.path.samefile(step / f"{key}.safetensors")
    hashes = {path.name: sha256(path) for path in step.glob("block-*")}
    trained.run()
    assert {path.name: sha256(path) for path in step.glob("block-*")} == hashes
    layers = packed.config["num_hidden_layers"]
    assert len(list((tmp_path / "run" / HIDDEN).iterdir())) == layers == len(hashes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


OTHERS = [5 / 64, 22 / 64, 31 / 64, 40 / 64, 63 / 64]


# Shares of the way: in a step's gradients, its update, its checkpoint, and between them.
@pytest.mark.parametrize(
    "share", mostly_slow([n / 64 for n in range(1, 65)], 49 / 64, thorough=OTHERS)
)
def test_ended_anywhere_it_comes_to_the_same_bytes(tmp_path: Path, share: float) -> None:
    """The process ends at some operation of the disk; the next one sweeps, goes on, and ends with
    the same bytes, which the newest checkpoint holds too.
    """
    teacher, packed = pair(tmp_path, "llama")
    with breaking(0, KILLED) as operations:
        want = Trained(teacher, packed, tmp_path / "whole", held=1).run()
    place = tmp_path / "cut"
    at = max(1, round(share * len(operations)))
    with pytest.raises(Killed), breaking(at, KILLED):
        Trained(teacher, packed, place, held=1).run()
    if place.exists():
        protocol.sweep(place)
    assert_equal(Trained(teacher, packed, place, held=1).run(), want)
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
    want = Trained(teacher, packed, tmp_path / "whole", held=1).run()
    with disks.small_disk(tmp_path / "disk") as sized:
        place = sized(20_000) / "run"
        Trained(teacher, packed, place, held=1).run(until=1)
        used = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        sized(used // 1024)
        with pytest.raises(MisError, match="Not enough disk space in .* needs .* free; "):
            Trained(teacher, packed, place, held=1).run()
        sized(20_000)
        assert_equal(Trained(teacher, packed, place, held=1).run(), want)


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
        for on_disk in (False, True):
            held = 0 if on_disk else None
            seen = peaks.Peak()
            source = live_teacher.TextTargets()
            state: scale_state.ScaleState = scale_state.InMemory()
            if held is not None:
                state = scale_state.OnDisk(place / HIDDEN, held, DISK)
            student = packed_student.PackedStudent(packed, 0, state=state)
            for _ in live_teacher.steps(student, source, text(), recipe(packed)):
                memory.give_back(cache=False)
            del student
            peak[layers, on_disk] = mx.get_peak_memory() - seen._before
            learning = sum(array.size for array in state.values(0).values())
            del state
    state_bytes = 8 * 16 * learning
    # Inputs are a sixteenth of that; when the next block is read differs from pass to pass.
    assert peak[12, True] - peak[4, True] < state_bytes / 4
    assert peak[12, False] - peak[4, False] > 0.8 * state_bytes
