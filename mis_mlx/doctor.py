"""Check this machine and MLX on it; paste the report into an issue.

Some thirty checks, each of something that can be wrong on this device and that no test elsewhere
can show, each with a witness and a bound. Takes a minute or two, needs no network and no
model. Groups of checks run in processes of their own: one that aborts or hangs is a row, and the
others go on. Exit code 3 when a check fails.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.checks import groups
from mis_mlx.checks.groups import Row
from mis_mlx.compute import precision
from mis_mlx.hardware import child_process, free_memory, jobs, macos, memory, rates, system_facts
from mis_mlx.hardware.thermal.thermal_monitor import Monitor, examined
from mis_mlx.reporting import html, run_reader
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, as_mis_error, need_place
from mis_mlx.types import MisError, duration, gib

PATIENCE_S = 240.0  # for a group; a hosted runner's GPU hangs at times
ask = child_process.ask


@dataclass(frozen=True)
class Settings:
    """Prints the report to stdout. Takes a minute or two and needs no network."""

    out: Path | None = None
    """also write the report, in Markdown, to this new file"""
    run: str | None = None
    """folder of a run, by default of `distill` without flags, which is made or goes on first: the
    report ends with a line of JSON, what each phase was to take, and took (docs/machines.md)
    """


@dataclass
class Report:
    """Lines of Markdown, on stdout and in the file `out` as soon as they are known.

    A crash leaves everything found so far.
    """

    out: Path | None
    rows: list[Row] = field(default_factory=list)
    rates: list[list[str]] = field(default_factory=list)
    peak_bytes: int = 0
    devices: dict[str, str] = field(default_factory=dict)  # what each group computed on
    begun: str = ""  # the check that is being done, empty between two

    def line(self, text: str) -> None:
        """Write a text, without private names."""
        for line in _public(text).split("\n"):
            print(line, flush=True)
            if self.out:
                DISK.append(self.out, line)

    def row(self, row: Row) -> None:
        """Write the row of a check that is done."""
        self.rows.append(row)
        self.begun = ""
        if row.error:
            result = _cell(row.error)
        elif row.number is None:
            result = "not a number"
        else:
            result = f"{row.number:,.3g}"
        bound = "" if row.bound is None else f" {row.bound:,.3g}"
        mark = "✓" if row.passed else "✗"
        self.line(f"| {mark} | {row.name} | {result} |{bound} |")

    def take(self, group: str, line: dict[str, Any]) -> None:
        """Take a line of a group's journal."""
        if "device" in line:
            self.devices[group] = line["device"]
        if "begun" in line:
            self.begun = line["begun"]
            # said before the check runs: where the process dies, this was it
            cli.say(f"{len(self.rows) + 1}: {self.begun}")
        if "row" in line:
            self.row(Row(*line["row"]))
        if "rate" in line:
            self.rates.append([_cell(_public(text)) for text in line["rate"]])
            self.begun = ""
        self.peak_bytes = max(self.peak_bytes, line.get("peak_bytes", 0))


def _of_run(folder: Path) -> dict[str, Any]:
    """What was planned for each phase of a run, and taken, and on what machine; made if need be.

    Seconds; bytes as planned for the process, and as the run added to it. MisError where the run
    does not reach its end.
    """
    if not (folder / run_folder.RESULT).is_file():
        code = jobs.call("distill", folder, again=run_folder.is_run(folder))
        if code:
            raise MisError(f"the run in {folder} ended with {code}: the same command goes on")
    told = run_reader.read(folder)
    took = told.took()
    planned = {phase["phase"]: phase for phase in told.begun.get("planned", [])}
    seconds = {name: (phase["seconds"], took.get(name)) for name, phase in planned.items()}
    peaks = [phase["peak_bytes"] for phase in planned.values()]
    return {
        "command": "scripts/mis doctor --run FOLDER",
        "commit": system_facts.commit(),
        **rates.about(),
        "asked": told.asked,
        "phases": seconds,
        "seconds": told.result.get("seconds"),
        "peak_bytes": (max(peaks, default=None), told.result.get("peak_bytes")),
        "budget_bytes": told.result.get("budget_bytes"),
    }


def _cell(text: str) -> str:
    """The text with no bar that would end a cell of a table."""
    return text.replace("|", "¦")


