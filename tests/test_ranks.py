"""`distill` and its like on several machines, as a user starts them: one run, one voice, and a way
on when one dies.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mis_mlx.alignment import grpo_rollout
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import Done, last_line, losses, mostly_slow, scratch_folder
from tests.machines import ROOT, Processes, ended, ports, started
from tests.test_grpo import _folder, _small  # noqa: F401  fixtures
from tests.test_sft import answers  # noqa: F401  a fixture

DENSE = ("--quantize", 0, "--eval-windows", 1)
GONE = "another machine is gone"
ITERS = 16


@pytest.fixture(scope="module")
def brief(flags: tuple[object, ...]) -> tuple[object, ...]:
    """Flags of a shorter run than `finished`."""
    return (*flags, "--iters", ITERS, "--q-iters", 2)


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory,
    brief: tuple[object, ...],
    command: Callable[..., Done],
) -> tuple[Path, Done]:
    """(run folder, process) of it on one machine; do not write into it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = command("distill", *brief, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a machine ends with; what MLX says of its sockets is not ours."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mis_mlx: ")]
    return line


def wait_for(steps: int, out: Path, processes: Processes) -> None:
    """Until so many steps of the run in `out` are done."""
    while not (out / run_folder.METRICS).exists() or len(run_folder.metrics(out)) < steps:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(0.02)


def launched(
    env: dict[str, str], n: int, command: str, *flags: object
) -> subprocess.CompletedProcess[str]:
    """`mlx.launch -n N python -m mis_mlx.COMMAND FLAGS` to its end, which is 0 whatever became of
    the commands.
    """
    launch = Path(sys.executable).parent / "mlx.launch"
    argv = [launch, "-n", n, "-p", ports(1)[0], sys.executable, "-m", f"mis_mlx.{command}", *flags]
    # stdin among them: of what has ended, such as /dev/null, mlx.launch reads without rest
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*map(str, argv)],
        env={**env, "PYTHONPATH": str(ROOT)},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    try:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        # More than a pipe holds, which nobody reads: mlx.launch keeps a core busy while it could
        # write to a machine.
        with contextlib.suppress(BrokenPipeError):  # they have ended already
            process.stdin.write("\n" * 2**18)
            process.stdin.flush()
        process.wait(300)
        return subprocess.CompletedProcess(
            argv, process.returncode, process.stdout.read(), process.stderr.read()
        )
    finally:
        process.kill()
        process.communicate()


def one_voice(done: subprocess.CompletedProcess[str], scratch: Path) -> None:
    """One JSON line, one run folder named, and the second machine leaves nothing behind."""
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1, done.stderr
    assert done.stderr.count("run folder:") == 1
    assert not [p for p in scratch.iterdir() if p.name.startswith("mis_mlx-")]


