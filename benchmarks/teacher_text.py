"""Built-in text with and without what a teacher wrote: students distilled alike on either.

    scripts/mis benchmarks/teacher_text.py --seed 0    # then 1 and 2

The redyk student of SmolLM2-135M-Instruct, or of another teacher, with two thirds of the default's
steps and half of its windows for the repair. `before`: Python's manual and one part in eight of
Polish Miś texts, which was the built-in text. `now`: five parts of the manual, one of Miś texts,
two of what SmolLM2-135M-Instruct wrote once (mis_mlx/data/written). Judged in bits per byte above
the teacher's, on texts of kinds that neither has: Vim's tutor, aphorisms (fortunes) and manual
pages in Polish, of Debian's packages, which apt downloads and nobody installs, and numpy's
docstrings. Beside them, apart from the mean: the teacher's answers to questions that nobody asked
in training (of a model with a chat template), and the held-out parts of the built-in texts. Writes
benchmarks/results/<machine>/teacher_text-<seed>.json after every row.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from laboratory import resumed, start, write

from mis_mlx import cli, distill, evaluate
from mis_mlx.data import preparation
from mis_mlx.hardware.programs import unpack_debian
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.writing import mlx_generate, text_writer
from mis_mlx.models.writing.draws import Draws, Sampling

PACKAGES = ("vim-runtime", "fortunes", "fortunes-pl", "manpages-pl")
# Kinds of the built-in text and their shares without conversations, which came later (answers.py).
MANUAL, MIS, MODEL = preparation.TEXT_SHARES
SHARES = {"before": {MANUAL: 7 / 8, MIS: 1 / 8, MODEL: 0.0}, "now": preparation.TEXT_SHARES}
NO_TRAINING = "Nothing is trained on this. " * 200
ANSWERS = "the teacher's answers"
BUILT_IN = "built-in text"
QUESTIONS = (
    "What is a shepherd?",
    "Explain why the sky is blue.",
    "Write a short story about a lost dog.",
    "How do I bake bread at home?",
    "Give me three tips for learning a language.",
    "Who was Marie Curie?",
    "What is the capital of Australia, and what is it known for?",
    "Write an e-mail asking for a day off.",
    "Explain photosynthesis to a child.",
    "What are the advantages of solar energy?",
    "Summarize the plot of Romeo and Juliet.",
    "How does a bicycle stay upright?",
    "List five healthy snacks.",
    "What should I pack for a mountain hike?",
    "Write a poem about autumn.",
    "What is 15 percent of 80, and how do you find it?",
)


@dataclass(frozen=True)
class Settings:
    """How much."""

    seed: int = 0
    teacher: str | None = None
    """default: SmolLM2-135M-Instruct"""
    iters: int = 20
    """steps of distillation"""
    eval_windows: int = 6
    """of each text"""


def other_texts(share: Path) -> dict[str, str]:
    """By name, of unpacked packages' usr/share."""
    tutor = next(share.glob("vim/vim*/tutor"))
    found = {"Vim's tutor": (tutor / "tutor1").read_text("utf-8")}
    found["Vim's tutor, Polish"] = (tutor / "tutor1.pl.utf-8").read_text("utf-8")
    docstrings = [str(getattr(np, name).__doc__) for name in sorted(np.__all__)]
    long = [text for text in docstrings if len(text) > 2000]
    found["numpy's docstrings"] = "\n\n".join(long)[:24_000]
    fortunes = share / "games" / "fortunes"
    found["aphorisms"] = "".join(
        (fortunes / name).read_text("utf-8")[:9000] for name in ("science", "wisdom")
    )
    files = sorted(
        path for path in (fortunes / "pl").iterdir() if not path.suffix and path.is_file()
    )
    found["aphorisms, Polish"] = "".join(
        path.read_text("utf-8", "replace")[:4000] for path in files[:8]
    )
    pages = []
    for path in sorted((share / "man" / "pl").rglob("*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        page = re.sub(r"^[.'].*$|\\f.|\\[&|^-]", "", text, flags=re.MULTILINE)
        if 3000 < len(page) < 20_000:
            pages.append(re.sub(r"\n{2,}", "\n", page)[:3000])
    found["manual pages, Polish"] = "\n\n".join(pages[:: max(1, len(pages) // 14)])[:40_000]
    return found


def answers(teacher: str | None) -> list[dict[str, str]]:
    """What the teacher says to every question; nothing where it has no chat template."""
    checkpoint = compute_type.open_to_compute(resolve.resolve_model(teacher).path)
    tokenizer = load.tokenizer(checkpoint.path)
    if not tokenizer.has_chat_template:
        return []
    stop = set(tokenizer.eos_token_ids)
    draws = Draws(Sampling(0.7), range(1, len(QUESTIONS) + 1))
    prompts = [mlx_generate.encode(tokenizer, question) for question in QUESTIONS]
    writer = text_writer.opened(checkpoint, headroom_bytes=None)
    words = []
    for ids in writer.write(prompts, 256, stop, draws):
        answer = [token for token in ids if token not in stop]
        words.append(tokenizer.decode(answer).strip())
    return [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, words, strict=True) if a]


def texts(place: Path, teacher: str | None, *, with_answers: bool = True) -> dict[str, Path]:
    """Folders that --data takes, by name."""
    (packages := place / "packages").mkdir()
    unpack_debian(PACKAGES, packages)
    rows: dict[str, list[dict[str, str]]] = {
        name: [{"text": text}] for name, text in other_texts(packages / "usr" / "share").items()
    }
    if with_answers and (said := answers(teacher)):
        rows[ANSWERS] = said
    folders = {}
    for name, test in rows.items():
        (folder := place / name).mkdir()
        for split, content in (
            ("train", [{"text": NO_TRAINING}]),
            ("valid", [{"text": NO_TRAINING}]),
            ("test", test),
        ):
            (folder / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in content)
            )
        folders[name] = folder
    return folders


def row(s: Settings, run: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """A student, and what it and its teacher have on every text."""
    began = time.process_time()
    more: dict[str, Any] = {
        "scenario": "redyk",
        "conversations": 0.0,
        "quantize": 0,
        "bench_tokens": 0,
        "reconstruct_samples": 32,
        "eval_windows": 3,
    }
    distill.run(
        distill.Settings(teacher=s.teacher, out=str(run), seed=s.seed, iters=s.iters, **more)
    )
    cpu_seconds = round(time.process_time() - began, 1)
    return {
        "cpu_seconds": cpu_seconds,
        **judged(s.teacher, run / "model", folders | {BUILT_IN: None}, s.eval_windows),
    }


def judged(
    teacher: str | None, student: Path, folders: Mapping[str, Path | None], windows: int
) -> dict[str, dict[str, float]]:
    """{text: {"teacher", "student"}} in bits per byte, of folders that --data takes, by the text's
    name. None: the built-in text, whose held-out parts have a row each.
    """
    found = dict[str, dict[str, float]]()
    for name, folder in folders.items():
        data = str(folder) if folder else None
        asked = evaluate.Settings(
            teacher=teacher, students=(str(student),), eval_windows=windows, data=data
        )
        for part, of in evaluate.run(asked).items():
            if isinstance(of, dict) and f"bpb_{student.name}" in of:
                two = {"teacher": of["bpb_teacher"], "student": of[f"bpb_{student.name}"]}
                found[name if folder else f"{name}, {part}"] = two
    return found


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"teacher": s.teacher, "seed": s.seed, "iters": s.iters, "eval_windows": s.eval_windows}
    name = (
        f"teacher_text-{s.seed}"
        if s.teacher is None
        else f"teacher_text-{Path(s.teacher).name}-{s.seed}"
    )
    command = "scripts/mis benchmarks/teacher_text.py" + "".join(
        f" --{k} {given[k]}" for k in ("teacher", "seed") if given[k] is not None
    )
    rows = resumed(name, given, ["rows"]).get("rows", {})
    with tempfile.TemporaryDirectory() as temp:
        folders = texts(Path(temp), s.teacher)
        for label, share in SHARES.items():
            if label not in rows:
                preparation.TEXT_SHARES = share
                rows[label] = row(s, Path(temp) / label, folders)
                kinds = [k for k in folders if k != ANSWERS]
                rows[label]["mean excess"] = sum(
                    rows[label][k]["student"] - rows[label][k]["teacher"] for k in kinds
                ) / len(kinds)
                cli.say(f"{label}: {rows[label]}")
                write(name, command, {"given": given, "rows": rows})


if __name__ == "__main__":
    start(Settings, main)
