"""Batches whose loss is not a number: skipped, then left out after going back, then the run stops,
and says which.

The fault is made where it would come from: the teacher's answer to these batches is NaN. Whole
runs, real checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import distill, sft
from mis_mlx.alignment.padded_rows import Rows
from mis_mlx.distillation import strategies, targets
from mis_mlx.maths.optimizer import Diverged
from mis_mlx.models.opening import load
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError
from tests.conftest import mostly_thorough
from tests.faults import jobs
from tests.faults.broken import Killed
from tests.faults.conftest import Note

ITERS = 12
EVERY = 4


@pytest.fixture
def settings(all_jobs: dict[str, jobs.Job], tmp_path: Path) -> Callable[[str], distill.Settings]:
    """`settings(name)`: twelve steps, saved at every fourth, plain distillation, no 4-bit model."""
    model, text = all_jobs["distill"].made
    brief: dict[str, Any] = {"teacher": str(model), "data": str(text), "num_samples": 2}
    brief |= {"max_seq_length": 32, "reconstruct_samples": 0, "eval_windows": 1, "ffn": 256}
    brief |= {"iters": ITERS, "save_every": EVERY, "quantize": 0, "learning_rate": 1e-2}
    return lambda name: distill.Settings(out=str(tmp_path / name), **brief)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of batches, from 1, to which the teacher's answer is NaN. Fill it."""
    numbers = set[int]()
    cut = targets.KeptTargets.micro_batches

    def poisoned(*arguments: Any) -> list[Any]:
        parts = cut(*arguments)
        bad = arguments[-1] + 1 in numbers
        return [(*rest, shares * math.nan) for *rest, shares in parts] if bad else parts

    monkeypatch.setattr(targets.KeptTargets, "micro_batches", poisoned)
    return numbers


def notes(out: str) -> dict[int, str]:
    """{step: what the dog did} where it did something."""
    return {r["number"]: r["note"] for r in run_folder.metrics(Path(out)) if r["note"]}


def all_numbers(folder: Path) -> bool:
    """Whether every weight of a model is one."""
    checkpoint = load.open_checkpoint(folder)
    return all(
        mx.isfinite(load.dense(checkpoint, name)).all().item() for name in checkpoint.tensors
    )


def went_back(s: distill.Settings, said: str, back: int, first: int, note: Note) -> None:
    """Three bad batches from `first` on led back to step `back`: it is said, the run goes on at
    half the rate, and the model has numbers only.
    """
    out = Path(str(s.out))
    sentence = f"gave NaN or infinity: going back to step {back}, and on without them, at half the"
    assert f"{first}, {first + 1}, {first + 2} {sentence} learning rate" in said
    rates = {r["number"]: r["learning_rate"] for r in run_folder.metrics(out)}
    assert rates[ITERS] == pytest.approx(s.rate(ITERS - 1) / 2)
    assert all_numbers(out / "model")
    ends = {f"back to step {back}": 1, "the end": 1}
    note("B2 three in a row", f"distill, {s.train}", ends, said=f"batches ... {sentence} ...")


def goes_on_alike(s: distill.Settings, whole: distill.Settings, number: int) -> None:
    """Killed when its checkpoint at step `number` is there, and resumed: the same bytes."""

    def say(each: jobs.Said) -> None:
        if each.step == number:
            raise Killed

    with jobs.acknowledged(say), pytest.raises(Killed):
        distill.run(s)
    distill.run(distill.Settings(out=s.out, resume=True))
    model, wanted = (jobs.contents(Path(str(each.out)) / "model") for each in (s, whole))
    assert model == wanted


