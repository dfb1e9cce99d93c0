"""Teacher against student, format against format; our figures beside mlx-lm's own in the same run.

    scripts/mis benchmarks/throughput.py --student RUN/distilled --four-bit RUN/model    # 20
    minutes on a quiet core
    scripts/mis benchmarks/throughput.py --student RUN/distilled --parts dense           # one of
    the three parts

Three parts. `dense`: teacher and student in turn as they are computed (float32 on a CPU). `4-bit`:
both as `mlx_lm.convert -q` packs them, so that one format is never compared with another, and
beside them the student as our `quantize` left it. `agreement`, on the student: bench's trial,
mlx-lm's stream_generate and a bare generate_step loop that takes two times only, in turn; then
`mlx_lm.benchmark` itself between trials of ours. mlx-lm counts the first token without its time:
`corrected` takes it out, (g - 1) / g.

A part that is there, of the same weights and sizes, is not measured again (delete the file for
that). Writes benchmarks/results/<machine>/throughput.json after each part, with what was to be
shown and whether it holds.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import laboratory
import mlx.core as mx
import numpy as np
import psutil

from mis_mlx import bench, cli
from mis_mlx.compute import precision
from mis_mlx.judge.speed import rounds
from mis_mlx.judge.speed.rounds import Request
from mis_mlx.maths.stats import bounds, interval
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.types import MisError

PARTS = ("dense", "4-bit", "agreement")
# what is to be shown
SPEED_UP = 1.45
APART = 0.02
OVERHEAD = 0.01
COLORS = ("#1f77b4", "#d62728", "#17becf", "#ff7f0e", "#2ca02c")
READY = 200_000  # steps without a model, to time what bench does between two tokens


@dataclass(frozen=True)
class Settings:
    """What is compared, and how long."""

    student: str
    """folder of the student before it was packed"""
    four_bit: str | None = None
    """folder of the same student as `quantize` packed it: one more column of the 4-bit ones"""
    teacher: str | None = None
    """default: the default teacher"""
    note: str = ""
    """what the student is, for the results file"""
    parts: tuple[Literal["dense", "4-bit", "agreement"], ...] = PARTS
    """what to measure, where it has not been"""
    prompt_tokens: int = 512
    generation_tokens: int = 128
    num_trials: int = 5
    four_bit_trials: int = 3
    """of the packed ones, whose prompts take half a minute on a CPU"""
    delay: float = 0.0
    """seconds of rest before each trial; 30 or more for a laptop without a fan"""
    rounds: int = 12
    """of bench, mlx-lm and the bare loop in turn: a multiple of 6 has every order equally often"""
    blocks: int = 3
    """of `mlx_lm.benchmark -n 3` and three trials of ours"""
    agreement_tokens: int = 128
    """that each of these generates after 32"""
    name: str = "throughput"
    """of the results file"""


def timed(folders: dict[str, Path], s: Settings, **more: Any) -> dict[str, Any]:
    """`bench` of these models by these names: its JSON."""
    with tempfile.TemporaryDirectory() as temp:
        for name, folder in folders.items():
            (Path(temp) / name).symlink_to(folder.resolve(), target_is_directory=True)
        models = tuple(str(Path(temp) / name) for name in folders)
        sizes = {
            k: getattr(s, k) for k in ("prompt_tokens", "generation_tokens", "num_trials", "delay")
        }
        found = bench.run(bench.Settings(model=models, **{**sizes, **more}))
    if found["stopped"]:
        raise KeyboardInterrupt
    return {k: v for k, v in found.items() if k != "machine"}


def dense(big: Path, s: Settings) -> dict[str, Any]:
    """Both as they are."""
    return timed({"teacher": big, "student": Path(s.student)}, s)


def four_bit(big: Path, s: Settings) -> dict[str, Any]:
    """Both packed by mlx-lm; and as ours packed the student, if that is there."""
    with tempfile.TemporaryDirectory() as temp:
        folders = packed_pair(big, Path(s.student), Path(temp))
        if s.four_bit:
            folders["student by quantize"] = Path(s.four_bit)
        return timed(folders, s, num_trials=s.four_bit_trials)


def packed_pair(big: Path, small: Path, temp: Path) -> dict[str, Path]:
    """Teacher and student in 4 bits, in `temp`."""
    return {
        name: laboratory.packed(f, temp / f"4-bit {name}")
        for name, f in (("teacher", big), ("student", small))
    }


def agreement(_: Path, s: Settings) -> dict[str, Any]:
    """Tokens per second of the same model by several clocks in turn, the order changing from round
    to round.
    """
    subject = rounds.load_model(compute_type.open_to_compute(Path(s.student)))
    count = s.agreement_tokens
    subject.tokenizer._eos_token_ids = {}  # as mlx_lm.benchmark does
    generate = load.mlx_lm("generate")
    r = Request(32, count)
    ids = mx.array(rounds.prompt(subject.tokenizer, r.prompt, (0, 1)))

    def ours() -> float:
        return 1 / rounds.trial(subject, r, (0, 1)).tpot_s

    def theirs() -> float:
        *_, last = generate.stream_generate(subject.model, subject.tokenizer, ids, max_tokens=count)
        return last.generation_tps

    def bare() -> float:
        first = None
        for _ in generate.generate_step(ids, subject.model, max_tokens=count):
            first = first or time.perf_counter()
            last = time.perf_counter()
        return (count - 1) / (last - first)

    ways = {"bench": ours, "mlx_lm": theirs, "bare": bare}
    found: dict[str, list[float]] = {name: [] for name in ways}
    orders = itertools.cycle(itertools.permutations(ways))
    for number, order in zip(range(s.rounds + 1), orders, strict=False):
        for name in order:
            rate = ways[name]()
            # the token that mlx-lm began too many is done
            evaluate_now(subject.model(ids[:1][None]))
            if number:  # the first round warms up
                found[name].append(rate)
        last = (
            ", ".join(f"{name} {rates[-1]:.2f}" for name, rates in found.items() if rates)
            or "warm-up"
        )
        cli.say(f"agreement {number}/{s.rounds}: {last}")
    corrected = np.array(found["mlx_lm"]) * (count - 1) / count
    ours_tps = np.array(found["bench"])
    bare_tps = np.array(found["bare"])
    began = time.perf_counter()
    rounds.token_times(7 for _ in range(READY))
    own_s = (time.perf_counter() - began) / READY
    return {
        "generation_tokens": count,
        "bench_tps": statistics.median(found["bench"]),
        "mlx_lm_tps": statistics.median(found["mlx_lm"]),
        "mlx_lm_corrected_tps": float(np.median(corrected)),
        "bare_tps": statistics.median(found["bare"]),
        "bench_over_mlx_lm": paired(ours_tps / corrected),
        "overhead": paired(bare_tps / ours_tps - 1),
        "own_us_per_token": 1e6 * own_s,
        "own_share": own_s * statistics.median(found["bare"]),
        "all_tps": found,
        **beside_the_program(ours, s),
    }


def paired(ratios: np.ndarray) -> dict[str, float | None]:
    """What rounds say about two clocks: the median of their ratios, and the mean's 95 %
    interval.
    """
    mean, low, high = interval(ratios)
    return {
        "median": float(np.median(ratios)),
        "mean": mean,
        "low": bounds((low,))[0],
        "high": bounds((high,))[0],
        "n": len(ratios),
    }


def beside_the_program(ours: Callable[[], float], s: Settings) -> dict[str, Any]:
    """`mlx_lm.benchmark`, its own averages as it prints them, on the same weights, between trials
    of ours.
    """
    count = s.agreement_tokens
    theirs = list[float]()
    own = list[float]()
    with tempfile.TemporaryDirectory() as temp:
        out = str(Path(temp) / "student")
        kind = str(precision.usual_dtype()).removeprefix("mlx.core.")
        # what bench computes in: bfloat16 is slow here
        load.mlx_lm("convert").convert(s.student, out, dtype=kind)
        for number in range(1, s.blocks + 1):
            said = io.StringIO()
            argv = sys.argv
            sys.argv = ["mlx_lm.benchmark", "--model", out, "-p", "32", "-g", str(count), "-n", "3"]
            try:
                with contextlib.redirect_stdout(said):
                    load.mlx_lm("benchmark").main()
            finally:
                sys.argv = argv
            averages = re.search(r"Averages:.*generation_tps=([\d.]+)", said.getvalue())
            if averages is None:
                raise MisError(
                    f"mlx_lm.benchmark printed no averages, but {said.getvalue()[-200:]!r}: report "
                    f"it"
                )
            theirs.append(float(averages[1]))
            own.append(statistics.mean(ours() for _ in range(3)))
            cli.say(
                f"mlx_lm.benchmark {number}/{s.blocks}: {theirs[-1]:.2f} tokens/s, ours "
                f"{own[-1]:.2f}"
            )
    corrected = np.array(theirs) * (count - 1) / count
    return {
        "mlx_lm_benchmark_tps": statistics.median(theirs),
        "bench_over_mlx_lm_benchmark": paired(np.array(own) / corrected),
        "all_mlx_lm_benchmark_tps": {"mlx_lm.benchmark": theirs, "bench": own},
    }


def verdict(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{what was to be shown: a `laboratory.goal`} of the parts that are there."""
    said = dict[str, dict[str, Any]]()
    goal = laboratory.goal
    for kind in ("dense", "4-bit"):
        if kind in found:
            rate = {
                n: m["decode_tps"]["median"] for n, m in found[kind]["measured"]["models"].items()
            }
            ratio = rate["student"] / rate["teacher"]
            label = (
                f"decode of the student over the teacher's, both "
                f"{found[kind]['models']['student']['format']}"
            )
            said[label] = goal(ratio, "{:.2f}x", f"{SPEED_UP}x or more", ratio >= SPEED_UP)
    if "agreement" in found:
        a = found["agreement"]
        for label, key in (
            ("stream_generate", "bench_over_mlx_lm"),
            ("benchmark", "bench_over_mlx_lm_benchmark"),
        ):
            apart = a[key]["median"] - 1
            label = f"decode by bench beside mlx_lm.{label}, its first token taken out"
            said[label] = goal(apart, "{:+.2%}", f"within {APART:.0%}", abs(apart) <= APART)
        for label, share, form in (
            ("decode slower in bench than in a bare loop", a["overhead"]["median"], "{:+.2%}"),
            ("what bench does between two tokens, of a token", a["own_share"], "{:.4%}"),
        ):
            said[label] = goal(share, form, f"{OVERHEAD:.0%} or less", share <= OVERHEAD)
    return said


