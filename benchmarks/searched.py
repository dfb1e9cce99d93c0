"""A search, kept: what each axis costs by itself, and the students measured. Takes search's flags.

    scripts/mis benchmarks/searched.py 50MB --bytes 50MB    # half an hour on 2 cores; goes on where
    it was stopped
    scripts/mis benchmarks/searched.py gemma-90MB --teacher gemma-3-270m --bytes 90MB --finalists 0

The run is runs/search/LABEL. Writes benchmarks/results/<machine>/search-<label>.json.
"""

from __future__ import annotations

import sys

import laboratory

from mis_mlx import cli, search
from mis_mlx.size_search import candidates
from mis_mlx.storage import run_folder

PRIVATE = ("teacher", "run")  # paths of the machine


def main(label: str, flags: list[str]) -> None:
    """Run once, or go on, and store what came out."""
    folder = search.UNDER / label
    asked = cli.parse(search.Settings, flags)
    asked = asked.with_values(out=str(folder), resume=folder.exists())
    result = search.run(asked)
    result["recommended"] = result.pop("command")
    kept = {name: value for name, value in result.items() if name not in PRIVATE}
    command = " ".join(["scripts/mis benchmarks/searched.py", label, *flags])
    laboratory.write(
        f"search-{label}", command, {"axes": run_folder.records(folder / candidates.PROBES), **kept}
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
