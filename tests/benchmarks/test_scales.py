"""Trials of scales that learn: a part of them, and runs that are branches of one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx.distillation import packed_student, pipeline
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.types import Checkpoint
from tests.distillation.test_packed_student import pair, text
from tests.test_docs import program

scales = program(Path(__file__).resolve().parents[2] / "benchmarks/scales.py")


def learning(teacher: Checkpoint, packed: Checkpoint, iters: int) -> Any:
    """Some large steps at a constant rate, which falls in the end."""
    recipe = pipeline.tuning_recipe(DistillationConfig(), packed, iters, 1e-2)
    constant = scales.ConstantRate(**{f.name: getattr(recipe, f.name) for f in fields(recipe)})
    student = scales.PartlyLearning(packed, packed.config["num_hidden_layers"])
    return scales.Learning(student, scales.KnownTeacher(teacher), text(), constant)


def values(student: packed_student.PackedStudent) -> dict[str, np.ndarray]:
    """What a student has learned."""
    return {name: np.array(array) for name, array in student.learned().items()}


def test_what_does_not_learn_stays_to_the_bit(tmp_path: Path) -> None:
    """Scales alone: all of them change, and neither a bias nor a norm."""
    teacher, packed = pair(tmp_path, "llama")
    run = learning(teacher, packed, 3)
    run.student.learns = ("scales",)
    before = values(run.student)
    assert len(run.steps(0, 3)) == 3
    changed = {name for name, array in values(run.student).items() if (array != before[name]).any()}
    assert changed == {name for name in before if name.endswith(".scales")}


def test_a_branch_is_the_run_made_alone(tmp_path: Path) -> None:
    """A trunk whose rate fell once before gives the same bits, and the last losses, too."""
    teacher, packed = pair(tmp_path, "llama")
    trunk = scales.Trunk()
    short = learning(teacher, packed, 4)
    assert len(short.branch(trunk)) == 4
    assert trunk.steps == 3
    long = learning(teacher, packed, 8)
    branched = long.branch(trunk)
    alone = learning(teacher, packed, 8)
    whole = alone.steps(0, 8)
    assert branched == whole[3:]
    ended = values(long.student)
    assert all(np.array_equal(array, ended[name]) for name, array in values(alone.student).items())
    assert whole[-1] != whole[0]
