"""Students that nobody writes: what a pass in memory finds is what a folder would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import distill
from mis_mlx.distillation import pipeline, plan_report, run_plan
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing.stream import Stream
from mis_mlx.pruning import calibrate, select, slicing
from mis_mlx.quantization import format_costs, packed_format
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.size_search import size_request, unwritten
from mis_mlx.types import Checkpoint, KeptUnits
from tests import tiny
from tests.conftest import mostly_thorough
from tests.test_search import searched

CUT = select.PruningConfig(scenario="none", importance="rms")


def cut(teacher: Checkpoint, batches: list[mx.array], **sizes: int) -> tuple[Shape, KeptUnits]:
    """A smaller shape of a teacher, and what stays of it."""
    statistics, _ = calibrate.calibrate(teacher, batches)
    shape = arch.target_shape(teacher.config, {}, **sizes)
    return select.select_units(teacher.config, statistics, CUT, shape)


def mixed_formats(config: Any) -> dict[str, packed_format.Format]:
    """4, 5 and 8 bits in turn."""
    paths = packed_format.formats_of(config, 32)
    widths = (4, 5, 8)
    return {path: packed_format.Format(widths[i % 3], 32) for i, path in enumerate(paths)}


def same(own: unwritten.Running, other: Checkpoint, batches: list[mx.array]) -> None:
    """Final states and logits are those of the folder, to the bit."""
    stream, hidden = own
    theirs = Stream(other)
    for mine, wanted in zip(hidden, theirs.forward(batches), strict=True):
        assert mx.array_equal(mine, wanted)
    vocab = shape_of(other.config).vocab
    for (_, head), (_, wanted_head) in zip(
        stream.head_parts(vocab, 200), theirs.head_parts(vocab, 200), strict=True
    ):
        logits = load.wide_logits(head, hidden[0])
        assert mx.array_equal(logits, load.wide_logits(wanted_head, hidden[0]))


# In float32: a GPU multiplies packed matrices as they are, and half precision rounds elsewhere.
@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("kind", "fit"),
    mostly_thorough(
        product(("llama", "untied", "qwen3", "gemma3_text", "qwen3_5_text", "lfm2"), (False, True)),
        ("llama", True),
        ("untied", False),
        ("qwen3_5_text", True),
        of_several=True,
    ),
)
def test_rounded_in_memory_is_rounded_in_a_folder(
    kind: str,
    fit: bool,
    models: Callable[[str], Checkpoint],
    batches: list[mx.array],
    tmp_path: Path,
) -> None:
    """Blocks, embedding and head, in mixed formats: the same states and logits, and bytes."""
    teacher = models(kind)
    formats = mixed_formats(teacher.config)
    packed_format.write_quantized(teacher, tmp_path / "model", formats, fit=fit)
    model = compute_type.open_to_compute(tmp_path / "model", teacher.precision)
    student = unwritten.Student(teacher, shape_of(teacher.config), formats=formats, fit=fit)
    bare = unwritten.Student(teacher, shape_of(teacher.config))
    first, second = unwritten.passed(teacher, [bare, student], [batches, batches])
    same(first, teacher, batches)
    same(second, model, batches)


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("sizes", [{"layers": 2, "ffn": 512}, {"heads": 2}], ids=["ffn", "heads"])
def test_cut_in_memory_is_cut_in_a_folder(
    sizes: dict[str, int], llama: Checkpoint, batches: list[mx.array], tmp_path: Path
) -> None:
    """Blocks, neurons and heads: as pruned, and as pruned and rounded."""
    shape, keep = cut(llama, batches, **sizes)
    slicing.write_student(llama, shape, keep, tmp_path / "cut", dtype="bfloat16")
    pruned = compute_type.open_to_compute(tmp_path / "cut", llama.precision)
    formats = mixed_formats(pruned.config)
    packed_format.write_quantized(pruned, tmp_path / "model", formats, fit=True)
    model = compute_type.open_to_compute(tmp_path / "model", llama.precision)
    students = [
        unwritten.Student(llama, shape, keep),
        unwritten.Student(llama, shape, keep, formats),
    ]
    first, second = unwritten.passed(llama, students, [batches, batches])
    same(first, pruned, batches)
    same(second, model, batches)
    assert students[1].nbytes == model.nbytes


@pytest.mark.thorough
def test_bits_of_a_delta_rule(
    models: Callable[[str], Checkpoint],
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search finds them; those around the rule have no fewer than their floor. One whose rows no
    group divides is refused.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    narrow = models("qwen3_5_text")
    assert " 96 " in size_request.unsearchable(narrow.config)
    wide = {**tiny.MODELS["qwen3_5_text"], "linear_num_value_heads": 8}
    hybrid = load.open_checkpoint(tiny.make(tmp_path / "teacher", **wide))
    found = searched(hybrid, text_folder, tmp_path / "run", lose=0.01)
    assert found["best"].keys() <= {"scenario", "target_bpw", "vocab", "q_group_size"}
    least, _ = format_costs.limits(hybrid.config, QuantizationConfig(q_groups="one"))
    assert found["best"]["target_bpw"] >= least - 0.01


def whole_student(teacher: Path, text: Path, out: Path) -> distill.Settings:
    """Of a run that cuts nothing and rounds."""
    return distill.Settings(
        teacher=str(teacher),
        data=str(text),
        out=str(out),
        scenario="none",
        target_bpw=4.5,
        max_seq_length=32,
        num_samples=4,
        eval_windows=2,
        eval_prompts=0,
        q_iters=1,
    )


@pytest.mark.thorough
def test_a_student_that_is_not_cut_is_no_copy(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is rounded from the teacher's own files, to the bytes that a copy gives; the plan counts
    no disk for one.
    """
    teacher = tiny.make(tmp_path / "teacher", dtype="BF16")
    made = {}
    disk = {}
    for name in ("view", "copy"):
        if name == "copy":
            monkeypatch.setattr(pipeline, "view", lambda _: None)
        asked = whole_student(teacher, text_folder, tmp_path / name)
        distill.run(asked)
        made[name] = (tmp_path / name / "model" / "model.safetensors").read_bytes()
        disk[name] = {path.name for path in (tmp_path / name).iterdir() if path.is_dir()}
    assert made["view"] == made["copy"]
    assert disk == {"view": {"model"}, "copy": {"model", "pruned"}}
    _, plan = run_plan.resolve(asked, {}, load.open_checkpoint(teacher), None)
    assert plan.job.viewed
    copied = replace(plan, job=replace(plan.job, viewed=False))
    written = plan.job.student.nbytes
    assert plan_report.disk_bytes(copied) == plan_report.disk_bytes(plan) + written


def test_a_packed_teacher_is_copied_once(text_folder: Path, tmp_path: Path) -> None:
    """For rounding alone: what is measured beside the student is the teacher."""
    dense = load.open_checkpoint(tiny.make(tmp_path / "dense", dtype="BF16"))
    teacher = tmp_path / "teacher"
    formats = packed_format.formats_of(dense.config, 32)
    packed_format.write_quantized(dense, teacher, formats)
    out = tmp_path / "run"
    distill.run(whole_student(teacher, text_folder, out).with_values(keep_steps=True))
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert "pruned" in folders
    assert not folders & {"distilled", "parts"}
