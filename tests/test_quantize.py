"""The command `quantize`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation.block_student import BlockStudent, scales_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import INTEGERS, WINDOWS
from mis_mlx.maths import gptq
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing import mlx_generate
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.quantization import packed_format, stage
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import GIB, Budget, Checkpoint
from tests import peaks, tiny
from tests.conftest import Done, last_line, mostly_slow
from tests.distillation import students
from tests.peaks import allocated


def test_end_to_end(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """As a user runs it: JSON on the last line, and a folder that stock mlx-lm opens and speaks
    from.
    """
    out = tmp_path / "q4"
    brief = ("--num-samples", 4, "--max-seq-length", 64, "--q-group-size", 32)
    done = command("quantize", "--model", llama.path, "--mlx-path", out, *brief)
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    packed = load.open_checkpoint(out)
    assert result["nbytes"] == packed.nbytes < llama.nbytes / 4
    assert result["group_size"] == 32
    assert f"{packed.nbytes / 1e6:.1f} MB" in done.stderr
    assert 4 < result["bits_per_weight"] < 7
    model, tokenizer = mlx_generate.open_model(compute_type.open_to_compute(out))
    assert len(list(mlx_generate.greedy(model, tokenizer.encode("The with statement"), 4))) == 4


@pytest.mark.parametrize(
    "asked",
    [("quantize", "--max-seq-length", 32), ("prune", "--scenario", "half-ffn")],
    ids=lambda asked: asked[0],
)
def test_no_phase_holds_the_tokenizer(
    tmp_path: Path,
    llama: Checkpoint,
    text_folder: Path,
    in_process: Callable[..., Done],
    asked: tuple[object, ...],
) -> None:
    """With 152 thousand tokens it takes 200 MiB of a budget, and no plan counts it."""
    name, *flags = asked
    paths = ("--model", llama.path, "--data", text_folder, "--mlx-path", tmp_path / "made")
    done = in_process(name, *paths, *flags, "--num-samples", 2)
    assert done.returncode == 0, done.stderr
    assert not load.opened_tokenizer.cache_info().currsize


FOUR = QuantizationConfig(target_bpw=None)


@pytest.mark.parametrize(
    "kind",
    mostly_slow(product((1024, 512), ("F32", "BF16")), (512, "BF16"), thorough=[(1024, "F32")]),
)
def test_gptq_stays_under_the_plan(
    tmp_path: Path, kind: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLX and numpy hold together is under the plan, and not by more than a factor of four."""
    ffn, dtype = kind
    sizes = {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": ffn,
        "vocab_size": 8192 if ffn == 512 else 512,
    }
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", dtype=dtype, **sizes))
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    planned = stage.quantizing_cost(model_of(checkpoint), FOUR, windows=6, length=64, limit=GIB)
    assert planned.stays[WINDOWS] == 6
    assert planned.scratch_bytes == 0
    mx.eval(batches)
    before = mx.get_active_memory()
    parts = (gptq, "factorize"), (gptq, "rounded")
    with (
        memory.limited(Budget(before + planned.peak_bytes)),
        peaks.counted(monkeypatch, *parts) as peak,
    ):
        mx.set_cache_limit(0)
        stage.quantize(
            checkpoint, tmp_path / "q4", rounding=FOUR, files=DISK, batches=batches, held=6
        )
    assert planned.peak_bytes / 4 < peak.nbytes < allocated(planned.peak_bytes)
    assert packed_format.formats_of(checkpoint.config, 64)


@pytest.mark.thorough
def test_sensitivity_and_steps_stay_under_the_plan(tmp_path: Path) -> None:
    """MLX's peak of either, under what the plan says, and not by more than a factor of four."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 4096}
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", dtype="F32", **sizes))
    m = model_of(checkpoint)
    how = QuantizationConfig(q_method="round", target_bpw=4.6, q_iters=2)
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    job = DistillationSpec(
        teacher=m,
        student=m,
        iters=2,
        batch_size=1,
        max_seq_length=64,
        num_samples=6,
        save_every=2,
        rounding=how,
    )
    rounding = stage.quantizing_cost(m, how, windows=6, length=64, limit=GIB)
    tuning = scales_cost(job, 1, GIB, 2)
    text = Windows(np.concatenate([np.array(b) for b in batches]), np.ones((6, 64), np.float32))
    out = tmp_path / "q4"

    recipe = DistillationConfig(iters=2, batch_size=1, learning_rate=1e-4)
    source = students.kept(checkpoint, text, recipe, tmp_path / "targets")

    def tune() -> None:
        packed = load.open_checkpoint(out)
        student = BlockStudent(packed, "scales", kept=tuning.stays[INTEGERS])
        student.begin()
        for _ in source.steps(student, text, recipe):
            memory.give_back(cache=False)

    def rounded() -> None:
        stage.quantize(checkpoint, out, rounding=how, files=DISK, batches=batches, held=6)

    for phase, work in ((rounding, rounded), (tuning, tune)):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with memory.limited(Budget(before + phase.peak_bytes)):
            mx.set_cache_limit(0)
            work()
        peak = mx.get_peak_memory() - before
        assert phase.peak_bytes / 4 < peak < allocated(phase.peak_bytes), phase.name
