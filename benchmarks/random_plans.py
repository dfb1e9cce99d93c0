"""Does a plan keep its word? Random models, options and budgets: what it refuses, what it takes.

    scripts/mis benchmarks/random_plans.py [--count 400]    # an hour on 2 cores

Draws a small model of some family, `quantize` or `distill`, its options and a budget around what
the plan says of it, and asks with --dry-run whether that fits. Every seventh draw also runs in a
process of its own, whose largest resident set is read: in the budget drawn where the plan takes
it, else in the least that the refusal names. Wrong are a plan that is taken and takes more than its
budget or does not come to its end, and one that is refused although the least that runs takes less
than four fifths of it.

The largest models have 130 MB of weights; so most of what is tested is what each process takes.
Writes benchmarks/results/<machine>/random_plans.json after every draw, and goes on where it was
stopped.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import laboratory

from mis_mlx import cli, distill, quantize
from mis_mlx.types import Count, MisError

sys.path.insert(0, str(laboratory.ROOT))
from tests import tiny

COMMANDS: dict[str, Any] = {"quantize": quantize, "distill": distill}
FAMILIES = {**tiny.KINDS, **tiny.FAMILIES}
EVERY = 7  # draws, of which one runs
MARGIN = 1.25  # a plan may say so many times of what is taken
PLENTY = "8GiB"
SIZES: list[dict[str, Any]] = [
    {"scenario": "none"},
    {"scenario": "goral"},
    {"scenario": "gazda"},
    {"scenario": "half-ffn"},
    {"scenario": "half-vocab"},
    {"vocab": "0.5x"},
]
# Runs a command and prints the largest resident set, as the kernel counts, in KiB; of a process of
# its own, for what starts a process counts as that one's until it becomes the command.
LARGEST = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@dataclass(frozen=True)
class Settings:
    """How many."""

    count: Count = 400
    """draws"""


def model(draw: random.Random, folder: Path) -> str:
    """The family of a new model of random weights in `folder`."""
    kind = draw.choice(sorted(FAMILIES))
    config = {**tiny.CONFIG, **FAMILIES[kind]}
    if draw.random() < 0.6:  # weights and logits that outweigh what differs between two runs
        width = draw.choice([128, 256])
        config |= {"hidden_size": width, "head_dim": width // config["num_attention_heads"]}
        config["vocab_size"] = draw.choice([4096, 32_768])
        if "vocab_size_per_layer_input" in config:
            config["vocab_size_per_layer_input"] = config["vocab_size"]
        for key in ("intermediate_size", "moe_intermediate_size"):
            if key in config:
                config[key] = draw.choice([768, 2048])
    tiny.make(folder, seed=draw.randrange(99), dtype=draw.choice(["F32", "BF16"]), **config)
    return kind


def options(draw: random.Random, name: str) -> dict[str, Any]:
    """Flags of a short run of a command; None leaves one out."""
    flags = {
        "max_seq_length": draw.choice([32, 128, 256, 512]),
        "batch_size": draw.choice([1, 2, 4]),
        "num_samples": draw.choice([2, 8, 32]),
        "q_method": draw.choice(["round", "gptq"]),
        "target_bpw": draw.choice([None, 3.5, 5.0]),
        "q_iters": draw.choice([None, 0, 2]),
        "q_group_size": draw.choice([32, 64]),
    }
    if name == "distill":
        flags |= draw.choice(SIZES) | {
            "iters": 2,
            "reconstruct_samples": draw.choice([0, 4, 16]),
            "train": draw.choice([None, None, "blocks", "sharded", "none"]),
            "grad_accumulation_steps": draw.choice([1, 2]),
            "eval_windows": draw.choice([2, 8]),
            "quantize": draw.choice([None, None, 0]),
        }
    return {key: value for key, value in flags.items() if value is not None}


def asked(name: str, flags: Mapping[str, Any], budget: str) -> tuple[bool, int, str]:
    """(whether the plan takes it, its peak in bytes or 0, what it says)."""
    module = COMMANDS[name]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            found = module.run(module.Settings(**flags, budget=budget, dry_run=True))
        except MisError as error:
            if "the budget is" not in str(error):
                raise
            return False, 0, str(error)
    return not found["check_failed"], found["peak_bytes"], said.getvalue()


def taken(name: str, flags: Mapping[str, Any], budget: str) -> tuple[int, int, str]:
    """(largest resident set in bytes, exit code, the last that it says) of the command."""
    words = [sys.executable, "-m", "mis_mlx", name, "--budget", budget]
    for key, value in flags.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    line = [sys.executable, "-c", LARGEST, *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=laboratory.ROOT)
    return int(done.stdout) * 1024, done.returncode, done.stderr[-300:]


def drawn(number: int, temp: Path) -> dict[str, Any]:
    """What the plan says of a draw in bytes, and what the run took."""
    draw = random.Random(number)
    name = draw.choice(list(COMMANDS))
    family = model(draw, temp / "model")
    given = options(draw, name)
    share = draw.uniform(0.3, 1.3)
    found: dict[str, Any] = {"command": name, "family": family, "flags": given}
    found["weights"] = sum(file.stat().st_size for file in temp.glob("model/*.safetensors"))
    places = {"quantize": ("model", "mlx_path"), "distill": ("teacher", "out")}[name]
    flags = dict(zip(places, map(str, (temp / "model", temp / "out")), strict=True)) | given
    try:
        _, most, _ = asked(name, flags, PLENTY)
    except MisError as error:  # such as a width that groups do not divide
        return {**found, "impossible": str(error).replace(str(temp), "")}
    budget = f"{round(share * most / 2**20)}MiB"
    fits, planned, said = asked(name, flags, budget)
    found |= {"budget": budget, "fits": fits, "planned": planned}
    advised = re.search(r"give --budget (\w+)", said)
    if not fits:
        assert advised, said
        budget = found["least"] = advised[1]
    if number % EVERY == 0:
        nbytes, code, last = taken(name, flags, budget)
        found |= {"taken": nbytes, "code": code}
        if code:
            found["last"] = last
    return found


def in_own_folder(number: int) -> dict[str, Any]:
    """A draw, and nothing is left of it."""
    with tempfile.TemporaryDirectory() as temp:
        return drawn(number, Path(temp))


def wrong(row: Mapping[str, Any]) -> str:
    """What is wrong with a plan by its run; '' where nothing is, or it did not run."""
    if "taken" not in row:
        return ""
    if row["code"]:
        return "it did not come to its end"
    budget = cli.parse_bytes(row["budget"])
    if row["fits"]:
        return "it takes more than its budget" if row["taken"] > budget else ""
    return "it was refused, but runs" if MARGIN * row["taken"] < budget else ""


def main(s: Settings) -> None:
    """All draws, then how many were wrong."""
    rows: list[tuple[str, Callable[[], dict[str, Any] | None]]] = []
    rows += [(str(number), partial(in_own_folder, number)) for number in range(s.count)]
    given = {"every": EVERY}
    found = laboratory.experiment(
        "random_plans", "scripts/mis benchmarks/random_plans.py", given, rows
    )
    fits = [row["fits"] for row in found.values() if "fits" in row]
    ran = sum("taken" in row for row in found.values())
    cli.say(f"{len(found)} draws: {sum(fits)} fit, {len(fits) - sum(fits)} refused; {ran} ran")
    for number, row in found.items():
        if why := wrong(row):
            cli.say(f"{number}, {row['command']} of {row['family']}: {why}")


if __name__ == "__main__":
    laboratory.start(Settings, main)