def main(s: Settings) -> None:
    """The parts that are asked for and not there yet; stored after each."""
    big = resolve.resolve_model(s.teacher).path
    sizes = (
        "prompt_tokens",
        "generation_tokens",
        "num_trials",
        "four_bit_trials",
        "rounds",
        "blocks",
    )
    sizes += ("agreement_tokens",)
    given: dict[str, Any] = {k: getattr(s, k) for k in sizes} | {
        "chip": laboratory.machine()["chip"]
    }
    folders = {"teacher": big, "student": s.student, "student by quantize": s.four_bit}
    # all, before hours of work
    checked = {n: compute_type.open_to_compute(f).path for n, f in folders.items() if f}
    given["weights_sha256"] = {n: laboratory.weights_sha256(f) for n, f in checked.items()}
    command = "scripts/mis benchmarks/throughput.py --student RUN/distilled" + (
        " --four-bit RUN/model" * bool(s.four_bit)
    )
    command += "".join(f" --{k.replace('_', '-')} {getattr(s, k)}" for k in sizes)
    found = laboratory.resumed(s.name, given, PARTS)
    make = {"dense": dense, "4-bit": four_bit, "agreement": agreement}
    for part in s.parts:
        if part in found:
            cli.say(f"{part}: is there, measured at {found[part]['git']}; not measured again")
            continue
        cli.say(f"{part}: begins, load average {psutil.getloadavg()[0]:.1f}")
        before = laboratory.busy("before")
        made = {"git": laboratory.version(), **make[part](big, s)}
        found[part] = {"hot": before + laboratory.busy("after"), **made}  # bench looks for itself
        shown = {"student": s.note, "given": given, **found, "verdict": verdict(found)}
        laboratory.write(s.name, command, shown)
    laboratory.say_goals(verdict(found))


if __name__ == "__main__":
    laboratory.start(Settings, main)
