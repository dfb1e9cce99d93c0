"""Text that the teacher wrote itself: students distilled alike on the built-in text, and on half of each.

    scripts/mis benchmarks/teacher_text.py    # about an hour on 2 cores; finished rows are not run again

The default student of SmolLM2-135M-Instruct with two thirds of the default's steps and half of its windows for the
repair, seeds 0 to 2; `synthesize` writes the text once, as `distill --data teacher` does. Judged in bits per byte above
the teacher's, on texts of kinds that neither the built-in text nor anybody's vocabulary saw: Vim's tutor, aphorisms
(fortunes) and manual pages in Polish, of Debian's packages, which apt downloads and nobody installs, and numpy's
docstrings. Beside them, apart from the mean: the teacher's answers to questions that nobody asked in training, and the
held-out parts of the built-in texts. Writes benchmarks/results/<machine>/teacher_text.json after every row.
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
from mis_mlx.models import mlx_generate, resolve

PACKAGES = ("vim-runtime", "fortunes", "fortunes-pl", "manpages-pl")
SEEDS = (0, 1, 2)
NO_TRAINING = "Nothing is trained on this. " * 200
ANSWERS, BUILT_IN = "the teacher's answers", "built-in text"
QUESTIONS = (
    "What is a shepherd?", "Explain why the sky is blue.", "Write a short story about a lost dog.",
    "How do I bake bread at home?", "Give me three tips for learning a language.", "Who was Marie Curie?",
    "What is the capital of Australia, and what is it known for?", "Write an e-mail asking for a day off.",
    "Explain photosynthesis to a child.", "What are the advantages of solar energy?",
    "Summarize the plot of Romeo and Juliet.", "How does a bicycle stay upright?", "List five healthy snacks.",
    "What should I pack for a mountain hike?", "Write a poem about autumn.",
    "What is 15 percent of 80, and how do you find it?",
)  # fmt: skip


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


def answers() -> list[dict[str, str]]:
    """What the teacher says to every question."""
    model, tokenizer = mlx_generate.open_model(resolve.resolve_model(None).path)
    stop, draw = set(tokenizer.eos_token_ids), mlx_generate.sampler(0.7, 1)
    prompts = [mlx_generate.encode(tokenizer, question) for question in QUESTIONS]
    said = mlx_generate.groups(model, prompts, 1, 256, stop, draw, len(prompts))
    words = [tokenizer.decode([token for token in ids if token not in stop]).strip() for (ids,) in said]
    return [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, words, strict=True) if a]


def texts(place: Path) -> dict[str, Path]:
    """Folders that --data takes, by name."""
    (packages := place / "packages").mkdir()
    unpack_debian(PACKAGES, packages)
    rows: dict[str, list[dict[str, str]]] = {
        name: [{"text": text}] for name, text in other_texts(packages / "usr" / "share").items()
    }
    rows[ANSWERS] = answers()
    folders = {}
    for name, test in rows.items():
        (folder := place / name).mkdir()
        for split, content in (("train", [{"text": NO_TRAINING}]), ("valid", [{"text": NO_TRAINING}]), ("test", test)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        folders[name] = folder
    return folders


def row(s: Settings, data: str | None, seed: int, run: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """A student, and what it and its teacher have on every text."""
    began, more = time.process_time(), {"quantize": 0, "bench_tokens": 0, "reconstruct_samples": 32, "eval_windows": 3}
    distill.run(distill.Settings(out=str(run), data=data, seed=seed, iters=s.iters, **more))  # type: ignore[arg-type]
    found: dict[str, Any] = {"cpu_seconds": round(time.process_time() - began, 1)}
    for name, folder in {**folders, BUILT_IN: None}.items():
        asked = evaluate.Settings(
            students=(str(run / "model"),), data=folder and str(folder), eval_windows=s.eval_windows
        )
        for text, judged in evaluate.run(asked).items():
            if isinstance(judged, dict) and "bpb_model" in judged:
                label = name if folder else f"{name}, {text}"
                found[label] = {"teacher": judged["bpb_teacher"], "student": judged["bpb_model"]}
    return found


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"iters": s.iters, "eval_windows": s.eval_windows, "written": synthesize.Settings.num_samples}
    command = "scripts/mis benchmarks/teacher_text.py"
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
