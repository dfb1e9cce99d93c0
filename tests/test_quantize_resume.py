"""`quantize` says first what it takes; killed or stopped, it goes on to the same bytes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx import quantize
from mis_mlx.compute import precision
from mis_mlx.models.opening import load
from mis_mlx.quantization import stage
from mis_mlx.quantization.begun_rounding import BegunRounding
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import forks, tiny
from tests.conftest import Done, mostly_thorough, sentence

BRIEF = ("--num-samples", 8, "--max-seq-length", 32)
STEPS = ("--q-iters", 12, "--save-every", 2)
LIVE = "1GiB"
# Holds the student and its steps, but not the teacher beside them; of a GPU the plan says 47 MiB.
SMALL = "46MiB" if precision.usual_dtype() == mx.float32 else "48MiB"
# What lies in the folder of the work when a phase has begun, by phase.
BEGUN = {
    "sensitivity": "asked.yaml",
    "rounding": "rounding/layout.json",
    "a block": "rounding/blocks/step-00000000",
    "rounded": "rounded",
    "stored": "targets",
    "steps": "tune-steps/step-00000002",
}
QUICK = ("sensitivity", "a block", "stored", "steps")


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a model's files, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Child:
    """`quantize` as a process that can be killed."""

    def __init__(self, env: dict[str, str], *flags: object):
        pipe = subprocess.PIPE
        line = ["-m", "mis_mlx.quantize", *flags]
        self.process = forks.start(line, env, stdout=pipe, stderr=pipe)

    def wait_for(self, path: Path) -> None:
        """Until the path is there or the process has ended."""
        while not path.exists() and self.process.poll() is None:
            time.sleep(0.002)

    def end(self) -> Done:
        """Its exit code and what it said."""
        out, err = self.process.communicate(timeout=120)
        return subprocess.CompletedProcess([], self.process.returncode, out, err)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six blocks."""
    return tiny.make(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=6)


