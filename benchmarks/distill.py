"""The default run and two ablations of it, for the README's tables. Takes distill's flags.

    scripts/mis benchmarks/distill.py default                              # about 8 minutes on 2 quiet cores
    scripts/mis benchmarks/distill.py no-reconstruction --reconstruct-samples 0
    scripts/mis benchmarks/distill.py reconstruction-only --iters 1 --learning-rate 1e-12

Writes benchmarks/results/<machine>/distill-<label>.json and .md: the run's result and table, with the
machine and the versions. The run folder goes to a temporary place and is deleted.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import laboratory

from mis_mlx import cli, distill

PRIVATE = ("teacher", "student", "run")  # paths of the machine


def main(label: str, flags: list[str]) -> None:
    """Run once, store what came out."""
    with tempfile.TemporaryDirectory() as temp:
        settings = replace(cli.parse(distill.Settings, flags), out=str(Path(temp) / "run"))
        result = distill.run(settings)
        table = (Path(temp) / "run" / "table.md").read_text(encoding="utf-8")
    command = " ".join(["scripts/mis benchmarks/distill.py", label, *flags])
    kept = {name: value for name, value in result.items() if name not in PRIVATE}
    laboratory.write(f"distill-{label}", command, kept)
    (laboratory.RESULTS / f"distill-{label}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
