"""Run the groups of checks, each in a process of its own.

A group that aborts or hangs becomes a row, and the others go on. A group writes into a journal as
it works, one JSON line each: {"device": name} at first, {"begun": name} before a check, {"row":
...} after it, {"rate": [name, here, on an M1 Air]}, and {"peak_bytes": n} at the end.
"""

import faulthandler
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.checks import decoding, engine, kernels, training_step
from mis_mlx.hardware import memory, rates

SAMPLE_BYTES = 128 * 2**20  # of the disk's rates
Emit = Callable[[dict[str, Any]], None]


class Row(NamedTuple):
    """One check: its number, the largest number that passes, and why there is no number."""

    name: str
    passed: bool
    number: float | None = None
    bound: float | None = None
    error: str = ""


def guarded(work: Callable[[], Any], otherwise: Callable[[str], Any]) -> Any:
    """Return what `work` returns, or what `otherwise` makes of the first line of its error."""
    try:
        return work()
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        kind = type(error).__name__
        words = f"{kind}: {line}"
        return otherwise(words[:200])


def check(name: str, work: Callable[[], kernels.Found], emit: Emit) -> None:
    """Run one check; one that raises has failed."""
    emit({"begun": name})
    outcome = guarded(work, str)
    if isinstance(outcome, str):
        emit({"row": Row(name, passed=False, error=outcome)})
        return
    number, bound = map(float, outcome)
    passed = number <= bound  # NaN never passes
    shown = None  # JSON has no word for NaN
    if math.isfinite(number):
        shown = number
    row = Row(name, passed, shown, bound)
    emit({"row": row})


def of_kernels(folder: Path, emit: Emit) -> None:
    """Check kernels and our arithmetic at the default run's sizes."""
    for name, work in kernels.CHECKS.items():
        check(name, work, emit)


def of_engine(folder: Path, emit: Emit) -> None:
    """Check the engine on a tiny model in four formats."""
    making = "a small model made here"
    emit({"begun": making})
    models = guarded(lambda: engine.make(folder), str)
    if isinstance(models, str):
        emit({"row": Row(making, passed=False, error=models)})
        return
    for name, work in engine.CHECKS.items():
        check(name, partial(work, models), emit)


def of_training(folder: Path, emit: Emit) -> None:
    """Run a training step at the default run's width: its peak is a check, its time a rate."""
    times = list[float]()  # stays empty where the step raises

    def work() -> kernels.Found:
        measured, seconds = training_step.measured(folder / "student")
        times.append(seconds)
        return measured

    check("peak of a training step / plan", work, emit)
    for seconds in times:
        planned = training_step.planned_seconds(rates.M1_AIR)
        name = "training step of 512 tokens, 25 M parameters, s"
        here = f"{seconds:.3g}"
        beside = f"{planned:.3g} by the plan"
        emit({"rate": [name, here, beside]})


def of_rates(folder: Path, emit: Emit) -> None:
    """Measure this machine's rates, in billions a second; and what a wait and a launch cost.

    Each stands next to an M1 Air's."""
    air = rates.M1_AIR
    _rate("matrix product, GFLOP/s", rates.matmul_flops, air.forward_flops_per_s, emit)
    _rate("memory, GB/s", rates.memory_bytes, air.memory_bytes_per_s, emit)
    emit({"begun": "disk"})
    disk = guarded(lambda: rates.disk_bytes(folder, SAMPLE_BYTES), str)
    _rate("disk read, GB/s", partial(_either, disk, 0), air.read_bytes_per_s, emit)
    _rate("disk written, GB/s", partial(_either, disk, 1), air.write_bytes_per_s, emit)
    emit({"begun": "tiny evaluations"})
    here = guarded(lambda: f"{1e6 * rates.wait_seconds():.3g}", str)
    name = "a tiny evaluation, 1,000 in a row, µs"
    beside = f"{1e6 * rates.WAIT_S:.3g}, a guess"
    emit({"rate": [name, here, beside]})
    here = guarded(lambda: f"{1e6 * rates.launch_seconds():.3g}", str)
    name = "a tiny kernel, 1,000 in one evaluation, µs"
    beside = f"{1e6 * rates.LAUNCH_S:.3g}, from elsewhere"
    emit({"rate": [name, here, beside]})


def of_decoding(folder: Path, emit: Emit) -> None:
    """Time a decoded token of a small model, and a fit of grids."""
    name = "decoding, 25 M parameters, tokens/s"
    emit({"begun": name})
    here = guarded(lambda: f"{decoding.decoded_tokens_per_s(folder / 'model'):,.0f}", str)
    beside = f"{decoding.planned_tokens_per_s(rates.M1_AIR):,.0f} at most"
    emit({"rate": [name, here, beside]})
    name = "a fit of grids, ms"
    emit({"begun": name})
    here = guarded(lambda: f"{1e3 * decoding.grid_fit_s():.3g}", str)
    emit({"rate": [name, here, "not known"]})


def _either(disk: Any, number: int) -> float:
    """The number of a (read, written) pair; RuntimeError where `disk` is the text of an error."""
    if isinstance(disk, str):
        raise RuntimeError(disk)
    return float(disk[number])


def _rate(name: str, work: Callable[[], float], on_air: float, emit: Emit) -> None:
    """Measure one rate by `work` and emit it next to an M1 Air's, both in billions a second."""
    emit({"begun": name})
    here = guarded(lambda: f"{work() / 1e9:,.3g}", str)
    beside = f"{on_air / 1e9:,.3g}"
    emit({"rate": [name, here, beside]})


GROUPS: dict[str, Callable[[Path, Emit], None]] = {
    "kernels": of_kernels,
    "the engine": of_engine,
    "a training step": of_training,
    "rates": of_rates,
    "decoding": of_decoding,
}


def name_crashes() -> None:
    """Write this process's stack to stderr before a signal ends it, if stderr is a real file."""
    with suppress(OSError, ValueError, AttributeError):
        faulthandler.enable(sys.stderr)


def run(group: str, folder: str, journal: str) -> None:
    """Run a group in this process.

    folder: empty, for the group's files. journal: a file to which the lines are appended.
    """
    name_crashes()
    cli.prepare()
    peak = memory.Peak()
    with open(journal, "a", encoding="utf-8") as file, memory.limited(memory.budget(None)):

        def emit(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        emit({"device": rates.about()["computes_on"]})
        GROUPS[group](Path(folder), emit)
        emit({"peak_bytes": peak.nbytes})


def lines(journal: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset of the next line, line) for the complete lines from byte `start` on."""
    if not journal.is_file():
        return
    with journal.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                return
            start += len(line)
            yield start, json.loads(line)
