"""Examine this machine and MLX on it: some sixty checks, each with a witness and a bound; a report
to paste.

Takes a minute or two, needs no network and no model. Groups of checks run in processes of their
own: one that aborts or hangs is a row, and the others go on. Exit code 3 when a check fails.
"""

import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from mis_mlx import cli
from mis_mlx.checks import groups
from mis_mlx.checks.groups import Row
from mis_mlx.hardware import child_process, memory, rates, system_facts
from mis_mlx.hardware.thermal.thermal_monitor import Monitor, examined
from mis_mlx.models import policy
from mis_mlx.reporting import html
from mis_mlx.storage.files import DISK, need_place, reported
from mis_mlx.types import duration, gib

PATIENCE_S = 240.0  # for a group; a hosted runner's GPU hangs at times
ask = child_process.ask


@dataclass(frozen=True)
class Settings(policy.Computing):
    """Examine this machine and MLX on it; the report on stdout is made to be pasted into an
    issue.
    """

    out: Path | None = None
    """write the report, Markdown, to this new file too"""


@dataclass
class Report:
    """Lines of Markdown, on stdout and in the file `out` as soon as they are known: a crash leaves
    what was found.
    """

    out: Path | None
    rows: list[Row] = field(default_factory=list)
    rates: list[list[str]] = field(default_factory=list)
    peak_bytes: int = 0
    begun: str = ""  # the check that is being done, empty between two

    def line(self, text: str) -> None:
        """Say this, fit for the public."""
        for line in _public(text).split("\n"):
            print(line, flush=True)
            if self.out:
                DISK.append(self.out, line)

    def row(self, row: Row) -> None:
        """A check is done."""
        self.rows.append(row)
        self.begun = ""
        found = row.error.replace("|", "¦")
        if not found:
            found = "not a number" if row.number is None else f"{row.number:,.3g}"
        most = "" if row.bound is None else f" {row.bound:,.3g}"
        self.line(f"| {'✓' if row.passed else '✗'} | {row.name} | {found} |{most} |")

    def take(self, line: dict[str, Any]) -> None:
        """A line of a group's journal."""
        if "begun" in line:
            self.begun = line["begun"]
            # before: where the process dies, this was it
            cli.say(f"{len(self.rows) + 1}: {self.begun}")
        if "row" in line:
            name, passed, number, bound, error = line["row"]
            self.row(Row(name, passed, number, bound, error))
        if "rate" in line:
            self.rates.append([_public(cell).replace("|", "¦") for cell in line["rate"]])
            self.begun = ""
        self.peak_bytes = max(self.peak_bytes, line.get("peak_bytes", 0))


def run(settings: Settings) -> dict[str, Any]:
    """Examine, write the report as it comes, and say what failed."""
    if settings.out:
        need_place("--out", settings.out, "new")
        with reported(settings.out, "the report"):
            DISK.make_folder(settings.out.absolute().parent)
            DISK.replace_text(settings.out, "")
    policy.use(settings.compute_dtype)
    began = time.monotonic()
    report = Report(settings.out)
    groups.name_crashes()
    with tempfile.TemporaryDirectory() as name:
        report.line(groups.guarded(lambda: _head(Path(name)), "### mis_mlx doctor\n\n- {}".format))
        report.line("\n| | check | found | at most |\n|---|---|---:|---:|")
        for group in groups.GROUPS:
            _examine(group, Path(name), settings.compute_dtype, report)
    report.line("\n| rate | here | MacBook Air M1, published |\n|---|---:|---:|")
    for cells in report.rates:
        report.line(f"| {' | '.join(cells)} |")
    failed = [row.name for row in report.rows if not row.passed]
    passed = f"{len(report.rows) - len(failed)} of {len(report.rows)} checks passed"
    held = gib(report.peak_bytes)
    report.line(
        f"\n**{passed}** in {duration(time.monotonic() - began)}; a group took at most {held}."
    )
    facts = {
        "checks": len(report.rows),
        "failed": failed,
        "check_failed": bool(failed),
        "policy": policy.name(),
    }
    rows = [row._replace(error=_public(row.error))._asdict() for row in report.rows]
    return facts | {"device": rates.about()["computes_on"], "rows": rows}


def _examine(group: str, folder: Path, compute_dtype: str | None, report: Report) -> None:
    """All checks of a group, in a process of its own; where that ends early, a row says during
    what.
    """
    journal = folder / f"{group}.jsonl"
    place = folder / group
    place.mkdir()
    read = 0

    def look() -> None:
        nonlocal read
        for end, line in groups.lines(journal, read):
            report.take(line)
            read = end

    where = {
        "group": group,
        "folder": str(place),
        "journal": str(journal),
        "compute_dtype": compute_dtype,
    }
    try:
        ask("mis_mlx.checks.groups", "run", where, PATIENCE_S, look=look)
    except child_process.NoAnswer as trouble:
        look()
        report.row(Row(report.begun or group, False, error=str(trouble)))
    look()


def _head(folder: Path) -> str:
    """What is known of the machine before anything is computed."""
    sensors = groups.guarded(_sensors, "sensors: {}".format)
    about = rates.about()
    values = {
        "about": about,
        "room": psutil.virtual_memory(),
        "disk": shutil.disk_usage(folder),
        "budget": memory.budget(None).limit_bytes,
        "recommended": float(mx.device_info().get("max_recommended_working_set_size", 0)),
        "lines": [
            *sensors.splitlines(),
            *groups.guarded(lambda: list(system_facts.lines()), lambda why: [why]),
        ],
        "policy": policy,
        "gib": gib,
    }
    return html.document("doctor.md", values)


def _sensors() -> str:
    with Monitor() as monitor:
        judged = html.document("sensors.md", {**examined(monitor), "monitor": monitor})
        return "\n".join([judged, *system_facts.sensors(monitor.source.look())])


def _public(text: str) -> str:
    """The text without folders and names of this machine and its user."""
    text = re.sub(
        r"(?<![\w.])[~.]?(?:/[^\s/:'\"|]+)+/([^\s/:'\"|]*)",
        r"…/\1",
        text.replace(str(Path.home()), "~"),
    )
    for name in {Path.home().name, os.uname().nodename, os.uname().nodename.partition(".")[0]} - {
        "",
        "root",
    }:
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text


if __name__ == "__main__":
    cli.main(Settings, run)
