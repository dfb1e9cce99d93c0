"""Golden runs: what the main commands make, repeated and compared with what they made before.

    scripts/mis benchmarks/golden.py                         # the short form of every case
    scripts/mis benchmarks/golden.py --only default          # some cases; whole ones by name alone
    scripts/mis benchmarks/golden.py --record                # store what comes out
    scripts/mis benchmarks/golden.py --qwen FOLDER           # the 0.5 B, which no package installs

A case is one or two commands, each in a process of its own with one BLAS thread, so that bytes do
not depend on what else the machine does. Compared: sha256 of the weights that were written, every
figure of the result's JSON, its keys, CPU seconds, and the process's largest resident set (VmHWM).
Code that only moves keeps bytes. Code that changes arithmetic keeps losses within what seeds do,
memory not above, CPU seconds within a tenth. Writes benchmarks/results/<machine>/golden.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e2b
import laboratory
import planned

from mis_mlx import cli
from mis_mlx.models.architectures import arch

GEMMA = ("--teacher", "gemma-3-270m", "--accept-gemma-terms")
SHORT = (
    *("--max-seq-length", "128", "--num-samples", "8", "--reconstruct-samples", "8"),
    *("--eval-windows", "6", "--eval-prompts", "6", "--q-iters", "4"),
)
DISTILL = ("distill", "--out", "run")
ROUND = ("quantize", "--q-iters", "4", "--mlx-path", "packed")
# Paths are below the case's own folder; MIXTURE and QWEN are folders of models.
CASES: dict[str, list[tuple[str, ...]]] = {
    "default, short": [(*DISTILL, *SHORT)],
    "half-vocab, short": [(*DISTILL, *SHORT, "--scenario", "half-vocab", "--iters", "6")],
    "gemma-3-270m, short": [(*DISTILL, *SHORT, *GEMMA)],
    "mixture, short": [
        (*DISTILL, *SHORT, "--teacher", "MIXTURE", "--scenario", "fewer-experts", "--iters", "2")
    ],
    "quantize 4.5, export": [
        (*ROUND, "--target-bpw", "4.5"),
        ("export", "--model", "packed", "--out", "gguf"),
    ],
    "quantize 3.5": [(*ROUND, "--target-bpw", "3.5")],
    "0.5 B in 5 GiB, short": [(*DISTILL, *SHORT, "--teacher", "QWEN", "--budget", "5GiB")],
    "0.5 B in 1 GiB, short": [(*DISTILL, *SHORT, "--teacher", "QWEN", "--budget", "1GiB")],
    "default": [DISTILL],
    "0.5 B in 5 GiB": [(*DISTILL, "--teacher", "QWEN", "--budget", "5GiB")],
    "0.5 B in 1 GiB": [(*DISTILL, "--teacher", "QWEN", "--budget", "1GiB")],
}
WHOLE = ("default", "0.5 B in 5 GiB", "0.5 B in 1 GiB")
# Of the result: what depends on the machine and the hour.
OF_THE_HOUR = ("seconds", "ttft_", "decode_tps", "tokens_per_s", "t_env", "altitude", "tea_")


@dataclass(frozen=True)
class Settings:
    """Which cases, and whether what comes out is stored."""

    only: tuple[str, ...] = ()
    """cases by name (default: all short ones)"""
    record: bool = False
    """store what comes out, in place of what was there"""
    qwen: str | None = None
    """folder of Qwen2.5-Coder-0.5B-Instruct; without it, its cases are left out"""


def mixture() -> Path:
    """The folder of a mixture of experts of random weights, made once."""
    folder = Path(tempfile.gettempdir()) / "mis-golden-mixture"
    if not folder.exists():
        config = {**planned.MIXTURE, "bos_token_id": 0, "eos_token_id": 1}
        tensors = arch.tensors_of(config, stacked=False)
        e2b.write_folder(folder, config, {name: ("BF16", shape) for name, shape in tensors.items()})
    return folder


def figures(value: Any, under: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a result but what belongs to the hour, or names a path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from figures(inner, f"{under}.{key}" if under else key)
    elif not any(word in under for word in OF_THE_HOUR) and not str(value).startswith("/"):
        yield under, value


def weights(folder: Path) -> dict[str, str]:
    """{file: twelve digits of its sha256} of every file of weights below the folder."""
    found = {}
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.gguf")]):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(folder))] = digest[:12]
    return found


def run(commands: list[tuple[str, ...]], models: dict[str, str]) -> dict[str, Any]:
    """What a case makes: weights, figures, CPU seconds, and the largest resident set."""
    cpu_s, peak_bytes = 0.0, 0
    told = dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="golden-") as temp:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for flags in commands:
            words = [models.get(word, word) for word in flags]
            child = subprocess.Popen(
                [sys.executable, "-m", "mis_mlx", *words, "--json"],
                cwd=temp,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert child.stdout is not None
            printed = child.stdout.read()
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                raise RuntimeError(f"{' '.join(words)}: exit code {child.returncode}")
            cpu_s += used.ru_utime + used.ru_stime
            peak_bytes = max(peak_bytes, used.ru_maxrss * 1024)
            told |= dict(figures(json.loads(printed.splitlines()[-1]), flags[0]))
        kept = weights(Path(temp))
    return {"weights": kept, "figures": told, "cpu_s": round(cpu_s, 1), "peak_bytes": peak_bytes}


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for everything that is not as before; last, how long and how much."""
    for kind in ("weights", "figures"):
        for key in sorted(before[kind].keys() | now[kind].keys()):
            old, new = before[kind].get(key, "nothing"), now[kind].get(key, "nothing")
            if old != new:
                yield f"{key}: {old} -> {new}"
    yield (
        f"CPU seconds {before['cpu_s']} -> {now['cpu_s']} "
        f"({now['cpu_s'] / before['cpu_s'] - 1:+.0%}), "
        f"largest MiB {before['peak_bytes'] >> 20} -> {now['peak_bytes'] >> 20}"
    )


def main(s: Settings) -> None:
    """Run each case; compare it, or store it."""
    path = laboratory.RESULTS / "golden.json"
    stored = json.loads(path.read_text("utf-8"))["cases"] if path.exists() else {}
    models = {"MIXTURE": str(mixture())} | ({"QWEN": s.qwen} if s.qwen else {})
    for name in s.only or [case for case in CASES if case not in WHOLE]:
        if not s.qwen and any("QWEN" in flags for flags in CASES[name]):
            cli.say(f"{name}: left out, since --qwen names no folder")
            continue
        found = run(CASES[name], models) | {"git": laboratory.version()}
        if name in stored:
            cli.say(f"{name}: " + "\n  ".join(differences(stored[name], found)))
        else:
            cli.say(f"{name}: {found['cpu_s']} CPU seconds, {found['peak_bytes'] >> 20} MiB")
        if s.record:
            stored[name] = found
            laboratory.write("golden", "scripts/mis benchmarks/golden.py", {"cases": stored})


if __name__ == "__main__":
    laboratory.start(Settings, main)
