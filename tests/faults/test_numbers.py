"""Batches whose loss is not a number: skipped, then left out after going back, then the run stops,
and says which.

The fault is made where it would come from: the teacher's answer to these batches is NaN. Whole
runs, real checkpoints.
"""

from __future__ import annotations

import math
import shutil
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
from tests.faults.conftest import Note

ITERS = 12
EVERY = 4


@pytest.fixture
def settings(all_jobs: dict[str, jobs.Job], tmp_path: Path) -> Callable[[str], distill.Settings]:
    """`settings(name)`: of a run of twelve steps, saved at every fourth, with plain distillation
    and no 4-bit model.
    """
    model, text = all_jobs["distill"].made
    brief: dict[str, Any] = {
        "teacher": str(model),
        "data": str(text),
        "num_samples": 2,
        "max_seq_length": 32,
    }
    brief |= {"reconstruct_samples": 0, "eval_windows": 1, "ffn": 256}
    brief |= {
        "iters": ITERS,
        "save_every": EVERY,
        "quantize": 0,
        "learning_rate": 1e-2,
    }
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


def test_one_bad_batch_is_skipped(
    settings: Callable[[str], distill.Settings], bad: set[int], note: Note
) -> None:
    """The steps before it are those of a run that never met it; it is noted; the model at the end
    has numbers only.
    """
    s = settings("bad")
    clean = settings("clean")
    distill.run(clean)
    bad.add(6)
    distill.run(s)
    assert notes(str(s.out)) == {6: "skipped: not a number"}
    losses = [row["loss"] for row in run_folder.metrics(Path(str(s.out)))]
    undisturbed = [row["loss"] for row in run_folder.metrics(Path(str(clean.out)))]
    assert losses[:5] == undisturbed[:5]
    assert len(losses) == ITERS
    assert all_numbers(Path(str(s.out)) / "model")
    note(
        "B1 one batch that gives no number",
        "distill",
        {"skipped": 1},
        bad=0,
        said="step 6: skipped: not a number",
    )


def test_three_in_a_row_go_back_and_on_without_them(
    settings: Callable[[str], distill.Settings],
    bad: set[int],
    capsys: pytest.CaptureFixture[str],
    note: Note,
) -> None:
    """Back to the checkpoint at step 4, on without batches 6 to 8 at half the rate; the resumed
    twin has its bytes.
    """
    s = settings("bad")
    bad |= {6, 7, 8}
    distill.run(s)
    said = capsys.readouterr().err
    assert (
        "batches 6, 7, 8 gave NaN or infinity: going back to step 4, and on without them, at half "
        "the "
        "learning rate" in said
    )
    assert notes(str(s.out)) == dict.fromkeys((6, 7, 8), "skipped: not a number before")
    rates = {r["number"]: r["learning_rate"] for r in run_folder.metrics(Path(str(s.out)))}
    assert rates[5] == pytest.approx(s.rate(4) / 2)
    assert rates[4] == pytest.approx(s.rate(3))
    assert all_numbers(Path(str(s.out)) / "model")
    note(
        "B2 three in a row",
        "distill",
        {"back to step 4": 1, "the end": 1},
        bad=0,
        said="batches 6, 7, 8 gave NaN or infinity: going back to step 4, and on without them, at "
        "half the "
        "learning rate",
    )


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
    sentence = (
        f"gave NaN or infinity: going back to step {back}, and on without them, at half "
        f"the "
        f"learning rate"
    )
    assert sentence in capsys.readouterr().err
    noted = notes(str(s.out))
    assert set(noted) == bad
    assert noted[first + 2] == "skipped: not a number before"
    rates = {r["number"]: r["learning_rate"] for r in run_folder.metrics(Path(str(s.out)))}
    assert rates[ITERS] == pytest.approx(s.rate(ITERS - 1) / 2)
    assert all_numbers(Path(str(s.out)) / "model")
    _stopped_at(9, cut)
    distill.run(distill.Settings(out=cut.out, resume=True))
    assert jobs.contents(Path(str(s.out)) / "model") == jobs.contents(Path(str(cut.out)) / "model")
    note(
        "B2 three in a row",
        "distill, sharded",
        {f"back to step {back}": 1},
        bad=0,
        said=f"batches ... {sentence}",
    )


def _stopped_at(number: int, s: distill.Settings) -> None:
    """A run until its checkpoint at step `number` is there."""
    save = protocol.save_step

    def stop(folder: Path, n: int, *a: Any, **more: Any) -> Path:
        path = save(folder, n, *a, **more)
        if n == number:
            raise KeyboardInterrupt
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "save_step", stop)
        with pytest.raises(KeyboardInterrupt):
            distill.run(s)


def test_what_is_left_out_stays_left_out_after_a_kill(
    settings: Callable[[str], distill.Settings], bad: set[int]
) -> None:
    """Stopped after the way back, at step 8 and before any, and resumed: the same bytes as in one
    go.
    """
    whole = settings("whole")
    s = settings("cut")
    bad |= {6, 7, 8}
    distill.run(whole)
    for number in (8, 4):
        _stopped_at(number, s)
        distill.run(distill.Settings(out=s.out, resume=True))
        assert jobs.contents(Path(str(s.out)) / "model") == jobs.contents(
            Path(str(whole.out)) / "model"
        )
        shutil.rmtree(str(s.out))


def test_again_three_in_a_row_stop_the_run(
    settings: Callable[[str], distill.Settings], bad: set[int], note: Note
) -> None:
    """The second time it stops, says which batches, and the last good step is there with numbers
    only.
    """
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
    sentence = str(caught.value)
    note("B2 three in a row, twice", "distill", {"said so": 1}, bad=0, said=sentence)


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
    lessons = str(text.parent / "lessons")
    sft.run(
        sft.Settings(
            model=str(model),
            data=lessons,
            max_seq_length=128,
            iters=9,
            save_every=3,
            out=str(out),
        )
    )
    assert notes(str(out)) == dict.fromkeys((4, 5, 6), "skipped: not a number before")
    assert all_numbers(out / "model")
    assert len(run_folder.metrics(out)) == 9
    note(
        "B2 three in a row",
        "sft",
        {"back to step 3": 1, "the end": 1},
        bad=0,
        said="batches 4, 5, 6 gave NaN or infinity: going back to step 3, and on without them, at "
        "half the "
        "learning rate",
    )
