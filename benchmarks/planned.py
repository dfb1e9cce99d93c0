"""What the plan says a phase takes of memory, beside what the process took: is a budget what it
says?

    scripts/mis benchmarks/planned.py [--only CASE]    # 25 minutes on 2 cores, 6 GB of disk

Six distillations of a few steps with the default's sizes in all else: the default, which cuts no
block; `half-vocab` of the same teacher, and that under 350 MiB, nearly the least that trains it; of
the shape of a 0.5 B model with 152 thousand tokens and random weights, under 2 GiB, which trains it
in parts, and under 850 MiB; and of a 4-bit teacher. Before each phase the system is told to count
the process's largest resident set anew (Linux), so that numpy's share and MLX's both count; the
choice of tokens, which comes before the first phase, belongs to it, as in the plan. Planned and
measured are of the process, less what it held before the run.

Writes benchmarks/results/<machine>/planned.json after every case, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laboratory
import streaming

from mis_mlx import cli, distill
from mis_mlx.distillation.pipeline import Run
from mis_mlx.hardware import memory
from mis_mlx.models.opening import resolve
from mis_mlx.pruning import vocabulary
from mis_mlx.storage import run_folder

HALF = {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
BRIEF: dict[str, Any] = {
    "iters": 2,
    "save_every": 1,
    "num_samples": 4,
    "reconstruct_samples": 4,
    "eval_windows": 3,
    "bench_tokens": 4,
    "q_iters": 2,
    "eval_prompts": 8,
    "lose": None,
}
SMALLER = {"scenario": "half-vocab"}
CASES: dict[str, dict[str, Any]] = {
    "default": {"lose": 0.1},
    "half-vocab": SMALLER,
    "half-vocab, 350 MiB": SMALLER | {"budget": "350MiB", "q_iters": None},
    "0.5 B shape, 2 GiB": SMALLER | {"budget": "2GiB", "q_iters": None},
    "0.5 B shape, 850 MiB": SMALLER | {"budget": "850MiB", "q_iters": None},
    "4-bit teacher": SMALLER | {"conversations": 0},
}


@dataclass(frozen=True)
class Settings:
    """Which of them."""

    only: str | None = None
    """default, half-vocab, `half-vocab, 350 MiB`, `0.5 B shape, 2 GiB`, `0.5 B shape, 850 MiB` or
    `4-bit teacher`; default: all
    """
    teacher: str | None = None
    """of one stretch alone, in a process of its own"""
    out: str | None = None
    """its run folder"""


def nothing() -> None:
    """Do nothing."""


def when_tokens_are_chosen(begin: Callable[[], None], end: Callable[[], None] = nothing) -> None:
    """Have `begin` called before the choice of tokens, and `end` behind it.

    The plan has it in `prune`, or alone where nothing is pruned.
    """
    chosen = vocabulary.of_run

    def of_run(*args: Any, **settings: Any) -> Any:
        begin()
        found = chosen(*args, **settings)
        end()
        return found

    vocabulary.of_run = of_run  # type: ignore[assignment]


def stretch(name: str, teacher: str, out: Path) -> None:
    """Begin the run, or go on with it, until a phase is done and the next begins; print {phase:
    bytes it took}.
    """
    taken = dict[str, int]()
    plain = Run.phase

    @contextmanager
    def phase(course: Run, label: str) -> Iterator[None]:
        # Behind these two nothing is on disk that a run would go on from.
        if set(taken) - {"vocabulary", "repair"}:
            print(json.dumps(taken), file=sys.__stdout__, flush=True)
            os._exit(0)  # as a killed run does
        if label != "prune":
            laboratory.count_anew()
        with plain(course, label):
            yield
        taken[label] = laboratory.largest() - course.account.peak.before_bytes

    Run.phase = phase  # type: ignore[method-assign,assignment]
    held = list[int]()

    def begin() -> None:
        laboratory.count_anew()
        held.append(memory.held_bytes()[0])

    def end() -> None:
        taken["vocabulary"] = laboratory.largest() - held[-1]

    when_tokens_are_chosen(begin, end)
    asked = distill.Settings(teacher=teacher, out=str(out), **BRIEF)
    s = asked.with_values(**CASES[name], resume=out.exists())
    with redirect_stdout(sys.stderr):
        distill.run(s)
    print(json.dumps(taken))


def case(name: str, teacher: str, temp: Path) -> dict[str, Any]:
    """{phase: (planned bytes, measured bytes)} of a run, all in processes of their own."""
    out = temp / f"run-{len(name)}"
    taken = dict[str, int]()
    line = [sys.executable, __file__, "--only", name, "--teacher", teacher, "--out", str(out)]
    while "measure" not in taken:
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        # A choice of tokens that is on disk takes nothing when it is read again.
        taken = json.loads(done.stdout.splitlines()[-1]) | taken
    planned = next(r for r in run_folder.records(out / run_folder.PHASES) if "planned" in r)
    rows = {}
    for phase in planned["planned"]:
        if phase["phase"] in taken:
            rows[phase["phase"]] = phase["peak_bytes"], taken[phase["phase"]]
    return {"mode": planned["mode"], "budget_bytes": planned["budget_bytes"], "phases": rows}


def main(s: Settings) -> None:
    """All cases; or a stretch of one."""
    if s.teacher and s.only and s.out:
        return stretch(s.only, s.teacher, Path(s.out))
    given = {"brief": BRIEF}
    found = {} if s.only else laboratory.resumed("planned", given, ["cases"]).get("cases", {})
    with tempfile.TemporaryDirectory() as temp:
        for name in [s.only] if s.only else [n for n in CASES if n not in found]:
            teacher = resolve.resolve_model(None).path
            if name.startswith("0.5"):
                half = Path(temp) / "half"
                teacher = half if half.exists() else streaming.synthetic(half, HALF)
            elif name.startswith("4-bit"):
                teacher = laboratory.packed(teacher, Path(temp) / "packed")
            found[name] = case(name, str(teacher), Path(temp))
            for label, (planned, taken) in found[name]["phases"].items():
                said = (
                    f"planned {planned / 2**20:.0f} MiB, took {taken / 2**20:.0f}: "
                    f"{planned / taken - 1:+.0%}"
                )
                cli.say(f"{name}, {label}: {said}")
            if not s.only:
                laboratory.write(
                    "planned", "scripts/mis benchmarks/planned.py", {"given": given, "cases": found}
                )


if __name__ == "__main__":
    laboratory.start(Settings, main)
