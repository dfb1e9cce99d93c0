"""Plans of scales that learn: in memory where they fit, else on disk; never less than it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.compute.precision import POLICY
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import plan_report as planning
from mis_mlx.distillation import strategies
from mis_mlx.distillation.block_student import BlockStudent, scales_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.memory import needed_bytes
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.hardware.stage_cost import INTEGERS, StageCost
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.quantization import scale_state
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.types import GIB
from tests import peaks, tiny
from tests.conftest import mostly_slow, mostly_thorough
from tests.distillation import students

SIZES = {
    **tiny.CONFIG,
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 2048,
}
STEPS = 2


def spec(layers: int, **changes: Any) -> DistillationSpec:
    """Two steps of a window of 64 tokens, against targets on disk."""
    m = model_of({**SIZES, "num_hidden_layers": layers}, gpu=False)
    return DistillationSpec(
        teacher=m,
        student=m,
        iters=STEPS,
        batch_size=1,
        max_seq_length=64,
        num_samples=6,
        save_every=STEPS,
        rounding=QuantizationConfig(q_method="round", target_bpw=None, q_iters=STEPS),
        **changes,
    )


def tuned(job: DistillationSpec, limit: int) -> StageCost:
    return scales_cost(job, 1, limit, STEPS)


def least_on_disk(job: DistillationSpec) -> int:
    """A budget that holds a state on disk and nothing that is not needed."""
    return needed_bytes(tuned(job, 0).peak_bytes)


def test_a_deeper_model_takes_more_disk_and_hardly_more_memory() -> None:
    """On disk the inputs of the blocks alone grow with the depth."""
    shallow = tuned(spec(4), 0)
    deep = tuned(spec(40), 0)
    inputs = 36 * 4 * 64 * 256
    assert deep.peak_bytes - shallow.peak_bytes == pytest.approx(inputs, rel=0.1)
    assert deep.scratch_bytes > 8 * shallow.scratch_bytes


def test_a_plan_says_what_lies_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much room less in memory as the state takes there, and it lies in files: the plan still
    fits, and counts them.
    """
    # a step outweighs what the other phases take
    job = replace(spec(40), modes=("none",), uncut=True, eval_windows=1, batch_size=16)
    way: dict[str, Any] = {"mode": "none", "micro": 16, "shard": 0}
    roomy = strategies.plan_strategy(job, GIB, M1_AIR, **way)
    budgets = [n * 2**18 for n in range(4, 4000)]
    plans = (strategies.plan_strategy(job, n, M1_AIR, **way) for n in budgets)
    tight = next(plan for plan in plans if plan.fits)
    state = max(phase.scratch_bytes for phase in tight.phases)
    assert tight.tuning_steps == roomy.tuning_steps == STEPS
    assert max(phase.scratch_bytes for phase in roomy.phases) == 0 < state
    assert planning.disk_bytes(tight) >= planning.disk_bytes(roomy) + state - 2**20
    monkeypatch.setenv("MIS_MLX_DETAILS", "1")
    assert "scales" in planning.table(tight)


@pytest.mark.parametrize("policy", mostly_thorough(["cpu", "metal"], "cpu"))
@pytest.mark.parametrize("room", mostly_slow([0, 500_000, None], 0, thorough=[None]))
def test_learning_stays_under_the_plan(
    tmp_path: Path, policy: str, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's peak and the files, under what the plan says, and not by more than a factor of four and
    two; without files where there is room for all (None).
    """
    monkeypatch.setenv(POLICY, policy)
    checkpoint = load.open_checkpoint(
        tiny.make(tmp_path / "m", dtype="F32", **{**SIZES, "num_hidden_layers": 8})
    )
    m = model_of(checkpoint, gpu=policy == "metal")
    job = replace(spec(8), teacher=m, student=m)
    planned = tuned(job, GIB if room is None else least_on_disk(job) + room)
    assert bool(planned.scratch_bytes) == (room is not None)
    packed = tiny.packed(checkpoint, tmp_path / "q4")
    tokens = np.random.default_rng(0).integers(0, 512, (6, 64)).astype(np.int32)
    text = Windows(tokens, np.ones((6, 64), np.float32))
    recipe = DistillationConfig(iters=STEPS, batch_size=1, learning_rate=1e-4)
    source = students.kept(checkpoint, text, recipe, tmp_path / "targets")
    with (
        peaks.of_mlx(planned.peak_bytes) as peak,
        scale_state.place(planned, tmp_path) as state,
    ):
        student = BlockStudent(packed, "scales", kept=planned.stays[INTEGERS], state=state)
        student.begin()
        for _ in source.steps(student, text, recipe):
            memory.give_back(cache=False)
        files = sum(file.nbytes for file in state.entries().values())
    assert planned.peak_bytes / 4 < peak.nbytes < planned.peak_bytes
    assert planned.scratch_bytes / 2 <= files <= planned.scratch_bytes
    assert not list(tmp_path.glob(".tmp-*"))
