"""The default run and two ablations of it, for the README's tables. Takes distill's flags.

    scripts/mis benchmarks/distill.py default                              # about 10 minutes on 2
    cores
    scripts/mis benchmarks/distill.py no-reconstruction --reconstruct-samples 0
    scripts/mis benchmarks/distill.py reconstruction-only --iters 1 --learning-rate 1e-12

Writes benchmarks/results/<machine>/distill-<label>.json and .md: the run's result and table, with
the machine and the versions; of `default` also its report, .html. The run
folder goes to a temporary place and is deleted, unless --out names one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import laboratory

from mis_mlx import cli, distill, report
from mis_mlx.reporting import run_reader

PRIVATE = ("teacher", "student", "run")  # paths of the machine


def main(label: str, flags: list[str]) -> None:
    """Run once, store what came out."""
    with tempfile.TemporaryDirectory() as temp:
        asked = cli.parse(distill.Settings, flags)
        folder = Path(asked.out or Path(temp) / f"distill-{label}")
        result = distill.run(asked.with_values(out=str(folder)))
        table = (folder / "table.md").read_text(encoding="utf-8")
        phases = {
            name: round(seconds, 1) for name, seconds in run_reader.read(folder).took().items()
        }
        if label == "default":
            report.run(
                report.Settings(str(folder), str(laboratory.RESULTS / f"distill-{label}.html"))
            )
    # Where the folder is kept is this machine's affair.
    told = [
        flag
        for flag, before in zip(flags, ["", *flags], strict=False)
        if "--out" not in (flag, before)
    ]
    command = " ".join(["scripts/mis benchmarks/distill.py", label, *told])
    kept = {name: value for name, value in result.items() if name not in PRIVATE} | {
        "phases": phases
    }
    laboratory.write(f"distill-{label}", command, kept)
    (laboratory.RESULTS / f"distill-{label}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
