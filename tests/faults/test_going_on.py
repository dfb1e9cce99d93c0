"""What --resume may go on with: a damaged step costs steps; another input, another setting, a
folder in use and a new start on begun work are refused, and the work stays as it was.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import distill, dpo, grpo, quantize, sft
from mis_mlx.alignment import alignment_run
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.types import MisError
from tests import tiny
from tests.conftest import mostly_slow, mostly_thorough
from tests.faults import jobs
from tests.faults.broken import Killed
from tests.faults.test_jobs import LONG, TUNED, Benches

COMMANDS: dict[str, Any] = {TUNED: quantize, "distill": distill, "sft": sft, "dpo": dpo}
COMMANDS["grpo"] = grpo


def begun(job: jobs.Job, place: Path, until: int = 2) -> Path:
    """The newest step of a work that ends as soon as one of this number is safe."""
    steps = list[Path]()

    def say(each: jobs.Said) -> None:
        if (each.step or 0) >= until and each.path.parent.name != alignment_run.BEST:
            steps.append(each.path)
            raise Killed

    with jobs.acknowledged(say), pytest.raises(Killed):
        job.run(jobs.clean(place))
    return steps[0]


def work_of(place: Path) -> Path:
    """Where a command keeps its work."""
    (work,) = [path for path in place.iterdir() if path.name in ("run", "out-unfinished")]
    return work


def flip(step: Path) -> None:
    """One bit of the largest file."""
    largest = max(step.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)


@pytest.mark.parametrize("name", mostly_slow((TUNED, *LONG), TUNED, "sft", thorough=LONG[:5]))
def test_a_flipped_bit_costs_steps_and_not_the_run(name: str, bench: Benches) -> None:
    """Of the newest step: it is said, and the end has the undisturbed bytes."""
    b = bench(name)
    flip(begun(b.job, b.place))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        b.job.run(b.place)
    assert ("is damaged" in said.getvalue()) == (name != TUNED)  # a block is just made again
    assert b.job.outcome(b.place) == b.whole


@pytest.mark.parametrize("both", [True, False])
def test_a_flipped_bit_of_the_best_weights_costs_steps(both: bool, bench: Benches) -> None:
    """With the newest step, or alone, where that is to be deleted: the same bytes at the end."""
    b = bench("sft")
    step = begun(b.job, b.place, 3)
    flip(step.parents[1] / alignment_run.BEST / step.name)
    if both:
        flip(step)
    else:
        with pytest.raises(MisError, match="damaged.*steps"):
            b.job.run(b.place)
        shutil.rmtree(step)
    b.job.run(b.place)
    assert b.job.outcome(b.place) == b.whole


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[jobs.Job, Path]]:
    """`stopped(name)`: a job on a model and a text of its own, and where it ended in its middle."""
    found = dict[str, tuple[jobs.Job, Path]]()

    def get(name: str) -> tuple[jobs.Job, Path]:
        if name not in found:
            root = tmp_path_factory.mktemp("stopped")
            job = jobs.jobs(*jobs.made(root / "made"))[name]
            place = root / "place"
            begun(job, place)
            found[name] = job, place
        return found[name]

    return get


def refused(name: str, place: Path, **changes: Any) -> str:
    """What --resume says with these settings; the work stays as it was."""
    command = COMMANDS[name]
    where = {"mlx_path": str(place / "out")} if command is quantize else {}
    where = where or {"out": str(place / "run")}
    before = jobs.contents(work_of(place))
    with pytest.raises(MisError) as caught:
        command.run(command.Settings(**{**where, "resume": True, **changes}))
    after = jobs.contents(work_of(place))
    assert {name for name in before if not name.endswith(".lock")} <= set(after)
    assert all(after[n] == before[n] for n in before if not n.endswith((".lock", ".json")))
    return str(caught.value)


@pytest.mark.parametrize("name", mostly_thorough(COMMANDS, "sft", TUNED))
def test_what_is_not_gone_on_with(
    name: str, stopped: Callable[[str], tuple[jobs.Job, Path]], tmp_path: Path
) -> None:
    """Another setting, with both values; a folder in use, with the process; other data, another
    model; and a new start where there is work.
    """
    job, place = stopped(name)
    model, text = job.made
    work = work_of(place)
    said = refused(name, place, seed=7)
    assert "--seed is 7" in said and "has 0" in said
    if name in ("sft", "dpo", "grpo"):  # the best checkpoint is looked for by it
        assert "--save-every is 3" in refused(name, place, save_every=3)
    with protocol.lock(work):
        assert f"process {os.getpid()}" in refused(name, place)
    model_of = {"teacher" if name == "distill" else "model": str(model)}
    data = text if name in (TUNED, "distill") else text.parent / "lessons"
    fits = {"max_seq_length": 128, "data": str(data)}
    fits |= {"max_completion_length": 8} if name == "grpo" else {}
    assert "--resume" in refused(name, place, resume=False, **model_of, **fits)

    kept = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text("".join(kept.splitlines(keepends=True)[1:]))
    assert "data changed" in refused(name, place)
    (data / "train.jsonl").write_text(kept)
    shutil.move(model, tmp_path / "model")
    tiny.make(model, seed=1, num_hidden_layers=2, intermediate_size=512)
    said = refused(name, place)
    assert "model changed" in said or "teacher changed" in said
    shutil.rmtree(model)
    shutil.move(tmp_path / "model", model)
    with contextlib.redirect_stdout(io.StringIO()):
        job.run(place)