def test_three_in_a_row_go_back_and_on_without_them(
    settings: Callable[[str], distill.Settings],
    bad: set[int],
    capsys: pytest.CaptureFixture[str],
    note: Note,
) -> None:
    """One alone is skipped; then back to the checkpoint at step 4, on without batches 6 to 8.
    Killed after the way back, it ends with the same bytes.
    """
    s = settings("whole")
    bad |= {2, 6, 7, 8}
    distill.run(s)
    noted = dict.fromkeys((6, 7, 8), "skipped: not a number before")
    assert notes(str(s.out)) == {2: "skipped: not a number", **noted}
    went_back(s, capsys.readouterr().err, 4, 6, note)
    rates = {r["number"]: r["learning_rate"] for r in run_folder.metrics(Path(str(s.out)))}
    assert rates[4] == pytest.approx(s.rate(3))
    assert rates[5] == pytest.approx(s.rate(4) / 2)
    goes_on_alike(settings("cut"), s, 8)


@pytest.mark.parametrize(
    ("first", "back"), mostly_thorough([(4, 3), (6, 6)], (4, 3), of_several=True)
)
def test_a_sharded_run_goes_back_too(
    first: int,
    back: int,
    settings: Callable[[str], distill.Settings],
    bad: set[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    note: Note,
) -> None:
    """One block at a time, six steps each, saved at every third: back within a visit, and where a
    block is on disk already. Without these batches in the next visit too; killed on the second way,
    it ends with the same bytes.
    """
    ways = strategies.candidate_strategies
    monkeypatch.setattr(
        strategies,
        "candidate_strategies",
        lambda job: (way for way in ways(job) if way["shard"] == 1),
    )
    s, cut = (replace(settings(name), train="sharded") for name in ("whole", "cut"))
    bad |= {first, first + 1, first + 2}
    distill.run(s)
    went_back(s, capsys.readouterr().err, back, first, note)
    noted = notes(str(s.out))
    assert set(noted) == bad
    assert noted[first + 2] == "skipped: not a number before"
    goes_on_alike(cut, s, 9)


def test_again_three_in_a_row_stop_the_run(
    settings: Callable[[str], distill.Settings], bad: set[int], note: Note
) -> None:
    """The second time it stops and says which batches; the last good step has numbers only."""
    s = settings("bad")
    bad |= {2, 3, 4, 10, 11, 12}
    with pytest.raises(MisError, match="3 steps in a row, of batches 10, 11 and 12") as caught:
        distill.run(s)
    assert isinstance(caught.value, Diverged)
    assert caught.value.batches == (10, 11, 12)
    saved = protocol.newest(Path(str(s.out)) / "steps")
    assert saved
    assert saved.number == 8
    assert saved.state["optimizer"]["guards"][0]["skipped"] == [2, 3, 4]
    assert all(mx.isfinite(a).all().item() for a in protocol.load_arrays(saved, "model").values())
    with pytest.raises(Diverged, match="10, 11 and 12"):
        distill.run(distill.Settings(out=s.out, resume=True))
    note("B2 three in a row, twice", "distill", {"said so": 1}, said=str(caught.value))


def test_a_tuning_run_goes_back_too(
    all_jobs: dict[str, jobs.Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Note
) -> None:
    """`sft` with batches 4 to 6 of no number: back to its checkpoint at step 3, and the best model
    has numbers only.
    """
    model, text = all_jobs["sft"].made
    each = Rows.micro_batches
    loss = Rows.loss

    def poisoned(*arguments: Any) -> list[Any]:
        factor = mx.array(math.nan if arguments[-1] + 1 in (4, 5, 6) else 1.0)
        return [(*part, factor) for part in each(*arguments)]

    def bitter(*arguments: Any) -> Any:
        total, *rest = loss(*arguments[:-1])
        return (total * arguments[-1], *rest)

    monkeypatch.setattr(Rows, "micro_batches", poisoned)
    monkeypatch.setattr(Rows, "loss", bitter)
    out = tmp_path / "sft"
    asked: dict[str, Any] = {"model": str(model), "data": str(text.parent / "lessons")}
    asked |= {"max_seq_length": 128, "iters": 9, "save_every": 3, "out": str(out)}
    sft.run(sft.Settings(**asked))
    assert notes(str(out)) == dict.fromkeys((4, 5, 6), "skipped: not a number before")
    assert all_numbers(out / "model")
    assert len(run_folder.metrics(out)) == 9
    note("B2 three in a row", "sft", {"back to step 3": 1, "the end": 1})