@pytest.fixture(scope="module")
def asked(
    deep: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[object, ...]:
    """Flags of a rounding by GPTQ in measured bits, whose scales then learn from a wide model."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 2048}
    wide = tiny.make(tmp_path_factory.mktemp("models") / "wide", num_hidden_layers=6, **sizes)
    return ("--model", deep, "--teacher", wide, "--data", text_folder, *BRIEF, *STEPS)


@pytest.fixture(scope="module", params=[pytest.param(LIVE, marks=pytest.mark.slow), SMALL])
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    asked: tuple[object, ...],
    command: Callable[..., Done],
) -> tuple[str, dict[str, bytes]]:
    """(the budget; what an undisturbed `quantize` under it writes)."""
    place = tmp_path_factory.mktemp("finished")
    flags = (*asked, "--budget", request.param)
    done = command("quantize", *flags, "--mlx-path", place / "out")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in place.iterdir()] == ["out"]
    return request.param, contents(place / "out")


@pytest.mark.thorough
def test_killed_in_each_phase_it_goes_on_to_the_same_bytes(
    tmp_path: Path,
    asked: tuple[object, ...],
    finished: tuple[str, dict[str, bytes]],
    own_home: dict[str, str],
) -> None:
    """SIGKILL as soon as each phase has begun, one process after the other on the same work."""
    budget, whole = finished
    out = tmp_path / "out"
    work = tmp_path / "out-unfinished"
    new = (*asked, "--budget", budget, "--mlx-path", out)
    more = ("--mlx-path", out, "--resume")
    killed = []
    phases = BEGUN if budget == LIVE else QUICK
    for phase in phases:
        begun = BEGUN[phase]
        if phase == "stored" and budget == LIVE:
            continue
        child = Child(own_home, *(more if killed else new))
        child.wait_for(work / begun)
        child.process.kill()
        if child.end().returncode == -signal.SIGKILL:
            killed.append(phase)
        assert (work / begun).exists() and not out.exists()
    done = Child(own_home, *more).end()
    assert done.returncode == 0, done.stderr
    assert len(killed) >= len(phases) - 2
    assert "continuing from step" in done.stderr
    assert "sensitivity" not in done.stderr
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.thorough
def test_the_same_under_metals_policy(
    tmp_path: Path, deep: Path, text_folder: Path, own_home: dict[str, str]
) -> None:
    """In float16, with packed weights: killed among the blocks and among the steps."""
    env = {**own_home, precision.POLICY: "metal"}
    flags = ("--model", deep, "--data", text_folder, *BRIEF, *STEPS, "--target-bpw", None)
    whole = Child(env, *flags, "--mlx-path", tmp_path / "whole").end()
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    line = (*flags, "--mlx-path", out)
    for phase in ("a block", "steps"):
        child = Child(env, *line)
        child.wait_for(tmp_path / "out-unfinished" / BEGUN[phase])
        child.process.kill()
        assert child.end().returncode == -signal.SIGKILL
        line = ("--mlx-path", out, "--resume")
    done = Child(env, *line).end()
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stderr
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.thorough
def test_a_ctrl_c_ends_with_the_line_that_continues(
    tmp_path: Path,
    asked: tuple[object, ...],
    finished: tuple[str, dict[str, bytes]],
    own_home: dict[str, str],
) -> None:
    """During rounding and during the steps; each line works as it was said."""
    budget, whole = finished
    out = tmp_path / "out"
    line: list[object] = ["-m", "mis_mlx.quantize", *asked, "--budget", budget, "--mlx-path", out]
    pipe = subprocess.PIPE
    for begun in ("rounding/blocks/step-00000001", "tune-steps/step-00000002"):
        process = forks.start(line, own_home, stdout=pipe, stderr=pipe)
        while not (tmp_path / "out-unfinished" / begun).exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130, said
        assert said is not None
        python, *line = shlex.split(said.splitlines()[-1].partition("continue with ")[2])
        assert python.endswith("python")
    done = forks.run(line, own_home)
    assert done.returncode == 0, done.stderr
    assert contents(out) == whole
    assert json.loads(done.stdout.splitlines()[-1])["mlx_path"] == str(out)


@pytest.mark.parametrize(
    ("budget", "phases"),
    [
        pytest.param(LIVE, ["quantize", "distil scales"], marks=pytest.mark.thorough),
        (SMALL, ["quantize", "logit store", "distil scales"]),
    ],
)
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    tmp_path: Path,
    asked: tuple[object, ...],
    budget: str,
    phases: list[str],
    in_process: Callable[..., Done],
) -> None:
    """The phases, in their order; the teacher's tokens go to disk where it does not fit."""
    place = ("--mlx-path", tmp_path / "out", "--budget", budget)
    done = in_process("quantize", *asked, *place, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert list(plan["phases"]) == phases
    assert 0 < plan["peak_bytes"] <= plan["budget_bytes"]
    assert plan["disk_bytes"] > 0
    assert plan["seconds"] >= 0
    for phase in phases:
        assert f"{phase} " in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_without_steps(
    tmp_path: Path, deep: Path, text_folder: Path, in_process: Callable[..., Done]
) -> None:
    """Nothing learns, so there is one phase, and no word of a teacher."""
    flags = ("--model", deep, "--data", text_folder, "--mlx-path", tmp_path / "out", "--dry-run")
    done = in_process("quantize", *flags)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout.splitlines()[-1])["phases"]) == ["quantize"]
    assert "the teacher" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_budget_without_room_for_a_block_names_one_that_has(
    tmp_path: Path, asked: tuple[object, ...], in_process: Callable[..., Done]
) -> None:
    """The budget of the sentence is enough, and nothing was written before."""
    flags = ("quantize", *asked, "--mlx-path", tmp_path / "out")
    said = sentence(in_process(*flags, "--budget", "6MiB"))
    enough = re.findall(r"give --budget (\w+)", said)[-1]
    assert not list(tmp_path.iterdir())
    assert in_process(*flags, "--budget", enough, "--dry-run").returncode == 0


