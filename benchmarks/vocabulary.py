"""Fewer tokens or fewer neurons: students of one size, distilled alike, in bits per byte of texts
of other kinds.

    scripts/mis benchmarks/vocabulary.py    # half an hour on 2 cores; finished rows are not run
    again

SmolLM2-135M-Instruct less a third, two thirds of the default's steps, half of its windows for the
repair, seeds 0 to 2: scenario gazda (28 blocks, FFN 768, all 49,152 tokens) beside redyk (29
blocks, FFN 1024, 24,576 tokens). Every model reads its own tokens. Texts of no kind that anybody
trained on: Vim's tutor in English and in Polish (Debian's package vim-runtime) and numpy's
docstrings. Writes benchmarks/results/<machine>/vocabulary.json after every row.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from laboratory import experiment, start

from mis_mlx import distill, evaluate
from mis_mlx.types import MisError

SHAPES: dict[str, dict[str, Any]] = {
    "gazda, 49,152 tokens": {"scenario": "gazda"},
    "redyk, 24,576 tokens": {"scenario": "redyk"},
}
TUTORS = {"Vim's tutor": "tutor1", "Vim's tutor in Polish": "tutor1.pl.utf-8"}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """How much."""

    iters: int = 20
    """steps of distillation"""
    eval_windows: int = 32
    """of each text"""


def tutor(file: str) -> str:
    """Vim's, in some language."""
    path = next(iter(sorted(Path("/usr/share/vim").glob(f"vim*/tutor/{file}"))), None)
    if path is None:
        raise MisError(f"no {file} under /usr/share/vim: install Debian's package vim-runtime")
    return path.read_text("utf-8")


def other_texts() -> dict[str, str]:
    """Of kinds that nobody trained on, by name."""
    found = {name: tutor(file) for name, file in TUTORS.items()}
    docstrings = [str(getattr(np, name).__doc__) for name in sorted(np.__all__)]
    long = [text for text in docstrings if len(text) > 2000]
    # windows enough for all of it, in either vocabulary
    found["numpy's docstrings"] = "\n\n".join(long)[:24_000]
    return found


def texts(place: Path) -> dict[str, Path]:
    """Folders that --data takes, by name."""
    found = other_texts()
    for name, text in found.items():
        (folder := place / name).mkdir()
        for split in ("train", "valid", "test"):
            content = text if split == "test" else "Nothing is trained on this. " * 200
            (folder / f"{split}.jsonl").write_text(json.dumps({"text": content}) + "\n")
    return {name: place / name for name in found}


def row(
    seed: int, shape: str, folders: dict[str, Path], *, place: Path, s: Settings
) -> dict[str, Any]:
    """One student, pruned and distilled, in bits per byte of every text."""
    run = place / f"run-{seed}-{shape[:5]}"
    result = distill.run(
        distill.Settings(
            out=str(run),
            seed=seed,
            iters=s.iters,
            quantize=0,
            reconstruct_samples=32,
            eval_windows=3,
            **SHAPES[shape],
        )
    )
    found: dict[str, Any] = {
        "params": result["params_student"],
        "tokens_per_s": result["tokens_per_s"],
    }
    for name, folder in folders.items():
        asked = evaluate.Settings(
            students=(str(run / "pruned"), str(run / "model")),
            data=str(folder),
            eval_windows=s.eval_windows,
        )
        found[name] = evaluate.run(asked)["held-out"]
    return found


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"iters": s.iters, "eval_windows": s.eval_windows}
    with tempfile.TemporaryDirectory() as temp:
        place = Path(temp)
        folders = texts(place)
        rows = [
            (f"{shape}, seed {seed}", partial(row, seed, shape, folders, place=place, s=s))
            for seed, shape in product(SEEDS, SHAPES)
        ]
        experiment("vocabulary", "scripts/mis benchmarks/vocabulary.py", given, rows)


if __name__ == "__main__":
    start(Settings, main)
