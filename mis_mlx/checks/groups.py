"""The groups of checks. Each runs in a process of its own: one that aborts or hangs becomes a row,
the others go on.

A group writes what it does into a journal as it does it, one JSON line each: {"begun": name} before
a check, {"row": ...} after it, {"rate": [name, here, on an M1 Air]}, and {"peak_bytes": n} in the
end.
"""

import faulthandler
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.checks import engine, full_size, kernels, training_step
from mis_mlx.hardware import memory, rates
from mis_mlx.models import policy

SAMPLE_BYTES = 128 * 2**20  # of the disk's rates
Emit = Callable[[dict[str, Any]], None]


class Row(NamedTuple):
    """One check: what was found, the most that is right, and why there is no number if there is
    none.
    """

    name: str
    passed: bool
    number: float | None = None
    bound: float | None = None
    error: str = ""


def guarded(work: Callable[[], Any], otherwise: Callable[[str], Any]) -> Any:
    """What `work` gives, or what `otherwise` makes of the first line of its error."""
    try:
        return work()
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return otherwise(f"{type(error).__name__}: {line}"[:200])


def check(name: str, work: Callable[[], kernels.Found], emit: Emit) -> None:
    """Do one check; what raises is one that failed."""
    emit({"begun": name})
    found = guarded(work, str)
    if isinstance(found, str):
        emit({"row": Row(name, False, error=found)})
        return
    number, bound = map(float, found)  # NaN never passes, and JSON has no word for it
    emit({"row": Row(name, number <= bound, number if math.isfinite(number) else None, bound)})


def of_kernels(folder: Path, emit: Emit) -> None:
    """Small kernels and our arithmetic."""
    for name, work in kernels.CHECKS.items():
        check(name, work, emit)


def of_full_size(folder: Path, emit: Emit) -> None:
    """Kernels at the default run's sizes."""
    for name, work in full_size.CHECKS.items():
        check(name, work, emit)


def of_engine(folder: Path, emit: Emit) -> None:
    """The engine on a tiny model in four formats."""
    emit({"begun": "a model made on the spot"})
    models = guarded(lambda: engine.make(folder), str)
    if isinstance(models, str):
        emit({"row": Row("a model made on the spot", False, error=models)})
        return
    for name, work in engine.CHECKS.items():
        check(name, partial(work, models), emit)


def of_training(folder: Path, emit: Emit) -> None:
    """A training step at the default run's width: its peak is a check, its time a rate."""
    took = list[float]()

    def work() -> kernels.Found:
        found, seconds = training_step.measured(folder / "student")
        took.append(seconds)
        return found

    check("peak of a training step / plan", work, emit)
    for seconds in took:
        planned = training_step.planned_seconds(rates.M1_AIR)
        emit(
            {
                "rate": [
                    "training step of 512 tokens, 25 M parameters, s",
                    f"{seconds:.3g}",
                    f"{planned:.3g} by the plan",
                ]
            }
        )


def of_rates(folder: Path, emit: Emit) -> None:
    """This machine's rates beside an M1 Air's, in billions a second; and what a synchronisation
    costs.
    """
    air = rates.M1_AIR
    measures: dict[str, tuple[Callable[[], float], float]] = {
        "matrix product, GFLOP/s": (rates.matmul_flops, air.forward_flops_per_s),
        "memory, GB/s": (rates.memory_bytes, air.memory_bytes_per_s),
    }
    for name, (work, there) in measures.items():
        _rate(name, work, there, emit)
    emit({"begun": "disk"})
    disk = guarded(lambda: rates.disk_bytes(folder, SAMPLE_BYTES), str)
    for name, number, there in (
        ("read", 0, air.read_bytes_per_s),
        ("written", 1, air.write_bytes_per_s),
    ):
        _rate(f"disk {name}, GB/s", partial(_either, disk, number), there, emit)
    emit({"begun": "tiny evaluations"})
    tiny = guarded(lambda: f"{1e6 * rates.wait_seconds():.3g}", str)
    emit(
        {
            "rate": [
                "a tiny evaluation, of 1,000 in a row, µs",
                tiny,
                f"{1e6 * rates.WAIT_S:.3g}, a guess",
            ]
        }
    )


def _either(disk: Any, number: int) -> float:
    if isinstance(disk, str):
        raise RuntimeError(disk)
    return float(disk[number])


def _rate(name: str, work: Callable[[], float], there: float, emit: Emit) -> None:
    emit({"begun": name})
    here = guarded(lambda: f"{work() / 1e9:,.3g}", str)
    emit({"rate": [name, here, f"{there / 1e9:,.3g}"]})


GROUPS: dict[str, Callable[[Path, Emit], None]] = {
    "kernels": of_kernels,
    "kernels at full size": of_full_size,
    "the engine": of_engine,
    "a training step": of_training,
    "rates": of_rates,
}


def name_crashes() -> None:
    """Where this process is ended by a signal, its stack goes to stderr before, if that is a real
    file.
    """
    with suppress(OSError, ValueError, AttributeError):
        faulthandler.enable(sys.stderr)


def run(group: str, folder: str, journal: str, compute_dtype: str | None = None) -> None:
    """Do a group in this process: its files in the empty `folder`, what it finds in the file
    `journal`.
    """
    name_crashes()
    cli.prepare()
    before = policy.use(compute_dtype)
    peak = memory.Peak()
    try:
        with (
            open(journal, "a", encoding="utf-8") as file,
            memory.limited(memory.budget(None), memory.WIRED_MARGIN_BYTES),
        ):

            def emit(line: dict[str, Any]) -> None:
                file.write(json.dumps(line) + "\n")
                file.flush()

            GROUPS[group](Path(folder), emit)
            emit({"peak_bytes": peak.nbytes})
    finally:
        policy.use(before)


def lines(journal: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where the next one begins, line) of the whole lines of a journal from byte `start` on."""
    if not journal.is_file():
        return
    with journal.open("rb") as file:
        file.seek(start)
        for line in file:
            if not re.search(rb"\n$", line):
                return
            start += len(line)
            yield start, json.loads(line)
