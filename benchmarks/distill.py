"""The default run and two ablations of it, for the README's tables. Takes distill's flags.

    scripts/mis benchmarks/distill.py default                              # about 8 minutes on 2 quiet cores
    scripts/mis benchmarks/distill.py no-reconstruction --reconstruct-samples 0
    scripts/mis benchmarks/distill.py reconstruction-only --iters 1 --learning-rate 1e-12

Writes benchmarks/results/<machine>/distill-<label>.json and .md: the run's result and table, with the
machine and the versions. The run folder goes to a temporary place and is deleted.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import psutil

from mis_mlx import cli, distill

ROOT = Path(__file__).resolve().parent
PRIVATE = ("teacher", "student", "run")  # paths of the machine


def main(label: str, flags: list[str]) -> None:
    """Run once, store what came out."""
    with tempfile.TemporaryDirectory() as temp:
        settings = replace(cli.parse(distill.Settings, flags), out=str(Path(temp) / "run"))
        result = distill.run(settings)
        table = (Path(temp) / "run" / "table.md").read_text(encoding="utf-8")
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }
    command = " ".join(["scripts/mis benchmarks/distill.py", label, *flags])
    kept = {name: value for name, value in result.items() if name not in PRIVATE}
    out = ROOT / "results" / f"{platform.system()}-{platform.machine()}".lower()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"distill-{label}.json").write_text(json.dumps({"command": command, **machine, **kept}, indent=2) + "\n")
    (out / f"distill-{label}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
