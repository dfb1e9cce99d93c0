"""The command `plan`: numbers by pencil, and memory that real training stays under."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import plan
from mis_mlx.disk.text import Windows
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.model import arch, load
from mis_mlx.training import distillation
from mis_mlx.training.recipe import Recipe
from mis_mlx.types import GIB, Checkpoint
from tests import tiny
from tests.conftest import Done

SHAPE: dict[str, Any] = dict(iters=10, micro_batch=2, accumulate=3, length=16, calibration=4, held_out=5, saves=2)


def made(big: dict[str, Any], small: dict[str, Any], budget: int, **changes: Any) -> plan.Plan:
    given = {**SHAPE, **changes}
    return plan.make(big, small, teacher_bytes=4 * arch.params(big), budget_bytes=budget, flops_per_s=1e9, **given)


def test_flops_and_bytes_by_pencil() -> None:
    """10 steps of 96 tokens: 2 flops a teacher parameter forwards, 6 a student's there and back, times 2.5."""
    small = {**tiny.CONFIG, "num_hidden_layers": 1}
    phases = {p.name: p for p in made(tiny.CONFIG, small, GIB).phases}
    p_t, p_s = arch.params(tiny.CONFIG), arch.params(small)
    assert phases["distil"].flops == 10 * 96 * (2 * p_t + 6 * p_s) * 2.5
    assert phases["distil"].seconds == pytest.approx(phases["distil"].flops / 1e9)
    assert phases["distil"].written_bytes == 2 * 12 * p_s  # weights and two moments, float32
    assert phases["prune"].flops == 2 * p_t * 64


def test_a_streamed_teacher_is_read_once_a_step() -> None:
    """With room the teacher is read once; without, at every step, and the peak falls."""
    big = {**tiny.CONFIG, "num_hidden_layers": 200}
    rich = made(big, tiny.CONFIG, 10 * GIB)
    poor = made(big, tiny.CONFIG, rich.peak_bytes // 2)
    assert rich.teacher_resident and not poor.teacher_resident
    reads = [{p.name: p.read_bytes for p in it.phases}["distil"] for it in (rich, poor)]
    assert reads == [4 * arch.params(big), 10 * 4 * arch.params(big)]
    peaks = [{p.name: p.peak_bytes for p in it.phases}["distil"] for it in (rich, poor)]
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("batch", "length", "vocab", "resident"),
    [(1, 64, 512, True), (4, 128, 512, True), (4, 128, 512, False), (2, 64, 8192, False), (4, 256, 4096, True)],
)
def test_training_stays_under_the_planned_peak(
    tmp_path: Path, batch: int, length: int, vocab: int, resident: bool
) -> None:
    """Two real steps: MLX's own peak is under the plan's, and not by more than a factor of four."""
    big = tiny.make(tmp_path / "big", vocab_size=vocab, num_hidden_layers=6)
    small = tiny.make(tmp_path / "small", seed=1, vocab_size=vocab, num_hidden_layers=4, intermediate_size=512)
    teacher, student = load.open_checkpoint(big), load.open_checkpoint(small)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (12, length)).astype(np.int32)
    data = Windows(tokens, np.ones((12, length), np.float32))
    recipe = Recipe(iters=2, batch_size=batch, max_seq_length=length)
    mx.clear_cache()
    before = mx.get_active_memory()
    model, source = load.resident(student, mx.float32), distillation.Teacher(teacher, None if resident else 0)
    steps = list(distillation.steps(model, source, data, recipe, GoralW()))
    peak = max(s.peak_bytes for s in steps) - before
    budget = 10 * GIB if resident else 1
    planned = made(dict(teacher.config), dict(student.config), budget, micro_batch=batch, accumulate=1, length=length)
    assert planned.teacher_resident == resident
    (distil,) = (p.peak_bytes for p in planned.phases if p.name == "distil")
    assert distil / 4 < peak < distil, (peak / 2**20, distil / 2**20)


def test_end_to_end(llama: Checkpoint, command: Callable[..., Done]) -> None:
    """A table, JSON last, exit code 0; a budget too small is a check that failed: 3; nothing is started."""
    done = command("plan", "--teacher", llama.path, "--budget", "1GiB", "--max-seq-length", 32)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["params_teacher"] == arch.params(llama.config) > result["params_student"]
    assert result["peak_bytes"] <= result["budget_bytes"] == GIB
    done = command("plan", "--teacher", llama.path, "--budget", "1MiB", "--max-seq-length", 32)
    assert done.returncode == 3 and "does NOT fit" in done.stdout
    done = command("plan", "--teacher", llama.path, "--scenario", "tatry")
    assert done.returncode == 2 and "Traceback" not in done.stderr