def run(settings: Settings) -> dict[str, Any]:
    """Examine, write the report as it comes, and say what failed."""
    if settings.out:
        need_place("--out", settings.out, "new")
        with as_mis_error(settings.out, "the report"):
            DISK.make_folder(settings.out.absolute().parent)
            DISK.replace_text(settings.out, "")
    began = time.monotonic()
    report = Report(settings.out)
    groups.name_crashes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report.line(groups.guarded(lambda: _head(folder), "### mis_mlx doctor\n\n- {}".format))
        report.line("\n| | check | found | at most |\n|---|---|---:|---:|")
        for group in groups.GROUPS:
            _examine(group, folder, report)
    report.line("\n| rate | here | MacBook Air M1, published |\n|---|---:|---:|")
    for cells in report.rates:
        report.line(f"| {' | '.join(cells)} |")
    failed = [row.name for row in report.rows if not row.passed]
    total = len(report.rows)
    passed = f"{total - len(failed)} of {total} checks passed"
    held = gib(report.peak_bytes)
    took = duration(time.monotonic() - began)
    report.line(f"\n**{passed}** in {took}; a group took at most {held}.")
    report.line("\n" + groups.guarded(lambda: _paragraph(report, passed, failed), str))
    if settings.run:
        report.line("\n" + json.dumps(_of_run(Path(settings.run))))
    return {
        "checks": total,
        "failed": failed,
        "check_failed": bool(failed),
        "policy": precision.policy(),
        "device": rates.about()["computes_on"],
        "devices": report.devices,
        "rows": [row._replace(error=_public(row.error))._asdict() for row in report.rows],
    }


def _examine(group: str, folder: Path, report: Report) -> None:
    """Run all checks of a group in a process of its own.

    Where that ends early, a row says during which check.
    """
    journal = folder / f"{group}.jsonl"
    place = folder / group
    place.mkdir()
    read = 0

    def look() -> None:
        nonlocal read
        for end, line in groups.lines(journal, read):
            report.take(group, line)
            read = end

    arguments = {
        "group": group,
        "folder": str(place),
        "journal": str(journal),
    }
    try:
        with _environment(group):
            ask("mis_mlx.checks.groups", "run", arguments, PATIENCE_S, look=look)
    except child_process.NoAnswer as trouble:
        look()
        report.row(Row(report.begun or group, passed=False, error=str(trouble)))
    look()


@contextmanager
def _environment(group: str) -> Iterator[None]:
    """What a group's process finds in its environment: MLX reads it when it opens the device.

    To decode, MLX's own command buffers, as `generate` has them, where ours are smaller.
    """
    smaller = group == "decoding" and macos.OURS in os.environ
    if smaller:
        os.environ[macos.MEGABYTES] = macos.USUAL_MEGABYTES
    try:
        yield
    finally:
        if smaller:
            os.environ[macos.MEGABYTES] = macos.SMALL_MEGABYTES


def _head(folder: Path) -> str:
    """The facts about the machine that are known before anything is computed."""
    sensors = groups.guarded(_sensors, "sensors: {}".format)
    about = rates.about()
    facts = groups.guarded(lambda: list(system_facts.lines()), lambda why: [why])
    values = {
        "about": about,
        "total": macos.total_bytes(),
        "free": free_memory.now(),
        "disk": shutil.disk_usage(folder),
        "budget": memory.budget(None),
        "recommended": float(mx.device_info().get("max_recommended_working_set_size", 0)),
        "lines": [*sensors.splitlines(), *facts],
        "policy": precision.policy(),
        "dtype": precision.usual_dtype(),
        "keeps_packed": precision.keeps_packed(),
        "gib": gib,
    }
    return html.document("doctor.md", values)


def _paragraph(report: Report, passed: str, failed: list[str]) -> str:
    """What the owner of a Mac can paste into an issue: the machine, and what was found."""
    values = {
        "about": rates.about(),
        "total": macos.total_bytes(),
        "free": free_memory.now(),
        "budget": memory.budget(None),
        "passed": passed,
        "failed": failed,
        "devices": sorted(set(report.devices.values())),
        "dtype": precision.usual_dtype(),
        "rates": report.rates,
        "gib": gib,
    }
    return html.document("paste.md", values)


def _sensors() -> str:
    """The thermometers, judged and raw."""
    with Monitor() as monitor:
        judged = html.document("sensors.md", {**examined(monitor), "monitor": monitor})
        return "\n".join([judged, *system_facts.sensors(monitor.source.look())])


def _public(text: str) -> str:
    """The text without folders and names of this machine and its user."""
    home = Path.home()
    text = text.replace(str(home), "~")
    # A path of two parts or more keeps its last one.
    text = re.sub(r"(?<![\w.])[~.]?(?:/[^\s/:'\"|]+)+/([^\s/:'\"|]*)", r"…/\1", text)
    host = os.uname().nodename
    short_host, _, _ = host.partition(".")
    for name in {home.name, host, short_host} - {"", "root"}:
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text


if __name__ == "__main__":
    cli.main(Settings, run)
