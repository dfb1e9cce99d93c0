"""Time to the first token against the length of the prompt, teacher beside student, cold and with
the prompt cached.

    scripts/mis benchmarks/ttft.py --student RUN/distilled        # about 20 minutes on a quiet
    core, 4096 alone 11
    scripts/mis benchmarks/ttft.py --student RUN/distilled --four-bit --lengths 32 128 512
    --num-trials 3

Cold: a text of its own in every trial, nothing in the cache. Cached: the same prompt again, all of
it but the last token in the cache. Models take turns; both as they are computed (float32 on a CPU,
float16 on Metal), or both in 4 bits as `mlx_lm.convert -q` packs them. Best: operations over the
matrix rate measured here, or weights over bandwidth, whichever is longer. Warm-up: a prompt of that
length, of 512 tokens at most. A length that is there, of the same weights, is not measured again,
however many trials it had (delete the file for that): long ones can have fewer. Writes
benchmarks/results/<machine>/ttft.json (ttft-4bit.json) after every length, with whether the
student is the quicker one at each.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laboratory
import psutil

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.judge.speed import rounds
from mis_mlx.judge.speed.rounds import BenchmarkModel, Measurement, Request
from mis_mlx.models.opening import compute_type, resolve

WARM_UP = 512


@dataclass(frozen=True)
class Settings:
    """What is compared, and how long."""

    student: str
    """folder of the student before it was packed"""
    teacher: str | None = None
    """default: the default teacher"""
    four_bit: bool = False
    """pack both to 4 bits first"""
    note: str = ""
    """what the student is, for the results file"""
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    """tokens of the prompts"""
    num_trials: int = 5
    delay: float = 0.0
    """seconds of rest before each trial; 30 or more for a laptop without a fan"""
    name: str = "ttft"
    """of the results file; -4bit behind it with --four-bit"""


def row(
    length: int,
    subjects: dict[str, BenchmarkModel],
    s: Settings,
) -> dict[str, Any]:
    """One length: {model: cold_ms, cached_ms (what trials say)}, ratios of the medians,
    and in how many rounds the student was the quicker one.
    """
    r = Request(length, 2)
    every: dict[str, list[Measurement]] = {name: [] for name in subjects}
    for model in subjects.values():
        rounds.trial(model, Request(min(length, WARM_UP), 2), (0, 0))
    for number in range(1, s.num_trials + 1):
        for name, model in subjects.items():
            time.sleep(s.delay)
            every[name].append(rounds.trial(model, r, (0, number)))
    found: dict[str, Any] = {"prompt_tokens": length}
    for name in subjects:
        figures = rounds.figures(every[name], r)
        found[name] = {
            "cold_ms": figures["ttft_ms"],
            "cached_ms": figures["ttft_cached_ms"],
        }
    kinds = ("cold_ms", "cached_ms")
    found["speed_up"] = {
        k: found["teacher"][k]["median"] / found["student"][k]["median"] for k in kinds
    }
    pairs = zip(every["teacher"], every["student"], strict=True)
    found["student_first"] = sum(small.stamps_s[0] < big.stamps_s[0] for big, small in pairs)
    return found


def main(s: Settings) -> None:
    """Length after length; both models stay in memory."""
    folders = {
        "teacher": resolve.resolve_model(s.teacher).path,
        "student": compute_type.open_to_compute(s.student).path,
    }
    name = s.name + "-4bit" * s.four_bit
    given: dict[str, Any] = {"chip": laboratory.machine()["chip"]}
    given["weights_sha256"] = {n: laboratory.weights_sha256(f) for n, f in folders.items()}
    kind = "4-bit" if s.four_bit else str(precision.usual_dtype()).removeprefix("mlx.core.")
    before = laboratory.resumed(name, given, ("rows",))
    rows = {r["prompt_tokens"]: r for r in before.get("rows", [])}
    command = f"scripts/mis benchmarks/ttft.py --student RUN/distilled{' --four-bit' * s.four_bit}"
    command += " --lengths "
    todo = [n for n in s.lengths if n not in rows]
    cli.say(
        f"{len(todo)} lengths to time, load average {psutil.getloadavg()[0]:.1f}; {len(rows)} are "
        f"there"
    )
    with ExitStack() as stack:
        if s.four_bit and todo:
            temp = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folders = {n: laboratory.packed(f, temp / n) for n, f in folders.items()}
        subjects = (
            {n: rounds.load_model(compute_type.open_to_compute(f)) for n, f in folders.items()}
            if todo
            else {}
        )
        for length in todo:
            before = laboratory.busy("before")
            made = row(length, subjects, s)
            rows[length] = {
                **made,
                "git": laboratory.version(),
                "hot": before + laboratory.busy("after"),
            }
            found = {
                "student": s.note,
                "given": given,
                "verdict": verdict(rows),
            }
            found["format"] = kind
            found["rows"] = [rows[n] for n in sorted(rows)]
            laboratory.write(name, command + " ".join(map(str, sorted(rows))), found)
            cli.say(
                f"{length}: "
                + ", ".join(f"{n} {rows[length][n]['cold_ms']['median']:.0f} ms" for n in subjects)
            )
    laboratory.say_goals(verdict(rows))


def verdict(rows: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Whether the student's first token comes earlier at every length, cold: its least lead, and
    where.
    """
    leads = {n: r["speed_up"]["cold_ms"] for n, r in rows.items()}
    at = min(leads, key=lambda n: leads[n])
    label = f"the student's first token is earlier at every length, cold; least so at {at} tokens"
    return {label: laboratory.goal(leads[at], "{:.2f}x", "more than 1x", leads[at] > 1)}


if __name__ == "__main__":
    laboratory.start(Settings, main)
