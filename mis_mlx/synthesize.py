"""Synthesize text: a model writes what it knows, mixed with other text; a folder for --data of distill and the rest."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx import cli
from mis_mlx.data import sources
from mis_mlx.data.rows import Row
from mis_mlx.distillation import run_loop, teacher_text
from mis_mlx.distillation.teacher_text import AT_ONCE, TRIES, Written
from mis_mlx.hardware import memory
from mis_mlx.models import mlx_generate, policy
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK
from mis_mlx.types import Count, MisError, Positive, Seed, Share, Tokens, duration, gib

PLACE_BYTES = 2**26  # of a folder of text, generously
PIECE = 1200  # characters of a long text


@dataclass(frozen=True)
class Settings(cli.Budgeted, policy.Computing):
    """The result is a new folder with train.jsonl, valid.jsonl and test.jsonl. Stopped, the same command goes on."""

    model: str | None = None
    """folder or hub id of the model that writes, the teacher to be; default: SmolLM2-135M-Instruct"""
    out: str = "text"
    """folder to write"""
    data: str | None = None
    """text that is mixed in, and of which the held-out splits are; default: built in"""
    mix: Share = 0.5
    """share of the characters in train.jsonl that are of --data"""
    num_samples: Count = 144
    """texts that the model writes"""
    max_tokens: Tokens = 256
    """most tokens of a text"""
    temp: Positive = 1.0
    """of the sampling"""
    languages: tuple[str, ...] = ("en",)
    """of our openings, en and pl: those that the model knows"""
    openings: str | None = None
    """file with an opening a line, in place of ours"""
    seed: Seed = 0
    dry_run: bool = False
    """say bytes and time and stop"""


def _written(s: Settings, folder: Path, part: Path, at_once: int, batches: int) -> Iterator[Written]:
    """Texts of a run that was stopped, all but its last batch; then new ones, each kept in the file `part`."""
    head = json.dumps(
        {**asdict(s), "model": str(folder), "budget": None, "out": None, "at_once": at_once}, sort_keys=True
    )
    lines = part.read_text("utf-8").splitlines() if part.is_file() else []
    kept = [Written(**row) for row in map(json.loads, lines[1:])] if lines[:1] == [head] else []
    first = kept[-1].batch if kept else 0
    kept = [one for one in kept if one.batch < first]
    DISK.replace_text(part, "".join(f"{line}\n" for line in (head, *(json.dumps(one._asdict()) for one in kept))))
    yield from kept
    model, tokenizer = mlx_generate.open_model(folder)
    begun, todo = teacher_text.openings(s.languages, s.openings), range(first, batches)
    for one in teacher_text.write(model, tokenizer, begun, todo, s.max_tokens, s.temp, s.seed, at_once):
        DISK.append(part, json.dumps(one._asdict()))
        yield one


def _texts(s: Settings, folder: Path, part: Path, at_once: int) -> list[str]:
    """As many different ones as are asked for. MisError where hardly any is usable."""
    texts, most = dict[str, None](), TRIES * (1 + s.num_samples // at_once)
    with progress.bar("text", s.num_samples) as show:
        for one in _written(s, folder, part, at_once, most):
            texts[one.text] = None
            show(len(texts))
            if len(texts) == s.num_samples:
                return list(texts)
    why = f"of {most * at_once} texts of this model only {len(texts)} are usable, {s.num_samples} were asked for"
    raise MisError(f"{why}: ask for fewer with --num-samples, or try another --temp or --openings")


def _pieces(rows: Sequence[Row], most: float, seed: int) -> list[Row]:
    """Rows of other text, about `most` characters of them, drawn by chance; long texts in pieces."""
    pieces = list[Row]()
    for row in rows:
        text = row.get("text", "")
        pieces += (
            [row] if len(text) < 2 * PIECE else [{"text": text[i : i + PIECE]} for i in range(0, len(text), PIECE)]
        )
    drawn, length = list[Row](), 0
    for i in np.random.default_rng(seed).permutation(len(pieces)):
        if length >= most:
            break
        drawn.append(pieces[i])
        length += len("".join(map(str, pieces[i].values())))
    return drawn


def run(settings: Settings) -> dict[str, Any]:
    """The command: plan, write, mix, commit."""
    s, out = settings, Path(settings.out)
    checkpoint = run_loop.opened(s, s.model, place=s.out, new="--out")
    teacher_text.openings(s.languages, s.openings)
    limit, m = memory.budget(s.budget_bytes), estimates.model_of(checkpoint)
    needs = {n: teacher_text.need_bytes(m, n, s.max_tokens) for n in (AT_ONCE, 16, 4, 1)}
    at_once, need = next(((n, b) for n, b in needs.items() if b <= limit.limit_bytes), (1, needs[1]))
    remedy = f"give --budget {estimates.flag(need)}, or text with --data"
    limit.need(need, "a model that writes, whole in memory,", remedy)
    flops = estimates.forward_flops(m, s.num_samples * s.max_tokens, s.max_tokens)
    seconds = flops / estimates.machine_rates().forward_flops_per_s
    sizes = f"{gib(need)} of {gib(limit.limit_bytes)}"
    cli.say(f"{s.num_samples} texts, {at_once} at once: {sizes}, {duration(seconds)} or more")
    planned = {"peak_bytes": need, "budget_bytes": limit.limit_bytes}
    if s.dry_run:
        return planned
    given, part = sources.load(s.data), out.absolute().with_name(f".{out.name}.part.jsonl")
    with progress.run("synthesize", {"text": seconds}), progress.phase("text"), memory.limited(limit):
        texts = _texts(s, checkpoint.path, part, at_once)
    other = _pieces(given.train, sum(map(len, texts)) * s.mix / max(1e-9, 1 - s.mix), s.seed)
    train = [{"text": text} for text in texts] + other

    def fill(folder: Path) -> None:
        for name, split in (("train", train), ("valid", given.valid), ("test", given.test)):
            DISK.write(folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in split).encode())

    protocol.commit_folder(out, fill, DISK, PLACE_BYTES, "the text")
    part.unlink()
    return {"out": str(out), "written": len(texts), "mixed_in": len(other), **planned}


if __name__ == "__main__":
    cli.main(Settings, run)
