"""Examine this machine and MLX on it: some forty small checks, each with a witness and a bound; a report to paste.

Takes a minute or two, needs no network and no model. Exit code 3 when a check fails."""

import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import psutil

from mis_mlx import cli
from mis_mlx.checks import engine, kernels
from mis_mlx.hardware import memory, rates
from mis_mlx.hardware.thermal.thermal_monitor import Monitor, examined
from mis_mlx.models import policy
from mis_mlx.reporting import html
from mis_mlx.storage.files import DISK, need_place, reported
from mis_mlx.types import duration, gib

SAMPLE_BYTES = 128 * 2**20  # of the disk's rates


@dataclass(frozen=True)
class Settings(policy.Computing):
    """Examine this machine and MLX on it; the report on stdout is made to be pasted into an issue."""

    out: Path | None = None
    """write the report, Markdown, to this new file too"""


class Row(NamedTuple):
    """One check: what was found, the most that is right, and why there is no number if there is none."""

    name: str
    passed: bool
    number: float | None = None
    bound: float | None = None
    error: str = ""


def run(settings: Settings) -> dict[str, Any]:
    """Examine, print the report, and say what failed."""
    if settings.out:
        need_place("--out", settings.out, "new")
    policy.use(settings.compute_dtype)
    began, peak, budget = time.monotonic(), memory.Peak(), memory.budget(None)
    with tempfile.TemporaryDirectory() as name, memory.limited(budget, memory.WIRED_MARGIN_BYTES):
        room, disk = psutil.virtual_memory(), shutil.disk_usage(name)
        sensors, rows = _guarded(_sensors, "sensors: {}".format), list(_examined(Path(name)))
        speeds = _guarded(lambda: _speeds(Path(name)), lambda error: [[error, "", ""]])
    failed, about = [row.name for row in rows if not row.passed], rates.about()
    values = {
        "rows": rows, "failed": failed, "about": about, "room": room, "disk": disk, "budget": budget.limit_bytes,
        "recommended": float(mx.device_info().get("max_recommended_working_set_size", 0)), "sensors": sensors,
        "took": duration(time.monotonic() - began), "peak": peak.nbytes, "policy": policy, "gib": gib, "speeds": speeds,
    }  # fmt: skip
    report = _public(html.document("doctor.md", values)) + "\n"
    print(report)
    if settings.out:
        with reported(settings.out, "the report"):
            DISK.make_folder(settings.out.absolute().parent)
            DISK.replace_text(settings.out, report)
    facts = {"checks": len(rows), "failed": failed, "check_failed": bool(failed), "policy": policy.name()}
    return facts | {"device": about["computes_on"], "rows": [row._asdict() for row in rows]}


def _examined(folder: Path) -> Iterator[Row]:
    """Every check's row; what raises is one that failed, and the others go on."""
    models = _guarded(lambda: engine.make(folder), str)
    todo: dict[str, Callable[[], Any]] = dict(kernels.CHECKS)
    if isinstance(models, str):
        yield Row("a model made on the spot", False, error=models)
    else:
        todo |= {name: partial(check, models) for name, check in engine.CHECKS.items()}
    for count, (name, check) in enumerate(todo.items(), 1):
        cli.say(f"{count} of {len(todo)}: {name}")  # before: where the process dies, this was it
        found = _guarded(check, str)
        if isinstance(found, str):
            yield Row(name, False, error=found)
            continue
        number, bound = map(float, found)  # NaN never passes, and JSON has no word for it
        yield Row(name, number <= bound, number if math.isfinite(number) else None, bound)


def _guarded(work: Callable[[], Any], otherwise: Callable[[str], Any]) -> Any:
    """What `work` gives, or what `otherwise` makes of the first line of its error, fit for a table."""
    try:
        return work()
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return otherwise(_public(f"{type(error).__name__}: {line}"[:200].replace("|", "¦")))


def _sensors() -> str:
    with Monitor() as monitor:
        return html.document("sensors.md", {**examined(monitor), "monitor": monitor})


def _speeds(folder: Path) -> list[list[str]]:
    """This machine's rates beside an M1 Air's, in billions a second."""
    here = rates.matmul_flops(), rates.memory_bytes(), *rates.disk_bytes(folder, SAMPLE_BYTES)
    air = rates.M1_AIR
    there = air.forward_flops_per_s, air.memory_bytes_per_s, air.read_bytes_per_s, air.write_bytes_per_s
    names = "matrix product, GFLOP/s", "memory, GB/s", "disk read, GB/s", "disk written, GB/s"
    return [[n, f"{a / 1e9:,.3g}", f"{b / 1e9:,.3g}"] for n, a, b in zip(names, here, there, strict=True)]


def _public(text: str) -> str:
    """The text without folders and names of this machine and its user."""
    text = re.sub(r"(?<![\w.])[~.]?(?:/[^\s/:'\"|]+)+/([^\s/:'\"|]*)", r"…/\1", text.replace(str(Path.home()), "~"))
    for name in {Path.home().name, os.uname().nodename, os.uname().nodename.partition(".")[0]} - {"", "root"}:
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text


if __name__ == "__main__":
    cli.main(Settings, run)
