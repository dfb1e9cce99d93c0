"""Synthesize text: a model writes what it knows, mixed with other text; a folder for --data of distill and the rest.

Half of the texts begin with nothing, half with an opening. They are drawn from the model's own probabilities, so they
are the text that it expects; loops, repeats and what is hardly words are left out."""

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
from mis_mlx.models import mlx_generate, policy
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK
from mis_mlx.types import Count, MisError, Positive, Seed, Share, Tokens, duration, gib

PLACE_BYTES = 2**26  # of a folder of text, generously
PIECE = 1200  # characters of a long text
OPENINGS = Path(__file__).parent / "data" / "openings"
DOCUMENT = "<|endoftext|>"  # what stands between documents, where a vocabulary has it
AT_ONCE = 48  # texts; a token of all of them reads the weights once
TRIES = 4  # batches for each one that would do if every text were usable
SHORT, LEAST, WORDLIKE = 120, 0.28, 0.6  # characters; share left by compression; share of letters and blanks


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
        raise MisError(f"there are no openings in {', '.join(unknown)}: take {', '.join(known)}, or --openings FILE")
    try:
        paths = [Path(file)] if file else [known[name] for name in languages]
        lines = [line.strip() for path in paths for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MisError(f"--openings {file} cannot be read ({error}): give a text file, one opening a line") from None
    if file and not lines:
        raise MisError(f"--openings {file} has 0 lines with text: write one opening a line")
    return lines


def usable(text: str) -> bool:
    """Whether a text is long enough, no loop, and made of words."""
    words = sum(char.isalpha() or char.isspace() for char in text)
    packed, nbytes = len(zlib.compress(text.encode())), len(text.encode())
    return len(text) >= SHORT and packed >= LEAST * nbytes and words >= WORDLIKE * len(text)


def need_bytes(m: estimates.ModelSize, at_once: int, tokens: int) -> int:
    """Memory of the model whole, keys and values (three times, by mlx-lm's 256 tokens), and logits and their copies."""
    weights, places = m.nbytes + m.item * (m.shape.layers * m.block_params + m.head_params), 256 * -(-tokens // 256)
    return weights + at_once * (3 * estimates.keys_bytes(m, places) + 4 * 4 * m.shape.vocab)


def write(s: Settings, model: Any, tokenizer: Any, batches: range, at_once: int) -> Iterator[tuple[str, int]]:
    """(usable text, its batch), of these batches. Every batch has its own random numbers."""
    begun = openings(s.languages, s.openings)
    named = tokenizer.get_vocab().get(DOCUMENT, tokenizer.bos_token_id)
    start, stop = [tokenizer.eos_token_id if named is None else named], set(tokenizer.eos_token_ids)
    for batch in batches:
        rng = np.random.default_rng([s.seed, batch])
        texts = [str(rng.choice(begun)) if begun and i % 2 else "" for i in range(at_once)]
        heads = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        draw = mlx_generate.sampler(s.temp, int(rng.integers(2**31)))
        prompts = [start + head for head in heads]
        completions = mlx_generate.groups(model, prompts, 1, s.max_tokens, stop, draw, at_once)
        for head, (ids,) in zip(heads, completions, strict=True):  # read as one: a piece alone may lose its blank
            text = tokenizer.decode([token for token in head + ids if token not in stop]).strip()
            if usable(text):
                yield text, batch
        mx.clear_cache()


def _written(s: Settings, folder: Path, part: Path, at_once: int, batches: int) -> Iterator[tuple[str, int]]:
    """Texts of a run that was stopped, all but its last batch; then new ones, each kept in the file `part`."""
    head = json.dumps({**asdict(s), "model": str(folder), "budget": 0, "out": "", "at_once": at_once}, sort_keys=True)
    lines = part.read_text("utf-8").splitlines() if part.is_file() else []
    found = [json.loads(line) for line in lines[1:-1]] if lines[:1] == [head] else []  # the last one may be torn
    first = found[-1][1] if found else 0
    kept = [one for one in found if one[1] < first]
    DISK.replace_text(part, "".join(f"{line}\n" for line in (head, *map(json.dumps, kept))))
    yield from kept
    for one in write(s, *mlx_generate.open_model(folder), range(first, batches), at_once):
        DISK.append(part, json.dumps(one))
        yield one


def _texts(s: Settings, folder: Path, part: Path, at_once: int) -> list[str]:
    """As many different ones as are asked for. MisError where hardly any is usable."""
    texts, most = dict[str, None](), TRIES * (1 + s.num_samples // at_once)
    with progress.bar("text", s.num_samples) as show:
        for text, _ in _written(s, folder, part, at_once, most):
            texts[text] = None
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
        pieces += [{"text": text[i : i + PIECE]} for i in range(0, len(text), PIECE)] or [row]
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
    openings(s.languages, s.openings)
    limit, m = memory.budget(s.budget_bytes), estimates.model_of(checkpoint)
    own = memory.process_bytes(limit.limit_bytes)
    needs = {n: own + need_bytes(m, n, s.max_tokens) for n in (AT_ONCE, 16, 4, 1)}
    at_once, need = next(((n, b) for n, b in needs.items() if b <= limit.limit_bytes), (1, needs[1]))
    limit.need(need, "a model that writes, whole in memory,", f"give --budget {estimates.flag(need)}")
    flops = estimates.forward_flops(m, s.num_samples * s.max_tokens, s.max_tokens)
    seconds = flops / estimates.machine_rates().forward_flops_per_s
    cli.say(f"{s.num_samples} texts, {at_once} at once: {gib(need)} of {gib(limit.limit_bytes)}, {duration(seconds)}")
    planned = {"peak_bytes": need, "budget_bytes": limit.limit_bytes}
    if s.dry_run:
        return planned
    given, part = preparation.load(s.data), out.absolute().with_name(f".{out.name}.part.jsonl")
    with progress.run("synthesize", {"text": seconds}), progress.phase("text"), memory.limited(limit):
        texts = _texts(s, checkpoint.path, part, at_once)
    built_in = preparation.load(preparation.MIS).train if s.data is None else []
    other = _pieces([*given.train, *built_in], sum(map(len, texts)) * s.mix / max(1e-9, 1 - s.mix), s.seed)
    train = [{"text": text} for text in texts] + other
    with protocol.commit_folder(out, DISK, PLACE_BYTES, "the text") as folder:
        for name, split in (("train", train), ("valid", given.valid), ("test", given.test)):
            DISK.write(folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in split).encode())
    DISK.remove_tree(part)
    return {"out": str(out), "written": len(texts), "mixed_in": len(other), **planned}


if __name__ == "__main__":
    cli.main(Settings, run)
