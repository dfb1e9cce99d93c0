"""The real teacher, SmolLM2-135M-Instruct: minutes on two cores, so all of it is `slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.judge.speed import rounds
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing import stream
from mis_mlx.reporting import run_reader
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint

pytestmark = pytest.mark.slow

# Written for this test, plain and without names.
ENGLISH = (
    "In the morning the old woman opened the window and looked at the garden. It had rained during "
    "the night, and the air smelled of wet grass. She made a cup of tea, sat down at the kitchen "
    "table and began to read the newspaper. There was not much news. The price of bread had gone "
    "up again, the bridge over the river was still closed, and the weather for the next few days "
    "would be cold but dry. She finished her tea, put on her coat and went out to buy some milk "
    "and a loaf of bread before the shop became too busy."
)


@pytest.fixture(scope="module")
def real() -> Checkpoint:
    """The teacher that is always there, from the cache, the hub or the package index."""
    return load.open_checkpoint(resolve.resolve_model().path)


def test_it_reads_english(real: Checkpoint) -> None:
    """Perplexity under 25, in stock mlx-lm and streamed; rows of q and k in a wrong order give over
    100.
    """
    assert (
        arch.params(real.config)
        == sum(int(np.prod(t.shape)) for t in real.tensors.values())
        == 134_515_008
    )
    model, tokenizer = load.mlx_lm("utils").load(str(real.path))
    model.set_dtype(mx.float32)
    ids = mx.array([tokenizer.encode(ENGLISH)])
    loss = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")
    assert 3 < mx.exp(loss).item() < 25
    head = load.head(real, mx.float32)
    streamed = load.logits(head, stream.Stream(real, mx.float32).forward([ids[:, :-1]])[0])
    assert mx.array_equal(streamed, model(ids[:, :-1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, result) of `distill --scenario half-ffn --iters 4 --q-iters 0`, the rest small."""
    out = tmp_path_factory.mktemp("real") / "run"
    flags = ["--scenario", "half-ffn", "--keep-steps", "--iters", 4, "--q-iters", 0]
    flags += ["--num-samples", 8, "--reconstruct-samples", 8, "--eval-windows", 4]
    flags += ["--eval-prompts", 2]
    argv = [sys.executable, "-m", "mis_mlx.distill", "--out", out, *flags, "--max-seq-length", 128]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        list(map(str, argv)), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


def test_all_four_folders_speak(run: tuple[Path, dict[str, Any]], real: Checkpoint) -> None:
    """Stock mlx-lm opens teacher, pruned, distilled and 4-bit; each generates text of real
    tokens.
    """
    out, _ = run
    for folder in (real.path, out / "pruned", out / "distilled", out / "model"):
        model, tokenizer = rounds.open_model(compute_type.open_to_compute(folder))
        ids = tokenizer.encode("The capital of France is")
        said = tokenizer.decode(list(rounds.greedy(model, ids, 8)))
        assert said.strip(), folder
        if folder == real.path:
            assert "Paris" in said


def test_the_numbers_are_in_order(run: tuple[Path, dict[str, Any]]) -> None:
    """Half of the FFN; the teacher is best, four steps and the repair beat bare pruning, 4 bits
    cost a little.
    """
    out, result = run
    assert (result["params_teacher"], result["params_student"]) == (134_515_008, 90_275_904)
    assert result["nll_teacher"] < result["nll_student"] < result["nll_pruned"]
    assert result["nll_student"] - 0.05 < result["nll_quantized"] < result["nll_student"] + 1.0
    assert result["bytes_4-bit"] < 0.6 * result["bytes_distilled"]
    assert all(np.isfinite(r["loss"]) for r in run_folder.metrics(out))
    assert len(run_folder.metrics(out)) == 4


def test_the_planned_peak_holds(run: tuple[Path, dict[str, Any]]) -> None:
    """MLX's peak in training is under the plan's for that phase, and not by more than a factor of
    three; the run went through the phases that it planned.
    """
    story = run_reader.read(run[0])
    planned = {p["phase"]: p["peak_bytes"] for p in story.begun["planned"]}
    peak = max(r["peak_bytes"] for r in run_folder.metrics(run[0]))
    assert planned["distil"] / 3 < peak < planned["distil"]
    assert set(story.took()) == planned.keys()


BUDGET_MIB = 480  # of a teacher of 538 MB in float32, which is read from disk
SMALL = (
    *("--max-seq-length", "64", "--num-samples", "4", "--eval-windows", "3"),
    *("--eval-prompts", "2", "--q-iters", "2"),
)


# Runs a command and prints the largest resident set, as the kernel counts. A process of its own: of
# a child that pytest starts, pytest's own memory would count until it becomes the command.
LARGEST = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def distilled(out: Path, *flags: str) -> int:
    """`distill` into `out`: the process's largest resident set in bytes."""
    command = [sys.executable, "-m", "mis_mlx", "distill", "--out", str(out), *SMALL, *flags]
    line = [sys.executable, "-c", LARGEST, *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(run, largest resident set) of a teacher that is bigger than the budget."""
    folder = tmp_path_factory.mktemp("streamed")
    teacher = resolve.resolve_model(None).path
    load.mlx_lm("convert").convert(str(teacher), str(folder / "teacher"), dtype="float32")
    flags = ("--teacher", str(folder / "teacher"), "--budget", f"{BUDGET_MIB}MiB")
    return folder / "run", distilled(folder / "run", *flags)


def test_a_whole_run_stays_below_its_budget(streamed: tuple[Path, int]) -> None:
    """The process, search and judging included, never holds more than --budget."""
    assert streamed[1] <= BUDGET_MIB * 2**20


def test_a_streamed_run_goes_through_the_phases_that_it_planned(
    streamed: tuple[Path, int],
) -> None:
    """Nothing was done that the time line had left out."""
    run = run_reader.read(streamed[0])
    assert set(run.took()) == {phase["phase"] for phase in run.begun["planned"]}
