"""Quantizing a model that is large for its machine: time and memory of ours beside mlx_lm's
programs.

    scripts/mis benchmarks/quantizing.py
    scripts/mis benchmarks/quantizing.py --shape 7b    # two blocks of a 7 B model, ours only

A model of the shape of a 0.5 B one with 152 thousand tokens and of random weights, so there is
nothing to say of its quality (benchmarks/rivals.py has that, of real ones). Whoever
calibrates sees the same windows, whoever trains makes as many steps; mlx_lm's functions are called
as its commands call them, in float32, ours are `mis_mlx.quantize`. Every row is a process of its
own, whose largest resident set is counted from when the text is ready (Linux); what the process
held then is not in it. A row that takes longer than LIMIT_S is stopped: MLX's kernels for packed
weights are slow on a CPU, and dwq trains through them. Writes
benchmarks/results/<machine>/quantizing.json after every row, or quantizing_7b.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import laboratory
import other_quantizers
import psutil
import streaming
from planned import HALF

from mis_mlx import cli, quantize
from mis_mlx.data import preparation
from mis_mlx.distillation import train_loop
from mis_mlx.models.opening import compute_type, load

GIVEN: dict[str, Any] = {"num_samples": 4, "max_seq_length": 128, "q_iters": 4}
OURS: dict[str, dict[str, Any]] = {
    "ours, rounded": {"q_method": "round", "target_bpw": None, "q_iters": 0},
    "ours, gptq": {"target_bpw": None, "q_iters": 0},
    "ours, mixed gptq": {"q_iters": 0},
    # scales that learn need the model in memory, and what it computes
    "ours, mixed gptq tuned": {"budget": "6GiB"},
}
EIGHT: dict[str, Any] = {"num_samples": 8, "target_bpw": None, "q_iters": 0}
OF_EIGHT = "ours, gptq, 8 windows"
SEVEN = {
    "num_hidden_layers": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SEVEN_ROWS: dict[str, dict[str, Any]] = {
    "ours, mixed rounded": EIGHT | {"target_bpw": 3.5, "q_method": "round"},
    OF_EIGHT: EIGHT,
}
SMALL = "2GiB"
LARGE = "4GiB"
LIMIT_S = 1800
DYNAMIC_BITS = 4.5  # of a weight: of our default
THEIRS = ("mlx_lm convert", "mlx_lm gptq", "mlx_lm awq", "mlx_lm dwq", "mlx_lm dynamic_quant")


@dataclass(frozen=True)
class Settings:
    """What of it."""

    shape: Literal["0.5b", "7b"] = "0.5b"
    """whose shape the model of random weights has"""
    work: str | None = None
    """one row, set by the program itself: its name and the model's folder"""


def maker(name: str, model: str) -> Callable[[Path], Any]:
    """What writes the row's folder, its text made ready."""
    if name in THEIRS:
        return their_maker(name, Path(model))
    label, _, budget = name.partition(" under ")
    how = {**GIVEN, **(OURS | SEVEN_ROWS)[label]}
    if budget:
        how["budget"] = budget
    return lambda out: quantize.run(quantize.Settings(model=model, mlx_path=str(out), **how))


def their_maker(name: str, folder: Path) -> Callable[[Path], Any]:
    """`maker` of a program of mlx_lm's; gptq and awq keep 8 bits for the embedding."""
    train = preparation.prepare(None, load.tokenizer(folder), GIVEN["max_seq_length"]).train
    batches = preparation.calibration(train, GIVEN["num_samples"], 0)
    if name == "mlx_lm convert":
        return partial(laboratory.packed, folder)
    if name == "mlx_lm gptq":
        return lambda out: other_quantizers.gptq(folder, out, batches, embedding_bits=8)
    if name == "mlx_lm awq":
        of_table: dict[str, Any] = {"embedding_bits": 8, "embedding_group": 64}
        return lambda out: other_quantizers.awq(folder, out, batches, **of_table, steps=10)
    if name == "mlx_lm dwq":
        return lambda out: other_quantizers.dwq(folder, out, train, GIVEN["q_iters"])
    return lambda out: other_quantizers.dynamic_quant(folder, out, batches, DYNAMIC_BITS)


def row(name: str, model: str) -> dict[str, Any]:
    """{"seconds", "peak_bytes", "nbytes"}."""
    with tempfile.TemporaryDirectory() as temp, redirect_stdout(sys.stderr):
        make = maker(name, model)
        out = Path(temp) / "out"
        held = psutil.Process().memory_info().rss
        began = train_loop.CLOCK.monotonic()
        laboratory.count_anew()
        make(out)
        seconds = train_loop.CLOCK.monotonic() - began
        peak = laboratory.largest() - held
        return {
            "seconds": round(seconds, 1),
            "peak_bytes": peak,
            "nbytes": compute_type.open_to_compute(out).nbytes,
        }


def names_of(shape: str) -> list[str]:
    """All rows of a shape, the slowest last."""
    if shape == "7b":
        return [f"{name} under {LARGE}" for name in SEVEN_ROWS]
    slow = [name for name in THEIRS if "dwq" in name]
    small = [*(name for name in OURS if "tuned" not in name), OF_EIGHT]
    return [
        *(name for name in THEIRS if name not in slow),
        *OURS,
        *(f"{name} under {SMALL}" for name in small),
        *slow,
    ]


def alone(name: str, model: Path) -> dict[str, Any] | None:
    """A row measured in a process of its own; None where that failed."""
    hot = laboratory.busy(name)
    line = [sys.executable, __file__, f"--work={json.dumps([name, str(model)])}"]
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"stopped_after_s": LIMIT_S, "hot": hot}
    if done.returncode:
        cli.say(f"{name}: its process ended with {done.returncode}")
        return None
    return {**json.loads(done.stdout.splitlines()[-1]), "hot": hot}


def main(s: Settings) -> None:
    """All rows that are not there yet."""
    if s.work:
        print(json.dumps(row(*json.loads(s.work))))
        return
    names = names_of(s.shape)
    file = "quantizing"
    command = "scripts/mis benchmarks/quantizing.py"
    sizes = HALF
    if s.shape == "7b":
        file = "quantizing_7b"
        command += " --shape 7b"
        sizes = SEVEN
    with tempfile.TemporaryDirectory() as temp:
        model = streaming.synthetic(Path(temp) / "model", sizes)
        rows = [(name, partial(alone, name, model)) for name in names]
        laboratory.experiment(file, command, GIVEN, rows)


if __name__ == "__main__":
    laboratory.start(Settings, main)
