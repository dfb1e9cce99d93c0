"""Synthesize text: a model writes what it knows, mixed with other text; a folder for --data of
distill and the rest.

Half of the texts begin with nothing, half with an opening; a chat model gets every second one as a
question. They are drawn from the model's probabilities: text that it expects. Loops, repeats and
what is hardly words are left out.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.data.rows import Row
from mis_mlx.distillation import run_loop
from mis_mlx.hardware import memory
from mis_mlx.models import load, mlx_generate, policy, stream, streamed_decode
from mis_mlx.planner import estimates, writing
from mis_mlx.reporting import progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, reported
from mis_mlx.types import (
    Budget,
    Checkpoint,
    Count,
    MisError,
    Positive,
    Seed,
    Share,
    Tokens,
    duration,
    gib,
)

PLACE_BYTES = 2**26  # of a folder of text, generously
PIECE = 1200  # characters of a passage of a long text, at least
OPENINGS = Path(__file__).parent / "data" / "openings"
DOCUMENT = "<|endoftext|>"  # what stands between documents, where a vocabulary has it
AT_ONCE = 48, 16, 4, 1  # texts, as many as fit; a token of all of them reads the weights once
SPARE = 4  # more than are missing, for some are not usable
TRIES = 4  # texts for each one that would do if every one were usable
# characters; share left by compression; share of letters and blanks
SHORT = 120
LEAST = 0.28
WORDLIKE = 0.6


@dataclass(frozen=True)
class Settings(cli.Budgeted, policy.Computing):
    """The result is a new folder with train.jsonl, valid.jsonl and test.jsonl. Stopped, the same
    command goes on.
    """

    model: str | None = None
    """folder or hub id of the model that writes, the teacher to be; default:
    SmolLM2-135M-Instruct
    """
    out: str = "text"
    """folder to write"""
    data: str | None = None
    """text that is mixed in, and of which the held-out splits are; default: built in"""
    mix: Share = 0.75
    """share of the characters in train.jsonl that are of --data"""
    num_samples: Count = 144
    """texts that the model writes"""
    max_tokens: Tokens = 256
    """most tokens of a text"""
    temp: Positive = 1.0
    """of the sampling"""
    languages: tuple[str, ...] = ("en", "pl")
    """of our openings; one in which the model writes badly still helps the student to read it"""
    openings: str | None = None
    """file with an opening a line, in place of ours"""
    seed: Seed = 0
    dry_run: bool = False
    """say bytes and time and stop"""


def openings(languages: Sequence[str], file: str | None = None) -> list[str]:
    """Lines of a file, or ours in these languages. MisError where there are none."""
    known = {path.stem: path for path in sorted(OPENINGS.glob("*.txt"))}
    if unknown := [name for name in languages if name not in known]:
        raise MisError(
            f"there are no openings in {', '.join(unknown)}: take {', '.join(known)}, or "
            f"--openings FILE"
        )
    try:
        paths = [Path(file)] if file else [known[name] for name in languages]
        lines = [
            line.strip()
            for path in paths
            for line in path.read_text("utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise MisError(
            f"--openings {file} cannot be read ({error}): give a text file, one opening a line"
        ) from None
    if file and not lines:
        raise MisError(f"--openings {file} has 0 lines with text: write one opening a line")
    return lines


def usable(text: str) -> bool:
    """Whether a text is long enough, no loop, and made of words."""
    words = sum(char.isalpha() or char.isspace() for char in text)
    packed = len(zlib.compress(text.encode()))
    nbytes = len(text.encode())
    return len(text) >= SHORT and packed >= LEAST * nbytes and words >= WORDLIKE * len(text)


def way_of(s: Settings, m: estimates.ModelSize, limit: Budget) -> writing.WritingPlan:
    """How the texts are written within the budget. MisError where no way fits."""
    return writing.plan_writing(m, s.num_samples, s.max_tokens, limit, at_once=AT_ONCE)


def write(s: Settings, model: Any, tokenizer: Any, batch: int, at_once: int) -> list[Row]:
    """What is usable of a batch. Every batch has its own random numbers."""
    begun = openings(s.languages, s.openings)
    rng = np.random.default_rng([s.seed, batch])
    named = tokenizer.get_vocab().get(DOCUMENT, tokenizer.bos_token_id)
    start = [tokenizer.eos_token_id if named is None else named]
    stop = set(tokenizer.eos_token_ids)
    texts = [str(rng.choice(begun)) if begun and i % 2 else "" for i in range(at_once)]
    asked = [bool(i % 4 == 3 and tokenizer.has_chat_template) for i in range(at_once)]
    heads = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    each = zip(texts, asked, heads, strict=True)
    prompts = [
        mlx_generate.encode(tokenizer, text) if chat else start + head for text, chat, head in each
    ]
    draw = mlx_generate.sampler(s.temp, int(rng.integers(2**31)))
    if isinstance(model, stream.Stream):
        completions = streamed_decode.sampled(model, prompts, s.max_tokens, stop, draw)
    else:
        completions = [
            ids
            for (ids,) in mlx_generate.groups(model, prompts, 1, s.max_tokens, stop, draw, at_once)
        ]
    rows = list[Row]()
    for text, chat, head, ids in zip(texts, asked, heads, completions, strict=True):
        said = [token for token in ids if token not in stop]
        # head and rest apart may lose a blank
        whole = tokenizer.decode(said if chat else head + said).strip()
        if usable(whole):
            rows.append({"prompt": text, "completion": whole} if chat else {"text": whole})
    mx.clear_cache()
    return rows


def _texts(s: Settings, checkpoint: Checkpoint, part: Path, way: writing.WritingPlan) -> list[Row]:
    """As many different ones as are asked for, each kept in the file `part`: of a run that was
    stopped, all but its last batch; then new ones. MisError where hardly any is usable.
    """
    how = {
        **asdict(s),
        "model": str(checkpoint.path),
        "budget": 0,
        "out": "",
        "at_once": way.at_once,
    }
    head = json.dumps(how, sort_keys=True)
    lines = part.read_text("utf-8").splitlines() if part.is_file() else []
    # the last one may be torn
    found = [json.loads(line) for line in lines[1:-1]] if lines[:1] == [head] else []
    batch = found[-1][1] if found else 0
    kept = [one for one in found if one[1] < batch]
    DISK.replace_text(part, "".join(f"{line}\n" for line in (head, *map(json.dumps, kept))))
    model: Any
    if way.room_bytes is None:
        model, tokenizer = mlx_generate.open_model(checkpoint.path)
    else:
        model = stream.Stream(
            checkpoint, policy.compute_dtype(checkpoint), way.room_bytes, way.direct
        )
        tokenizer = load.tokenizer(checkpoint.path)
    texts = {json.dumps(row): row for row, _ in kept}
    count = len(kept)
    most = left = TRIES * (s.num_samples + SPARE)
    with progress.bar("text", s.num_samples) as show:
        while left > 0:
            # of the last one: what is missing
            size = min(way.at_once, SPARE + max(0, s.num_samples - count), left)
            for row in write(s, model, tokenizer, batch, size):
                DISK.append(part, json.dumps([row, batch]))
                texts[json.dumps(row)] = row
                count += 1
                show(len(texts))
                if len(texts) == s.num_samples:
                    return list(texts.values())
            left = left - size
            batch = batch + 1
    why = (
        f"of {most} texts of this model only {len(texts)} are usable, {s.num_samples} were "
        f"asked "
        f"for"
    )
    raise MisError(f"{why}: ask for fewer with --num-samples, or try another --temp or --openings")


def _passages(row: Row) -> Iterator[Row]:
    """A long text in passages of PIECE characters or more, whole paragraphs each; another row as it
    is.
    """
    if "text" not in row:
        yield row
        return
    passage = ""
    for paragraph in row["text"].split("\n\n"):
        passage += ("\n\n" if passage else "") + paragraph
        if len(passage) >= PIECE:
            yield {"text": passage}
            passage = ""
    if passage.strip():
        yield {"text": passage}


def _length(row: Row) -> int:
    """Characters, of all that it says."""
    return len("".join(map(str, row.values())))


def _drawn(rows: Sequence[Row], most: float, seed: int) -> list[Row]:
    """Passages of other text, about `most` characters of them, drawn by chance."""
    passages = [passage for row in rows for passage in _passages(row)]
    order = np.random.default_rng(seed).permutation(len(passages))
    sizes = np.array([_length(passages[i]) for i in order])
    return [passages[i] for i in order[np.cumsum(sizes) - sizes < most]]


def run(settings: Settings) -> dict[str, Any]:
    """The command: plan, write, mix, commit."""
    s = settings
    out = Path(settings.out)
    checkpoint = run_loop.opened(s, s.model, place=s.out, new="--out")
    openings(s.languages, s.openings)
    limit = memory.budget(s.budget_bytes)
    m = estimates.model_of(checkpoint)
    way = way_of(s, m, limit)
    how = "" if way.room_bytes is None else ", read from disk for every token of them"
    size = f"{gib(way.peak_bytes)} of {gib(limit.limit_bytes)}, {duration(way.seconds)}"
    cli.say(f"{s.num_samples} texts, {way.at_once} at once{how}: {size}")
    planned = {"peak_bytes": way.peak_bytes, "budget_bytes": limit.limit_bytes}
    if s.dry_run:
        return planned
    given = preparation.load(s.data)
    part = out.absolute().with_name(f".{out.name}.part.jsonl")
    with reported(part.parent, "the text"):
        DISK.make_folder(part.parent)
    with (
        progress.run("synthesize", {"text": way.seconds}),
        progress.phase("text"),
        memory.limited(limit),
    ):
        texts = _texts(s, checkpoint, part, way)
    built_in = preparation.load(preparation.MIS).train if s.data is None else []
    other = _drawn(
        [*given.train, *built_in], sum(map(_length, texts)) * s.mix / max(1e-9, 1 - s.mix), s.seed
    )
    source = {**asdict(s), "model": str(checkpoint.path), "written": len(texts)}
    with protocol.commit_folder(out, DISK, PLACE_BYTES, "the text") as folder:
        for name, split in (("train", texts + other), ("valid", given.valid), ("test", given.test)):
            DISK.write(
                folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in split).encode()
            )
        DISK.write(folder / hub.PROVENANCE, json.dumps(source, indent=1).encode())
    DISK.remove_tree(part)
    return {"out": str(out), "written": len(texts), "mixed_in": len(other), **planned}


if __name__ == "__main__":
    cli.main(Settings, run)
