"""`distill` and its like on several machines, as a user starts them: one run, one voice, and a way on when one dies."""

from __future__ import annotations

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
from tests.conftest import Done, last_line, losses
from tests.machines import ROOT, Processes, ended, ports, started
from tests.test_grpo import _folder, _small  # noqa: F401  fixtures
from tests.test_sft import answers  # noqa: F401  a fixture

DENSE = ("--quantize", 0, "--eval-windows", 1)
GONE = "a machine beside this one is gone"


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


def launched(env: dict[str, str], n: int, command: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """`mlx.launch -n N python -m mis_mlx.COMMAND FLAGS` to its end, which is 0 whatever became of the commands."""
    launch = Path(sys.executable).parent / "mlx.launch"
    argv = [launch, "-n", n, "-p", ports(1)[0], sys.executable, "-m", f"mis_mlx.{command}", *flags]
    pipe = subprocess.PIPE  # stdin among them: of what has ended, such as /dev/null, mlx.launch reads without rest
    process = subprocess.Popen(
        [*map(str, argv)], env={**env, "PYTHONPATH": str(ROOT)}, stdin=pipe, stdout=pipe, stderr=pipe,
        text=True,
    )  # fmt: skip
    try:
        process.wait(300)
        assert process.stdout and process.stderr
        return subprocess.CompletedProcess(argv, process.returncode, process.stdout.read(), process.stderr.read())
    finally:
        process.kill()
        process.communicate()


def test_mlx_launch_gives_the_run_of_one_machine(
    tmp_path: Path, finished: tuple[Path, Done], flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """Two machines, calibration to table: the same files, the pruned student bit for bit, every loss to 1e-4 (measured:
    5e-6), one JSON line; and the second machine leaves nothing behind."""
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    done = launched({**own_home, "TMPDIR": str(scratch)}, 2, "distill", *flags, "--out", out)
    result, alone = last_line(done), last_line(finished[1])
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1
    assert done.stderr.count("run folder:") == 1
    assert result["tokens"] == alone["tokens"]
    assert result["nll_quantized"] == pytest.approx(alone["nll_quantized"], rel=1e-3)
    of = "pruned/model.safetensors"
    assert (out / of).read_bytes() == (finished[0] / of).read_bytes()
    np.testing.assert_allclose(losses(out), losses(finished[0]), rtol=1e-4)
    names = {str(p.relative_to(out)) for p in out.rglob("*")} - {"thermal.jsonl", run_folder.SAMPLES}
    assert names == {str(p.relative_to(finished[0])) for p in finished[0].rglob("*")} - {
        "thermal.jsonl",
        run_folder.SAMPLES,
    }
    assert not [p for p in scratch.iterdir() if p.name.startswith("mis_mlx-")]


def test_one_machine_dies_and_any_number_goes_on(
    tmp_path: Path, finished: tuple[Path, Done], flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """The second of two is killed: the first saves the last step and ends within a minute with a sentence; 1, 2 and 3
    machines go on from that step, and their losses are those of a run that nobody killed."""
    out = tmp_path / "run"
    with started(2, ["-m", "mis_mlx.distill", *flags, *DENSE, "--out", out], own_home) as made:
        wait_for(9, out, made)
        made[1].send_signal(signal.SIGKILL)
        first = ended(made, seconds=60)[0]
    step = len(run_folder.metrics(out))
    assert GONE in said(first) and f"--out {out} --resume" in said(first)
    assert 9 <= step < 30 and (out / "steps" / f"step-{step:08d}").is_dir()
    for n in (1, 2, 3):
        copy = shutil.copytree(out, tmp_path / str(n))
        with started(n, ["-m", "mis_mlx.distill", "--out", copy, "--resume"], own_home) as made:
            done = ended(made)
        assert [d.returncode for d in done] == [0] * n, done[0].stderr
        assert f"continuing from step {step}" in done[0].stderr
        assert not any(d.stderr or d.stdout for d in done[1:])
        np.testing.assert_allclose(losses(copy), losses(finished[0]), rtol=1e-4)


def test_machines_train_block_by_block_as_one_does(
    tmp_path: Path, flags: tuple[object, ...], own_home: dict[str, str]
) -> None:
    """Gradients of each block are added up before its update: losses to 1e-3, for 8 bits may fall to either side."""
    for n in (1, 2):
        more = [*flags, *DENSE, "--train", "blocks", "--iters", "6", "--out", tmp_path / str(n)]
        with started(n, ["-m", "mis_mlx.distill", *more], own_home) as made:
            done = ended(made)
        assert [d.returncode for d in done] == [0] * n, done[0].stderr
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-3)


@pytest.mark.slow
def test_the_one_that_writes_dies(
    tmp_path: Path, flags: tuple[object, ...], own_home: dict[str, str], command: Callable[..., Done]
) -> None:
    """The first of three is killed: the others end with a sentence, leave nothing, and the last checkpoint goes on."""
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    env = {**own_home, "TMPDIR": str(scratch)}
    with started(3, ["-m", "mis_mlx.distill", *flags, *DENSE, "--out", out], env) as made:
        wait_for(9, out, made)
        made[0].send_signal(signal.SIGKILL)
        for number, done in enumerate(ended(made, seconds=60)[1:], 1):
            assert said(done).startswith(f"mis_mlx: machine {number}: {GONE}")
    assert not [p for p in scratch.iterdir() if p.name.startswith("mis_mlx-")]
    done = command("distill", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stderr
    assert [number for number, _, _ in losses(out)] == list(range(1, 31))


@pytest.mark.parametrize(
    ("n", "spread"), [(2, "whole"), *(pytest.param(n, "layers", marks=pytest.mark.slow) for n in (2, 3))]
)
def test_evaluate_says_what_one_machine_says(
    n: int, spread: str, tmp_path: Path, llama: Checkpoint, text_folder: Path, own_home: dict[str, str]
) -> None:
    """Options, answers that are written, held-out text and --kld: the same figures; the first machine keeps answers
    and writes the page, the others say nothing; what is kept is not asked again."""
    pytest.importorskip("matplotlib")
    student, tasks = tiny.make(tmp_path / "student", seed=3), tmp_path / "tasks"
    tasks.mkdir()
    options = [{"question": f"{k} if", "options": ["loop", "while", "for"], "answer": "for"} for k in range(40)]
    written = [{"prompt": f"{k}?", "answer": str(k), "language": "en"} for k in range(40)]
    for name, rows in (("options", options), ("written", written)):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--teacher", llama.path, "--students", student, "--data", text_folder, "--max-seq-length", 64]
    common += ["--eval-windows", 5]
    said = {}
    for machines in (1, n):
        home = tmp_path / f"home-{machines}"
        env = {**own_home, "HOME": str(home), "MIS_MLX_CACHE": str(home / "cache")}
        how = [*common, "--spread", spread]
        for kind, flags in (
            ("table", ["--tasks", tasks, "text", "--num-questions", 40, "--out", home / "out"]),
            ("again", ["--tasks", tasks, "--num-questions", 40]),
            ("kld", ["--kld"]),
        ):
            with started(machines, ["-m", "mis_mlx.evaluate", *how, *flags], env) as made:
                done = ended(made)
            assert [d.returncode for d in done] == [0] * machines, [d.stderr for d in done]
            assert not any(d.stdout or d.stderr for d in done[1:])
            said[kind, machines] = done[0]
        assert "4 of 4 known from before" in said["again", machines].stderr
    for kind in ("table", "again", "kld"):
        one, many = (last_line(said[kind, machines]) for machines in (1, n))
        one.pop("out", None), many.pop("out", None)
        _alike(one, many)
    one_page, page = ((tmp_path / f"home-{machines}" / "out" / "recovery.md").read_text() for machines in (1, n))
    assert one_page == page
    kept = [[p.read_text() for p in sorted((tmp_path / f"home-{m}").rglob("*.jsonl"))] for m in (1, n)]
    assert kept[0] == kept[1] and len(kept[0]) == 4


def _alike(one: object, other: object) -> None:
    """The same JSON, numbers to 1e-9: sums over machines are made in another order."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            _alike(one[key], other[key])
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-12)
    else:
        assert one == other


def test_what_several_machines_cannot_do(tmp_path: Path, flags: tuple[object, ...], own_home: dict[str, str]) -> None:
    """Refused by every one of them, before work: a command for one machine; a student that is not whole; another
    teacher on another machine."""
    with started(2, ["-m", "mis_mlx.plan"], own_home) as made:
        for done in ended(made):
            assert "is for one machine alone" in said(done)
    with started(2, ["-m", "mis_mlx.distill", *flags, "--train", "sharded"], own_home, [tmp_path] * 2) as made:
        for done in ended(made):
            assert "train a student that each has whole in memory" in said(done)
    homes = [tmp_path / "a", tmp_path / "b"]
    for seed, home in enumerate(homes):
        tiny.make(home / "model", seed=seed)
    with started(2, ["-m", "mis_mlx.distill", *flags, "--teacher", "model"], own_home, homes) as made:
        for done in ended(made):
            assert "machine 1 has another teacher than machine 0" in said(done)
    assert not [*tmp_path.rglob("runs")]


# Both say that they are there; then the second waits for a first that is busy, or both talk.
WAITING = """
import sys, time
from mis_mlx.models import distributed
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
    """In a network of their own whose only link goes down, so that nobody says goodbye: measured, 30 s."""
    tools = shutil.which("unshare") and shutil.which("ip")
    if not tools or subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs Linux, ip, and leave to make a network")
    argv = ["unshare", "-rn", sys.executable, "-c", CABLE, WAITING, first]
    done = subprocess.run(argv, env={**own_home, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    seconds = [float(word) for word in done.stdout.split()]
    assert len(seconds) == 2 and max(seconds[first == "busy" :]) < 60


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
    tmp_path: Path, name: str, more: tuple[object, ...], llama: Checkpoint, answers: Path,  # noqa: F811
    own_home: dict[str, str],
) -> None:  # fmt: skip
    """Losses, gradient norms and what is held out, to 1e-4; two machines train, the first one measures and writes."""
    results = []
    for n in (1, 2):
        flags = ("--model", llama.path, "--data", answers, *SOON, *more, "--out", tmp_path / str(n))
        with started(n, ["-m", f"mis_mlx.{name}", *flags], own_home) as made:
            done = ended(made)
        assert [d.returncode for d in done] == [0] * n, [d.stderr for d in done]
        results.append(last_line(done[0]))
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-4, atol=1e-6)
    assert results[0]["tokens"] == results[1]["tokens"] and results[0]["best_step"] == results[1]["best_step"]
    assert results[1]["held_out_best"]["loss"] == pytest.approx(results[0]["held_out_best"]["loss"], rel=1e-4)
    assert (tmp_path / "2").joinpath(*Path(results[1]["student"]).parts[-1:]).is_dir()


@pytest.mark.slow
def test_machines_share_the_questions_of_grpo(
    tmp_path: Path, small: tuple[object, ...], own_home: dict[str, str]
) -> None:  # fmt: skip
    """Each samples its own questions, by a seed of its own; the log holds all of them, and it goes on after a kill."""
    out = tmp_path / "run"
    with started(2, ["-m", "mis_mlx.grpo", *small, "--out", out], own_home) as made:
        wait_for(3, out, made)
        made[1].send_signal(signal.SIGKILL)
        assert GONE in said(ended(made, seconds=60)[0])
    with started(2, ["-m", "mis_mlx.grpo", "--out", out, "--resume"], own_home) as made:
        done = ended(made)
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    assert [number for number, _, _ in losses(out)] == list(range(1, 9))
    said_lines = [json.loads(line) for line in (out / grpo_rollout.SAMPLES).read_text().splitlines()]
    by_step = {
        step: [r["prompt"] for r in said_lines if r["number"] == step] for step in {r["number"] for r in said_lines}
    }
    assert all(len(set(prompts)) == 2 for prompts in by_step.values())