def test_work_that_is_there_is_not_begun_again(
    tmp_path: Path,
    deep: Path,
    text_folder: Path,
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """Without --resume it is refused; with it, so is another setting, and a result in its place."""
    out = tmp_path / "out"
    work = tmp_path / "out-unfinished"
    asked = ("--model", deep, "--data", text_folder, *BRIEF)
    child = Child(own_home, *asked, "--mlx-path", out)
    child.wait_for(work / BEGUN["a block"])
    child.process.kill()
    assert child.end().returncode == -signal.SIGKILL
    said = sentence(command("quantize", *asked, "--mlx-path", out))
    assert str(work) in said and "--resume" in said
    again = ("quantize", "--mlx-path", out, "--resume")
    assert "--target-bpw is 5" in sentence(command(*again, "--target-bpw", 5.0))
    out.mkdir()
    assert "exists already" in sentence(command(*again))
    elsewhere = tmp_path / "elsewhere"
    moved = ("--out", work, "--mlx-path", elsewhere)
    done = command("quantize", "--resume", *moved)
    assert done.returncode == 0, done.stderr
    assert load.open_checkpoint(elsewhere).config["quantization"]
    assert not work.exists()


@pytest.mark.parametrize("changed", mostly_thorough(["model", "data"], "data"))
def test_another_model_or_text_is_not_gone_on_with(
    tmp_path: Path,
    changed: str,
    text_folder: Path,
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """What lies under the same path by now is another one: a sentence, and the work stays."""
    models = tmp_path / "models"
    model = tiny.make(models / "first", num_hidden_layers=6)
    text = models / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        shutil.copy(text_folder / f"{split}.jsonl", text)
    out = tmp_path / "out"
    work = tmp_path / "out-unfinished"
    flags = ("--model", model, "--data", text, "--mlx-path", out)
    child = Child(own_home, *flags, *BRIEF)
    child.wait_for(work / BEGUN["a block"])
    child.process.kill()
    assert child.end().returncode == -signal.SIGKILL
    if changed == "model":
        model.rename(models / "moved")
        tiny.make(model, num_hidden_layers=6, seed=1)
    else:
        rows = (text / "train.jsonl").read_text().splitlines(keepends=True)
        (text / "train.jsonl").write_text("".join(rows[1:]))
    said = sentence(command("quantize", "--mlx-path", out, "--resume"))
    assert f"The {changed} changed since {work} began" in said
    assert (work / BEGUN["a block"]).exists() and not out.exists()


@pytest.mark.thorough
def test_two_processes_do_not_work_in_one_folder(
    tmp_path: Path,
    asked: tuple[object, ...],
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """The second one names the first one."""
    child = Child(own_home, *asked, "--mlx-path", tmp_path / "out")
    child.wait_for(tmp_path / "out-unfinished" / BEGUN["rounding"])
    said = sentence(command("quantize", "--mlx-path", tmp_path / "out", "--resume"))
    child.process.kill()
    child.end()
    assert f"process {child.process.pid} " in said


def test_a_packed_model_is_refused(
    tmp_path: Path, deep: Path, in_process: Callable[..., Done]
) -> None:
    """By a dry run, too."""
    plain = ("--q-method", "round", "--target-bpw", "None")
    places = ("--model", deep, "--mlx-path", tmp_path / "four")
    made = in_process("quantize", *places, *plain)
    assert made.returncode == 0, made.stderr
    for more in ((), ("--dry-run",)):
        places = ("--model", tmp_path / "four", "--mlx-path", tmp_path / "out")
        done = in_process("quantize", *places, *more)
        assert "quantized already" in sentence(done)
    assert [path.name for path in tmp_path.iterdir()] == ["four"]


def test_a_result_that_was_not_put_in_its_place(tmp_path: Path, llama: Checkpoint) -> None:
    """Killed between the end of the work and the move: --resume only moves it."""
    out = tmp_path / "out"
    work = tmp_path / "out-unfinished"
    plain = {"q_method": "round", "target_bpw": None}
    settings = quantize.Settings(model=str(llama.path), mlx_path=str(out), **plain)
    first = quantize.run(settings)
    work.mkdir()
    run_folder.begin(work, settings.given, {}, DISK)
    (work / run_folder.RESULT).write_text(json.dumps(first))
    out.rename(work / quantize.MODEL)
    again = quantize.run(quantize.Settings(mlx_path=str(out), resume=True))
    assert again == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damaged", mostly_thorough([None, 1], 1))
def test_a_journal_gives_the_same_bytes(
    tmp_path: Path, llama: Checkpoint, damaged: int | None, batches: list
) -> None:
    """Some blocks from the journal, others made, a damaged one too: as if all were made."""
    how = QuantizationConfig(target_bpw=None)
    windows = [*batches, *batches, *batches, *batches]

    def made(name: str, begun: BegunRounding | None) -> bytes:
        out = tmp_path / name
        stage.quantize(llama, out, rounding=how, files=DISK, batches=windows, held=8, begun=begun)
        return (out / "model.safetensors").read_bytes()

    whole = made("whole", None)
    assert made("kept", BegunRounding(tmp_path / "journal", DISK)) == whole
    steps = tmp_path / "journal" / "blocks"
    last = steps / "step-00000002"
    last.rename(tmp_path / "gone")
    if damaged is not None:
        path = steps / f"step-{damaged:08d}" / "matrices.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    half = BegunRounding(tmp_path / "journal", DISK)
    assert half.blocks == (2 if damaged is None else 1)
    assert made("again", half) == whole


def test_windows_that_are_not_there_leave_nothing(tmp_path: Path, llama: Checkpoint) -> None:
    """A new work that is refused for its text is no work."""
    with pytest.raises(MisError, match="nowhere"):
        quantize.run(
            quantize.Settings(
                model=str(llama.path), data=str(tmp_path / "nowhere"), mlx_path=str(tmp_path / "o")
            )
        )
    assert not list(tmp_path.iterdir())
