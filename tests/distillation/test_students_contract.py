"""What every student that learns must hold, whatever of it is in memory: killed after any step it
ends the same, a bad batch changes nothing, a factor scales the gradient alone.

RESIDENCIES lists them; a new one is covered by standing there. That one computes what another does
is in test_block_student.py and test_scales.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.distillation import train_loop
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.quantization import scale_state
from mis_mlx.types import Checkpoint, Step
from tests import tiny
from tests.distillation.students import LOSS, Killed, facts, micro_batches, run, schedule
from tests.distillation.test_scales import everything

LAYERS = 3
ITERS = 5
batches = partial(micro_batches, count=2, windows=1)  # of a step


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three small blocks of floats."""
    folder = tmp_path_factory.mktemp("students") / "dense"
    made = tiny.make(folder, num_hidden_layers=LAYERS, intermediate_size=128)
    return load.open_checkpoint(made)


@pytest.fixture(scope="module")
def packed(dense: Checkpoint) -> Checkpoint:
    """The same in 4 bits."""
    folder = dense.path.with_name("packed")
    return tiny.packed(dense, folder, 32)


def blocks(place: Path, dense: Checkpoint, packed: Checkpoint, *, each: int) -> BlockStudent:
    """Blocks of floats, so many in memory for two steps."""
    parts = model_writer.by_block(dense, place / "parts")
    return BlockStudent(parts, "weights", at_once=each, steps_each=2)


def scales(
    place: Path, dense: Checkpoint, packed: Checkpoint, *, kept: int, on_disk: bool
) -> BlockStudent:
    """Packed blocks, of which so many are kept."""
    state: scale_state.LearnedState = scale_state.InMemory()
    if on_disk:
        state = scale_state.OnDisk(place / ".tmp-scales-1")
    return BlockStudent(packed, "scales", kept=kept, state=state)


RESIDENCIES: dict[str, Callable[[Path, Checkpoint, Checkpoint], BlockStudent]] = {
    "all blocks": partial(blocks, each=LAYERS),
    "some blocks": partial(blocks, each=1),
    "packed": partial(scales, kept=1, on_disk=False),
    "packed, on disk": partial(scales, kept=0, on_disk=True),
}
Student = Callable[[Path], BlockStudent]


@pytest.fixture(params=RESIDENCIES)
def student(request: pytest.FixtureRequest, dense: Checkpoint, packed: Checkpoint) -> Student:
    """`student(place)`: a new one, or the one whose checkpoints lie there."""
    return lambda place: RESIDENCIES[request.param](place, dense, packed)


def training(made: BlockStudent, start: int) -> Iterator[Step]:
    """The steps from `start` on."""
    return train_loop.steps(made, batches, LOSS, schedule(ITERS), start)


def outcome(place: Path, made: BlockStudent) -> dict[str, Any]:
    """What was learned and its moments, and the bytes of blocks that lie on disk."""
    found: dict[str, Any] = {name: array.tolist() for name, array in everything(made).items()}
    for path in sorted((place / "parts").rglob("*")):
        found[path.name] = path.read_bytes()
    return found


def test_killed_after_any_step_it_ends_the_same(student: Student, tmp_path: Path) -> None:
    """Saved or not, one kill after the other: the same steps, weights and moments."""
    made = student(tmp_path / "whole")
    steps = run(made, tmp_path / "whole" / "steps", training)
    wanted = outcome(tmp_path / "whole", made)
    place = tmp_path / "killed"
    go = partial(run, steps=place / "steps", training=training, every=2, last=ITERS)
    for stop in range(1, ITERS):
        with pytest.raises(Killed):
            go(student(place), stop=stop)
    rest = go(made := student(place))
    assert facts(rest) == facts(steps)[4:]
    assert outcome(place, made) == wanted


def test_a_batch_of_no_numbers_changes_nothing(student: Student, tmp_path: Path) -> None:
    """It is noted, the steps around it learn, and nothing is left that is not a number."""

    def poisoned(number: int) -> list[tuple[mx.array, ...]]:
        made = batches(number)
        return [(*rest, target * math.nan) for *rest, target in made] if number == 2 else made

    seen = list[dict[str, np.ndarray]]()
    made = student(tmp_path)
    made.begin()
    notes = []
    for step in train_loop.steps(made, poisoned, LOSS, schedule(4)):
        notes.append(step.note)
        seen.append(everything(made))
    assert [("not a number" in note) for note in notes] == [False, False, True, False]
    same = seen[1].keys() & seen[2].keys()  # of blocks in turn the next ones begin
    assert all(np.array_equal(seen[1][name], seen[2][name]) for name in same)
    assert any(not np.array_equal(seen[2][n], seen[3][n]) for n in seen[2].keys() & seen[3].keys())
    assert all(np.isfinite(array).all() for array in seen[3].values())


def test_a_factor_scales_the_gradient_not_the_loss(
    student: Student, dense: Checkpoint, packed: Checkpoint, tmp_path: Path
) -> None:
    """Eq. (2)'s (1 + eps): the norm grows by it, the loss reported is the plain one. What learns
    has its name in the whole model, and .m or .v behind it where it is a moment.
    """
    steps = []
    for factor in (1.0, 1.1):
        made = student(tmp_path / str(factor))
        made.begin()
        steps += train_loop.steps(made, batches, LOSS, schedule(1), factor=lambda _, f=factor: f)
    plain, windy = steps
    assert windy.loss == plain.loss
    assert windy.grad_norm == pytest.approx(1.1 * plain.grad_norm, rel=1e-5)
    names = {name.removesuffix(".m").removesuffix(".v") for name in everything(made)}
    weights = {name for name in names if name.startswith("model.") and name.endswith("t")}
    assert weights
    assert weights <= dense.tensors.keys() | packed.tensors.keys()