@pytest.mark.slow
def test_mlx_launch_starts_machines_that_work_together(
    tmp_path: Path, alone: tuple[Path, Done], brief: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """A short run, as a user starts it: the pruned student is that of one machine, bit for bit."""
    out = tmp_path / "run"
    scratch = scratch_folder(tmp_path / "scratch")
    short = (*brief, *DENSE, "--iters", 1)
    done = launched({**own_home, "TMPDIR": str(scratch)}, 2, "distill", *short, "--out", out)
    one_voice(done, scratch)
    assert len(losses(out)) == 1
    of = "pruned/model.safetensors"
    assert (out / of).read_bytes() == (alone[0] / of).read_bytes()


@pytest.mark.parametrize("how", mostly_slow(["started", "mlx.launch"], thorough=["started"]))
def test_two_machines_give_the_run_of_one(
    how: str,
    tmp_path: Path,
    alone: tuple[Path, Done],
    brief: tuple[object, ...],
    own_home: dict[str, str],
) -> None:
    """Calibration to table: the same files, the pruned student bit for bit, every loss to 1e-4
    (measured: 5e-6).
    """
    out = tmp_path / "run"
    scratch = scratch_folder(tmp_path / "scratch")
    env = {**own_home, "TMPDIR": str(scratch)}
    if how == "started":
        with started(2, ["-m", "mis_mlx.distill", *brief, "--out", out], env) as made:
            done, second = ended(made)
        assert done.returncode == second.returncode == 0, done.stderr
        assert not second.stdout
        assert not second.stderr
    else:
        done = launched(env, 2, "distill", *brief, "--out", out)
    one_voice(done, scratch)
    result = last_line(done)
    want = last_line(alone[1])
    assert result["tokens"] == want["tokens"]
    assert result["nll_quantized"] == pytest.approx(want["nll_quantized"], rel=1e-3)
    of = "pruned/model.safetensors"
    assert (out / of).read_bytes() == (alone[0] / of).read_bytes()
    np.testing.assert_allclose(losses(out), losses(alone[0]), rtol=1e-4)
    own = {"thermal.jsonl", run_folder.SAMPLES}
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    expected = {str(path.relative_to(alone[0])) for path in alone[0].rglob("*")}
    assert names - own == expected - own


@pytest.mark.parametrize("numbers", mostly_slow([(1,), (2, 3)], thorough=[(1,)]))
def test_one_machine_dies_and_any_number_goes_on(
    numbers: tuple[int, ...],
    tmp_path: Path,
    alone: tuple[Path, Done],
    brief: tuple[object, ...],
    own_home: dict[str, str],
) -> None:
    """The second of two is killed: the first saves the last step and ends within a minute with a
    sentence; 1, 2 and 3 machines go on from that step, and their losses are those of a run that
    nobody killed.
    """
    out = tmp_path / "run"
    with started(2, ["-m", "mis_mlx.distill", *brief, *DENSE, "--out", out], own_home) as made:
        wait_for(6, out, made)
        made[1].send_signal(signal.SIGKILL)
        first = ended(made, seconds=60)[0]
    step = len(run_folder.metrics(out))
    assert GONE in said(first)
    assert f"--out {out} --resume" in said(first)
    assert 6 <= step < ITERS
    assert (out / "steps" / f"step-{step:08d}").is_dir()
    for n in numbers:
        copy = shutil.copytree(out, tmp_path / str(n))
        with started(n, ["-m", "mis_mlx.distill", "--out", copy, "--resume"], own_home) as made:
            done = ended(made)
        assert [d.returncode for d in done] == [0] * n, done[0].stderr
        assert f"continuing from step {step}" in done[0].stderr
        assert not any(d.stderr or d.stdout for d in done[1:])
        np.testing.assert_allclose(losses(copy), losses(alone[0]), rtol=1e-4)


@pytest.mark.thorough
def test_machines_train_block_by_block_as_one_does(
    tmp_path: Path, flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """Gradients of each block are added up before its update: losses to 1e-3, for 8 bits may fall
    to either side.
    """
    for n in (1, 2):
        more = [*flags, *DENSE, "--train", "blocks", "--iters", "6", "--out", tmp_path / str(n)]
        with started(n, ["-m", "mis_mlx.distill", *more], own_home) as made:
            done = ended(made)
        assert [d.returncode for d in done] == [0] * n, done[0].stderr
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-3)


@pytest.mark.slow
def test_the_one_that_writes_dies(
    tmp_path: Path,
    flags: tuple[object, ...],
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """The first of three is killed: the others end with a sentence, leave nothing, and the last
    checkpoint goes on.
    """
    out = tmp_path / "run"
    scratch = scratch_folder(tmp_path / "scratch")
    env = {**own_home, "TMPDIR": str(scratch)}
    with started(
        3, ["-m", "mis_mlx.distill", *flags, *DENSE, "--iters", 30, "--out", out], env
    ) as made:
        wait_for(9, out, made)
        made[0].send_signal(signal.SIGKILL)
        for number, done in enumerate(ended(made, seconds=60)[1:], 1):
            assert said(done).startswith(f"mis_mlx: machine {number}: {GONE}")
    assert not [p for p in scratch.iterdir() if p.name.startswith("mis_mlx-")]
    done = command("distill", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stderr
    assert [number for number, _, _ in losses(out)] == list(range(1, 31))


def test_what_several_machines_cannot_do(
    tmp_path: Path, flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """Refused by every one of them, before work: a command for one machine; a student that is not
    whole; another teacher on another machine.
    """
    with started(2, ["-m", "mis_mlx.plan"], own_home) as made:
        for done in ended(made):
            assert "runs on one machine only" in said(done)
    with started(
        2, ["-m", "mis_mlx.distill", *flags, "--train", "sharded"], own_home, [tmp_path] * 2
    ) as made:
        for done in ended(made):
            assert "each must hold the whole student" in said(done)
    homes = [tmp_path / "a", tmp_path / "b"]
    for seed, home in enumerate(homes):
        tiny.make(home / "model", seed=seed)
    with started(
        2, ["-m", "mis_mlx.distill", *flags, "--teacher", "model"], own_home, homes
    ) as made:
        for done in ended(made):
            assert "machine 1 has a different teacher from machine 0" in said(done)
    assert not [*tmp_path.rglob("runs")]


# Both say that they are there; then the second waits for a first that is busy, or both talk.
WAITING = """
import sys, time
from mis_mlx.models.passing import distributed
distributed.all_gather(0)
print("up", flush=True)
began = time.monotonic()
try:
    while True:
        time.sleep(40 if distributed.is_main() and sys.argv[1] == "busy" else 0.1)
        distributed.all_gather(0)
except distributed.Lost:
    print(time.monotonic() - began)
"""
CABLE = """
import os, subprocess, sys
from tests.machines import ended, started
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
with started(2, ["-c", *sys.argv[1:]], os.environ) as made:
    for process in made:
        assert process.stdout.readline() == "up\\n"
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    print(*(done.stdout.strip() for done in ended(made, 90)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["busy", "talks"])
def test_a_pulled_cable_is_noticed_within_a_minute(first: str, own_home: dict[str, str]) -> None:
    """In a network of their own whose only link goes down, so that nobody says goodbye: measured,
    30 s.
    """
    tools = shutil.which("unshare") and shutil.which("ip")
    if (
        not tools
        or subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs Linux, ip, and leave to make a network")
    argv = ["unshare", "-rn", sys.executable, "-c", CABLE, WAITING, first]
    done = subprocess.run(
        argv, env={**own_home, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    seconds = [float(word) for word in done.stdout.split()]
    assert len(seconds) == 2
    assert max(seconds[first == "busy" :]) < 60


SOON = ("--iters", 6, "--save-every", 2, "--max-seq-length", 96, "--dtype", "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sft", ("--learning-rate", "1e-3", "--fine-tune-type", "lora", "--batch-size", 3)),
        ("dpo", ("--learning-rate", "1e-4", "--batch-size", 2)),
    ],
)
def test_alignment_is_that_of_one_machine(
    tmp_path: Path,
    name: str,
    more: tuple[object, ...],
    llama: Checkpoint,
    answers: Path,  # noqa: F811
    own_home: dict[str, str],
) -> None:
    """Losses, gradient norms and what is held out, to 1e-4; two machines train, the first one
    measures and writes.
    """
    results = []
    for n in (1, 2):
        flags = ("--model", llama.path, "--data", answers, *SOON, *more, "--out", tmp_path / str(n))
        with started(n, ["-m", f"mis_mlx.{name}", *flags], own_home) as made:
            done = ended(made)
        assert [d.returncode for d in done] == [0] * n, [d.stderr for d in done]
        results.append(last_line(done[0]))
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-4, atol=1e-6)
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["best_step"] == results[1]["best_step"]
    assert results[1]["held_out_best"]["loss"] == pytest.approx(
        results[0]["held_out_best"]["loss"], rel=1e-4
    )
    assert (tmp_path / "2").joinpath(*Path(results[1]["student"]).parts[-1:]).is_dir()


@pytest.mark.slow
def test_machines_share_the_questions_of_grpo(
    tmp_path: Path, small: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """Each samples its own questions; the log holds all of them, and it goes
    on after a kill.
    """
    out = tmp_path / "run"
    with started(2, ["-m", "mis_mlx.grpo", *small, "--out", out], own_home) as made:
        wait_for(3, out, made)
        made[1].send_signal(signal.SIGKILL)
        assert GONE in said(ended(made, seconds=60)[0])
    with started(2, ["-m", "mis_mlx.grpo", "--out", out, "--resume"], own_home) as made:
        done = ended(made)
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    assert [number for number, _, _ in losses(out)] == list(range(1, 9))
    said_lines = [
        json.loads(line) for line in (out / grpo_rollout.SAMPLES).read_text().splitlines()
    ]
    by_step: dict[int, list[str]] = {}
    for line in said_lines:
        by_step.setdefault(line["number"], []).append(line["prompt"])
    assert all(len(set(prompts)) == 2 for prompts in by_step.values())
