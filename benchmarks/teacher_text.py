"""Text that the teacher wrote itself: students distilled alike on the built-in text, and on half of each.

    scripts/mis benchmarks/teacher_text.py    # about an hour on 2 cores; finished rows are not run again

The default student of SmolLM2-135M-Instruct with two thirds of the default's steps and half of its windows for the
repair, seeds 0 to 2; `synthesize` writes the text once. Judged in bits per byte above the teacher's, on texts of kinds
that neither the built-in text nor anybody's vocabulary saw: Vim's tutor, aphorisms (fortunes) and manual pages in
Polish, of Debian's packages, which apt downloads and nobody installs, and numpy's docstrings.
Writes benchmarks/results/<machine>/teacher_text.json after every row.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from laboratory import resumed, start, write

from mis_mlx import cli, distill, evaluate, synthesize
from mis_mlx.hardware.programs import unpack_debian

PACKAGES = ("vim-runtime", "fortunes", "fortunes-pl", "manpages-pl")
SEEDS = (0, 1, 2)
NO_TRAINING = "Nothing is trained on this. " * 200


@dataclass(frozen=True)
class Settings:
    """How much."""

    iters: int = 20
    """steps of distillation"""
    eval_windows: int = 6
    """of each text"""


def other_texts(share: Path) -> dict[str, str]:
    """By name, of unpacked packages' usr/share."""
    tutor = next(share.glob("vim/vim*/tutor"))
    found = {"Vim's tutor": (tutor / "tutor1").read_text("utf-8")}
    found["Vim's tutor, Polish"] = (tutor / "tutor1.pl.utf-8").read_text("utf-8")
    long = [doc for name in sorted(np.__all__) if len(doc := str(getattr(np, name).__doc__)) > 2000]
    found["numpy's docstrings"] = "\n\n".join(long)[:24_000]
    fortunes = share / "games" / "fortunes"
    found["aphorisms"] = "".join((fortunes / name).read_text("utf-8")[:9000] for name in ("science", "wisdom"))
    files = sorted(path for path in (fortunes / "pl").iterdir() if not path.suffix and path.is_file())
    found["aphorisms, Polish"] = "".join(path.read_text("utf-8", "replace")[:4000] for path in files[:8])
    pages = []
    for path in sorted((share / "man" / "pl").rglob("*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        page = re.sub(r"^[.'].*$|\\f.|\\[&|^-]", "", text, flags=re.MULTILINE)
        if 3000 < len(page) < 20_000:
            pages.append(re.sub(r"\n{2,}", "\n", page)[:3000])
    found["manual pages, Polish"] = "\n\n".join(pages[:: max(1, len(pages) // 14)])[:40_000]
    return found


def texts(place: Path) -> dict[str, Path]:
    """Folders that --data takes, by name."""
    (packages := place / "packages").mkdir()
    unpack_debian(PACKAGES, packages)
    folders = {}
    for name, text in other_texts(packages / "usr" / "share").items():
        (folder := place / name).mkdir()
        for split, content in (("train", NO_TRAINING), ("valid", NO_TRAINING), ("test", text)):
            (folder / f"{split}.jsonl").write_text(json.dumps({"text": content}) + "\n")
        folders[name] = folder
    return folders


def row(s: Settings, data: str | None, seed: int, run: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """A student, and what it and its teacher have on every text."""
    began, more = time.process_time(), {"quantize": 0, "bench_tokens": 0, "reconstruct_samples": 32, "eval_windows": 3}
    distill.run(distill.Settings(out=str(run), data=data, seed=seed, iters=s.iters, **more))  # type: ignore[arg-type]
    found: dict[str, Any] = {"cpu_seconds": round(time.process_time() - began, 1)}
    for name, folder in folders.items():
        asked = evaluate.Settings(students=(str(run / "model"),), data=str(folder), eval_windows=s.eval_windows)
        judged = evaluate.run(asked)["held-out"]
        found[name] = {"teacher": judged["bpb_teacher"], "student": judged["bpb_model"]}
    return found


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given, command = {"iters": s.iters, "eval_windows": s.eval_windows}, "scripts/mis benchmarks/teacher_text.py"
    rows = resumed("teacher_text", given, ["rows"]).get("rows", {})
    with tempfile.TemporaryDirectory() as temp:
        folders, written = texts(Path(temp)), Path(temp) / "written"
        began = time.process_time()
        synthesize.run(synthesize.Settings(out=str(written)))
        cost = {"writing_cpu_seconds": round(time.process_time() - began, 1)}
        for seed in SEEDS:
            for name, data in (("built in", None), ("half the teacher's", str(written))):
                if (label := f"{name}, seed {seed}") not in rows:
                    rows[label] = row(s, data, seed, Path(temp) / label, folders)
                    cli.say(f"{label}: {rows[label]}")
                    write("teacher_text", command, {"given": given, **cost, "rows": rows})


if __name__ == "__main__":
    start(Settings, main)
