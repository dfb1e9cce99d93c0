"""A run is resolved once: to the same settings when it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mis_mlx import distill
from mis_mlx.distillation import conversations, pipeline, run_plan
from mis_mlx.distillation.strategies import MemoryPlan
from mis_mlx.hardware import memory
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import tiny

QUICK: dict[str, Any] = {
    "max_seq_length": 32,
    "num_samples": 4,
    "reconstruct_samples": 2,
    "eval_windows": 2,
    "q_iters": 1,
}

Resolved = tuple[distill.Settings, MemoryPlan]


@pytest.fixture(name="resolved")
def _resolved(monkeypatch: pytest.MonkeyPatch) -> list[Resolved]:
    """Every run that `distill` resolves, as it does that."""
    runs = list[Resolved]()
    resolve = run_plan.resolve

    def listening(*given: Any) -> Resolved:
        runs.append(resolve(*given))
        return runs[-1]

    monkeypatch.setattr(run_plan, "resolve", listening)
    return runs


@pytest.fixture(name="stop")
def _stop(monkeypatch: pytest.MonkeyPatch) -> list[pipeline.Run]:
    """Every run is stopped where its training would begin, and is listed."""
    stopped = list[pipeline.Run]()

    def stop(c: pipeline.Run, *_: object) -> NoReturn:
        stopped.append(c)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "distil", stop)
    return stopped


def begin_and_resume(settings: distill.Settings) -> None:
    """Both are stopped before they train."""
    for asked in (settings, distill.Settings(out=settings.out, resume=True)):
        with pytest.raises(KeyboardInterrupt):
            distill.run(asked)


@pytest.mark.parametrize(
    "flags",
    [
        {"scenario": "gazda"},
        {"layers": 2, "quantize": 0},
        {"vocab": "300", "iters": 7, "learning_rate": 1e-3, "temperature_c": 20.0},
        {"scenario": "gazda", "temperature": 2.0, "q_group_size": 32},
        {"scenario": "gazda", "train": "blocks", "batch_size": 4, "grad_accumulation_steps": 3},
        pytest.param({"bytes": "190KB"}, marks=pytest.mark.thorough),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_run_that_goes_on_is_what_it_was(
    llama: Checkpoint,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resolved: list[Resolved],
    stop: list[pipeline.Run],
    flags: dict[str, Any],
) -> None:
    """Stopped and resumed: an equal object, the same plan, and so do the stages see it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    settings = distill.Settings(
        teacher=str(llama.path), data=str(text_folder), out="run", **{**QUICK, **flags}
    )
    begin_and_resume(settings)
    *_, (begun, plan), resumed = resolved  # before them, a search's plan of a likely student
    assert begun == resumed[0]
    assert plan.phases == resumed[1].phases
    assert begun.iters
    assert begun.learning_rate
    assert stop[0].recipe == stop[1].recipe == plan.recipe(begun, llama)
    stored = run_folder.stored_settings(tmp_path / "run")
    kept = json.loads(json.dumps(asdict(begun)))
    assert stored == {name: kept[name] for name in kept if name not in run_folder.NOT_STORED}
    strategy = {**plan.strategy, conversations.WRITES: plan.job.teacher_writes}
    assert run_folder.stored_settings(tmp_path / "run", run_folder.PLAN) == strategy


def test_another_student_is_another_run(
    llama: Checkpoint,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: list[pipeline.Run],
) -> None:
    """A given student whose weights are others by now: --resume is refused."""
    monkeypatch.chdir(tmp_path)
    folder = tiny.make(tmp_path / "cut", num_hidden_layers=2)
    settings = distill.Settings(
        teacher=str(llama.path), data=str(text_folder), student=str(folder), out="run", **QUICK
    )
    with pytest.raises(KeyboardInterrupt):
        distill.run(settings)
    shutil.rmtree(folder)
    tiny.make(folder, seed=1, num_hidden_layers=2)
    with pytest.raises((MisError, KeyboardInterrupt), match="student changed"):
        distill.run(distill.Settings(out="run", resume=True))


def test_other_programs_do_not_stop_a_run_that_goes_on(
    llama: Checkpoint,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resolved: list[Resolved],
    stop: list[pipeline.Run],
) -> None:
    """It began by default, and next day a browser leaves 8 MiB: the run goes on with the budget
    that it began with, where a new one would be refused.
    """
    monkeypatch.chdir(tmp_path)
    settings = distill.Settings(
        teacher=str(llama.path), data=str(text_folder), scenario="gazda", out="run", **QUICK
    )
    with pytest.raises(KeyboardInterrupt):
        distill.run(settings)
    monkeypatch.setattr(memory, "free_for_us_bytes", lambda: 8 * 2**20)
    with pytest.raises(KeyboardInterrupt):
        distill.run(distill.Settings(out="run", resume=True))
    (_, begun), (_, again) = resolved
    assert again.budget_bytes == begun.budget_bytes > 8 * 2**20
    with pytest.raises(MisError, match="--budget"):
        distill.run(replace(settings, out="another"))
