"""What tests of students share: batches of random targets, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.compute.slab_losses import sparse_kl_gradients
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import targets
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.distillation.targets import KeptTargets
from mis_mlx.distillation.train_loop import Update
from mis_mlx.models.architectures.families import family
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, Step
from tests import tiny

LOSS = sparse_kl_gradients
KEPT = 6  # tokens of a target


class Killed(BaseException):
    """Stands for the end of the process: no `except` and no clean-up gets past it."""


def micro_batches(step: int, count: int = 3, windows: int = 2) -> list[tuple[mx.array, ...]]:
    """Tokens (B, 16), an uneven mask (of the second one empty), ids and shares of targets."""
    made: list[tuple[mx.array, ...]] = []
    for b in range(count):
        keys = mx.random.split(mx.random.key(100 * step + b), 4)
        n = windows * 16
        loss_mask = (mx.random.uniform(shape=(n,), key=keys[0]) < 0.7) * float(b != 1)
        tokens = mx.random.randint(0, 512, (windows, 16), key=keys[1])
        ids = mx.random.randint(0, 512, (n, KEPT), key=keys[2])
        shares = mx.softmax(mx.random.normal((n, KEPT), key=keys[3]), axis=1)
        made.append((tokens, loss_mask, ids, shares))
    return made


def schedule(iters: int) -> Any:
    return tiny.schedule(iters, 1e-2, 2)


def facts(steps: list[Step]) -> list[tuple[float, ...]]:
    return [(s.number, s.loss, s.grad_norm, s.learning_rate, s.tokens) for s in steps]


def gradients_of(
    student: BlockStudent, batches: list[tuple[mx.array, ...]], loss: Any = LOSS
) -> tuple[float, dict[str, mx.array]]:
    """(a step's loss, the gradients of all that learns, by name in the whole model)."""
    found = dict[str, mx.array]()

    def seen(unit: str, module: object, gradients: dict[str, mx.array], *_: object) -> Any:
        found.update({unit + name: gradient for name, gradient in gradients.items()})
        return 0.0, ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "_update", seen)
        looked = student.look(batches, loss)
        student.apply(looked, Update(noise=1.0, rate=0.0, batch=1))
    return looked.loss, found


def run(
    made: BlockStudent,
    steps: Path,
    training: Callable[[BlockStudent, int], Iterator[Step]],
    *,
    every: int = 1,
    last: int | None = None,
    stop: int | None = None,
) -> list[Step]:
    """What a command does: begin, or go on from the newest checkpoint in `steps`, and save `every`
    steps and after step `last`; killed after step `stop`, saved or not.
    """

    def save(number: int) -> None:
        arrays = {key: named for key, named in made.arrays().items() if named}
        state = {"arrays": list(arrays), "memory": made.memory()}
        protocol.save_step(steps, number, arrays, state)

    start = 0
    if saved := protocol.newest(steps):
        arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
        made.restore({"optimizer": {}, **arrays}, saved.state["memory"])
        start = saved.number
    else:
        made.begin()
        DISK.make_folder(steps)
        save(0)
    done = list[Step]()
    for step in training(made, start):
        done.append(step)
        if step.number % every == 0 or step.number == last:
            save(step.number)
        if step.number == stop:
            raise Killed
    return done


def kept(teacher: Checkpoint, data: Windows, recipe: Any, folder: Path, **how: Any) -> KeptTargets:
    """The teacher's targets for all steps of a recipe, in a new folder."""
    visited = targets.visited_windows(data, recipe)
    store = targets.write_store(teacher, data.pick(visited), folder, **how)
    return KeptTargets(store, visited, family(teacher.config).softcap)
