"""Let a model write training text, into a folder for --data.

Half of the texts begin with nothing, half with an opening; a chat model gets every second opening
as a question. They are drawn from the model's probabilities: text that it expects. Loops, repeats
and texts with few words are left out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.data.rows import Row
from mis_mlx.evaluation import repetition, writing_cost
from mis_mlx.hardware import memory
from mis_mlx.models import load, mlx_generate, stream, streamed_decode
from mis_mlx.models.model_size import ModelSize, model_of
from mis_mlx.reporting import progress
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import TEACHER_TEXTS
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, as_mis_error, need_place
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
SHORT = 120  # characters of a usable text, at least
WORDLIKE = 0.6  # share of letters and blanks in a usable text, at least


@dataclass(frozen=True)
class Settings(cli.Budgeted, precision.Computing):
    """Writes a new folder with train.jsonl, valid.jsonl and test.jsonl. If you stop it, the same
    command continues.
    """

    model: str | None = None
    """folder or hub id of the model that writes, usually the later teacher; default:
    SmolLM2-135M-Instruct
    """
    out: str = "text"
    """folder to write"""
    data: str | None = None
    """text to mix in, which also provides the held-out splits; default: built-in text"""
    mix: Share = 0.75
    """share of train.jsonl's characters that come from --data"""
    num_samples: Count = TEACHER_TEXTS
    """texts that the model writes"""
    max_tokens: Tokens = 256
    """maximum tokens per text"""
    temp: Positive = 1.0
    """sampling temperature"""
    languages: tuple[str, ...] = ("en", "pl")
    """languages of our openings; text in a language that the model writes badly still helps the
    student to read it
    """
    openings: str | None = None
    """file with one opening per line, instead of ours"""
    seed: Seed = 0
    """selects the text that is mixed in, and the tokens that the model draws"""
    dry_run: bool = False
    """show bytes and time, and stop"""


def openings(languages: Sequence[str], file: str | None = None) -> list[str]:
    """Lines of a file, or ours in these languages. MisError where there are none."""
    known = {path.stem: path for path in sorted(OPENINGS.glob("*.txt"))}
    unknown = [name for name in languages if name not in known]
    if unknown:
        raise MisError(
            f"there are no openings in {', '.join(unknown)}: use {', '.join(known)}, or --openings "
            f"FILE"
        )
    paths = [Path(file)] if file else [known[name] for name in languages]
    lines = []
    try:
        for path in paths:
            lines += path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MisError(
            f"--openings {file} cannot be read ({error}): give a text file, one opening a line"
        ) from None
    filled = [line.strip() for line in lines if line.strip()]
    if file and not filled:
        raise MisError(f"--openings {file} has 0 lines with text: write one opening a line")
    return filled


def usable(text: str) -> bool:
    """Whether a text is long enough, no loop, and made of words."""
    words = sum(char.isalpha() or char.isspace() for char in text)
    return len(text) >= SHORT and words >= WORDLIKE * len(text) and not repetition.loops(text)


def way_of(s: Settings, m: ModelSize, limit: Budget) -> writing_cost.WritingPlan:
    """How the texts are written within the budget. MisError where no way fits."""
    return writing_cost.plan_writing(m, s.num_samples, s.max_tokens, limit, at_once=AT_ONCE)


def write(
    s: Settings,
    model: Any,
    tokenizer: Any,
    batch: int,
    at_once: int,
) -> list[Row]:
    """The usable texts of a batch. Every batch has its own random numbers."""
    begun = openings(s.languages, s.openings)
    rng = np.random.default_rng([s.seed, batch])
    start = tokenizer.get_vocab().get(DOCUMENT, tokenizer.bos_token_id)
    if start is None:
        start = tokenizer.eos_token_id
    stop = set(tokenizer.eos_token_ids)
    texts = []
    chats = []
    heads = []
    prompts = []
    for i in range(at_once):
        text = ""
        if begun and i % 2:
            text = str(rng.choice(begun))
        chat = bool(i % 4 == 3 and tokenizer.has_chat_template)  # every second opening
        head = list(tokenizer.encode(text, add_special_tokens=False))
        prompt = [start, *head]
        if chat:
            prompt = mlx_generate.encode(tokenizer, text)
        texts.append(text)
        chats.append(chat)
        heads.append(head)
        prompts.append(prompt)
    draw = mlx_generate.sampler(s.temp, int(rng.integers(2**31)))
    if isinstance(model, stream.Stream):
        completions = streamed_decode.sampled(model, prompts, s.max_tokens, stop, draw=draw)
    else:
        groups = mlx_generate.groups(
            model, prompts, 1, s.max_tokens, stop=stop, draw=draw, at_once=at_once
        )
        completions = [ids for (ids,) in groups]
    rows: list[Row] = []
    for text, chat, head, ids in zip(texts, chats, heads, completions, strict=True):
        new = [token for token in ids if token not in stop]
        # decoded in one piece: head and rest apart may lose a blank
        written = tokenizer.decode(new if chat else head + new).strip()
        row = {"text": written}
        if chat:
            row = {"prompt": text, "completion": written}
        if usable(written):
            rows.append(row)
    mx.clear_cache()
    return rows


def _stored(part: Path, head: str) -> tuple[list[tuple[Row, int]], int]:
    """(texts of a stopped run, each with the number of its batch; the batch to begin with).

    The last batch is written again: it may not be complete. head: the file's first line, by which a
    run of other settings is told apart.
    """
    if not part.is_file():
        return [], 0
    lines = part.read_text("utf-8").splitlines()
    if lines[:1] != [head]:
        return [], 0
    stored = [json.loads(line) for line in lines[1:-1]]  # the last one may be torn
    if not stored:
        return [], 0
    last = stored[-1][1]
    return [(row, batch) for row, batch in stored if batch < last], last


