"""What a run plans, where the sizes of its student are not one for all blocks, or not known yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import distill, plan
from mis_mlx.compute import precision
from mis_mlx.distillation import run_plan
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, tiny
from tests.conftest import mostly_thorough

SMALL: dict[str, Any] = {
    "scenario": "none",
    "vocab": "512",
    "iters": 4,
    "num_samples": 2,
    "max_seq_length": 32,
    "reconstruct_samples": 8,
    "eval_windows": 2,
    "learning_rate": 1e-4,
    "quantize": 0,
}
HIGH: dict[str, Any] = {"target": "conditions", "temperature_c": 8.0, "altitude_m": 6000.0}
LOW: dict[str, Any] = {"target": "conditions", "temperature_c": 8.0, "altitude_m": 100.0}


@pytest.mark.parametrize("policy", mostly_thorough(["cpu", "metal"], "cpu"))
@pytest.mark.usefixtures("brief_look")
def test_a_student_as_wide_as_its_teacher_in_one_block_is_repaired_and_trained(
    policy: str,
    llama: Checkpoint,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its plan has the teacher's shape, and still there is something to repair and to learn."""
    monkeypatch.setenv(precision.POLICY, policy)
    out = tmp_path / "run"
    asked = distill.Settings(
        teacher=str(llama.path), data=str(text_folder), out=str(out), **SMALL, **HIGH
    )
    result = distill.run(asked)
    before = shape_of(llama.config).ffn
    student = load.open_checkpoint(out / "model").config
    widths = [family(student).ffn_size(i) for i in range(shape_of(student).layers)]
    assert min(widths) < before
    assert result["mode"] == "blocks"
    lines = (out / run_folder.PHASES).read_text().splitlines()
    phases = [json.loads(line).get("phase") for line in lines]
    assert {"repair", "distil"} <= set(phases)
    assert result["kl_student"] < result["kl_pruned"]


@pytest.mark.usefixtures("brief_look", "metal")
def test_a_packed_student_is_refused_before_anything_begins(
    llama: Checkpoint, text_folder: Path, tmp_path: Path
) -> None:
    """Its integers cannot learn, and what is written would not open."""
    packed = family_checks.quantized(llama.path, tmp_path / "packed", target_bpw=None)
    out = tmp_path / "run"
    flags = {**SMALL, "scenario": None, "vocab": None, "quantize": 1}
    flags |= {"teacher": str(llama.path), "student": str(packed.path)}
    asked = distill.Settings(data=str(text_folder), out=str(out), **flags)
    for settings in (asked, replace(asked, dry_run=True)):
        with pytest.raises(MisError, match="packed is quantized already"):
            distill.run(settings)
    with pytest.raises(MisError, match="packed is quantized already"):
        plan.run(plan.Settings(teacher=str(llama.path), student=str(packed.path)))
    assert not out.exists()


@pytest.mark.parametrize("kind", mostly_thorough(["llama", "qwen3_moe"]))
def test_the_plan_holds_what_the_conditions_may_give(
    kind: str, models: Callable[[str], Checkpoint], text_folder: Path, tmp_path: Path
) -> None:
    """Thin air cuts less than the scenario: the student is not wider than planned."""
    sizes = {**tiny.CONFIG, **{**tiny.KINDS, **tiny.FAMILIES}[kind]}
    wide = {"intermediate_size": 1536, "moe_intermediate_size": 1536}
    wider = {key: value for key, value in wide.items() if key in sizes}
    path = tiny.make(tmp_path / "teacher", **{**sizes, **wider, "num_hidden_layers": 3})
    teacher = load.open_checkpoint(path)
    flags = {**SMALL, **LOW, "ffn": 256, "scenario": None}
    asked = distill.Settings(
        teacher=str(path), data=str(text_folder), out=str(tmp_path / "run"), **flags
    )
    _, plan = run_plan.resolve(asked, {}, teacher, None)
    planned = plan.job.student
    distill.run(asked)
    made = shape_of(load.open_checkpoint(tmp_path / "run" / "model").config)
    assert 256 < made.ffn <= planned.shape.ffn <= 1536