def _texts(
    settings: Settings,
    checkpoint: Checkpoint,
    part: Path,
    writing_plan: writing_cost.WritingPlan,
) -> list[Row]:
    """As many different texts as are asked for, each kept in the file `part`.

    Those of a stopped run come first, all but its last batch; then new ones. MisError where too few
    are usable.
    """
    # what the texts depend on, and not where they go
    depends_on = {
        **asdict(settings),
        "model": str(checkpoint.path),
        "budget": 0,
        "out": "",
        "at_once": writing_plan.at_once,
    }
    head = json.dumps(depends_on, sort_keys=True)
    stored, batch = _stored(part, head)
    lines = [head, *map(json.dumps, stored)]
    DISK.replace_text(part, "".join(f"{line}\n" for line in lines))
    model: Any
    if writing_plan.headroom_bytes is None:
        model, tokenizer = mlx_generate.open_model(checkpoint)
    else:
        dtype = precision.dtype_of(checkpoint)
        model = stream.Stream(
            checkpoint, dtype, writing_plan.headroom_bytes, direct=writing_plan.direct
        )
        tokenizer = load.tokenizer(checkpoint.path)
    texts = {json.dumps(row): row for row, _ in stored}
    count = len(stored)
    most = TRIES * (settings.num_samples + SPARE)
    left = most
    with progress.bar("text", settings.num_samples) as show:
        while left > 0:
            missing = max(0, settings.num_samples - count)
            size = min(writing_plan.at_once, SPARE + missing, left)
            for row in write(settings, model, tokenizer, batch, size):
                DISK.append(part, json.dumps([row, batch]))
                texts[json.dumps(row)] = row
                count += 1
                show(len(texts))
                if len(texts) == settings.num_samples:
                    return list(texts.values())
            left -= size
            batch += 1
    why = (
        f"only {len(texts)} of {most} texts of this model are usable, but {settings.num_samples} "
        f"were requested"
    )
    raise MisError(f"{why}: ask for fewer with --num-samples, or try another --temp or --openings")


def _passages(row: Row) -> Iterator[Row]:
    """A long text as passages of whole paragraphs, PIECE characters or more; another row as is."""
    if "text" not in row:
        yield row
        return
    passage = ""
    for paragraph in row["text"].split("\n\n"):
        if passage:
            passage += "\n\n"
        passage += paragraph
        if len(passage) >= PIECE:
            yield {"text": passage}
            passage = ""
    if passage.strip():
        yield {"text": passage}


def _length(row: Row) -> int:
    """Characters in all values of a row."""
    return len("".join(map(str, row.values())))


def _drawn(rows: Sequence[Row], most: float, seed: int) -> list[Row]:
    """Passages of other text, about `most` characters of them, drawn by chance."""
    passages: list[Row] = []
    for row in rows:
        passages.extend(_passages(row))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(passages))
    sizes = np.array([_length(passages[i]) for i in order])
    before = np.cumsum(sizes) - sizes  # characters drawn before each passage
    return [passages[i] for i in order[before < most]]


def run(settings: Settings) -> dict[str, Any]:
    """The command, which writes a folder alone."""
    if settings.dry_run:
        return make(settings)
    need_place("--out", settings.out, "new")
    with protocol.only_maker(Path(settings.out), cli.say):
        return make(settings)


def make(settings: Settings) -> dict[str, Any]:
    """Plan, write, mix, commit. Nobody else makes the same folder meanwhile."""
    out = Path(settings.out)
    checkpoint = run_loop.open_model(settings, settings.model, place=settings.out, new="--out")
    openings(settings.languages, settings.openings)
    limit = memory.budget(settings.budget_bytes)
    writing_plan = way_of(settings, model_of(checkpoint), limit)
    streamed = ""
    if writing_plan.headroom_bytes is not None:
        streamed = ", read from disk for every token of them"
    seconds = duration(writing_plan.seconds)
    size = f"{gib(writing_plan.peak_bytes)} of {gib(limit.limit_bytes)}, {seconds}"
    cli.say(f"{settings.num_samples} texts, {writing_plan.at_once} at once{streamed}: {size}")
    planned = {"peak_bytes": writing_plan.peak_bytes, "budget_bytes": limit.limit_bytes}
    if settings.dry_run:
        return planned
    given = preparation.load(settings.data)
    part = out.absolute().with_name(f".{out.name}.part.jsonl")
    with as_mis_error(part.parent, "the text"):
        DISK.make_folder(part.parent)
    with (
        progress.run("synthesize", {"text": writing_plan.seconds}),
        progress.phase("text"),
        memory.limited(limit),
    ):
        texts = _texts(settings, checkpoint, part, writing_plan)
    other = [*given.train]
    if settings.data is None:
        other += preparation.load(preparation.MIS).train
    # `mix` is a share of all characters, those that the model wrote included
    most = sum(map(_length, texts)) * settings.mix / max(1e-9, 1 - settings.mix)
    mixed_in = _drawn(other, most, settings.seed)
    source = {**asdict(settings), "model": str(checkpoint.path), "written": len(texts)}
    splits = {"train": texts + mixed_in, "valid": given.valid, "test": given.test}
    with protocol.commit_folder(out, DISK, PLACE_BYTES, "the text") as folder:
        for name, rows in splits.items():
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            DISK.write(folder / f"{name}.jsonl", lines.encode())
        DISK.write(folder / hub.PROVENANCE, json.dumps(source, indent=1).encode())
    DISK.remove_tree(part)
    cli.say(f"{out}: {len(texts)} texts that the model wrote, {len(mixed_in)} others mixed in")
    return {"out": str(out), "written": len(texts), "mixed_in": len(mixed_in), **planned}


if __name__ == "__main__":
    cli.main(Settings, run)
