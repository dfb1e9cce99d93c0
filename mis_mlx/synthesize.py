"""Let a model write training text, into a folder for --data.

Half of the texts begin with nothing, half with an opening; a chat model gets every second opening
as a question, and a model that calls tools gets one text in sixteen as a question with tools. They
are drawn from the model's probabilities: text that it expects. Loops, repeats, texts with few words
and broken calls are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import chat_template, preparation, prompts
from mis_mlx.data.rows import Row
from mis_mlx.hardware import memory
from mis_mlx.judge import repetition
from mis_mlx.judge.write import WritingPlan, plan_writing
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.writing import mlx_generate, tool_calls
from mis_mlx.models.writing.continuous_batch import Texts
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.reporting import progress
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import TEACHER_TEXTS
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, as_mis_error, need_place
from mis_mlx.storage.journal import Journal
from mis_mlx.types import (
    Also,
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
OPENING_TOKENS = 64  # of what a text begins with, at most by usual tokenizers
TOOLS_TOKENS = 512  # of a question with its tools
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
    temp: Annotated[Positive, Also(("temperature",))] = 1.0
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


def way_of(s: Settings, m: ModelSize, limit: Budget, *, tools: bool = False) -> WritingPlan:
    """How the texts are written within the budget. tools: some prompts have them.

    MisError where no way fits.
    """
    before = TOOLS_TOKENS if tools else OPENING_TOKENS
    texts = Texts(s.num_samples, before, s.max_tokens)
    return plan_writing(m, texts, limit, at_once=AT_ONCE)


class _Asked(NamedTuple):
    """What text number `number` begins with.

    text: the opening, or "". head: token ids that belong to the text. prompt: what the model
    continues. seed: of its random numbers. tools: that it may call.
    """

    number: int
    text: str
    chat: bool
    head: list[int]
    prompt: list[int]
    seed: int
    tools: tuple[Mapping[str, Any], ...] = ()


def _asked(
    s: Settings,
    tokenizer: Any,
    number: int,
    begun: Sequence[str],
    calling: Sequence[prompts.Prompt] = (),
) -> _Asked:
    """It depends on the settings and the text's number alone.

    begun: openings. calling: prompts with tools, where the model calls any.
    """
    rng = np.random.default_rng([s.seed, number])
    text = ""
    if begun and number % 2:
        text = str(rng.choice(begun))
    head = list(tokenizer.encode(text, add_special_tokens=False))
    chat = bool(number % 4 == 3 and tokenizer.has_chat_template)  # every second opening
    tools: tuple[Mapping[str, Any], ...] = ()
    if chat and calling and number % prompts.TOOLS_EVERY == prompts.TOOLS_EVERY - 1:
        chosen = calling[int(rng.integers(len(calling)))]
        text = chosen.turns[0]
        tools = chosen.tools
    if chat:
        question = [{"role": "user", "content": text}]
        prompt = mlx_generate.chat_ids(tokenizer, question, tools=tools)
    else:
        start = tokenizer.get_vocab().get(DOCUMENT, tokenizer.bos_token_id)
        if start is None:
            start = tokenizer.eos_token_id
        prompt = [start, *head]
    seed = int(rng.integers(2**31))
    return _Asked(
        number=number, text=text, chat=chat, head=head, prompt=prompt, seed=seed, tools=tools
    )


def write(
    s: Settings, writer: TextWriter, tokenizer: Any, numbers: Sequence[int]
) -> Iterator[tuple[int, Row | None]]:
    """(number, the text) of these numbers, as they end; None where it is not usable.

    A text has random numbers of its own, so it does not depend on the others.
    """
    begun = openings(s.languages, s.openings)
    stop = set(tokenizer.eos_token_ids)
    calling = prompts.calling() if chat_template.knows_tools(tokenizer) else []
    asked = [_asked(s, tokenizer, number, begun, calling) for number in numbers]
    draws = Draws(Sampling(s.temp), [text.seed for text in asked])
    continued = [text.prompt for text in asked]
    for place, ids in writer.completions(continued, s.max_tokens, stop, draws):
        number, text, chat, head, *_, tools = asked[place]
        new = [token for token in ids if token not in stop]
        # decoded in one piece: head and rest apart may lose a blank
        written = tokenizer.decode(new if chat else head + new).strip()
        if tools:
            yield number, _called(text, written, tokenizer, tools)
            continue
        row: Row = {"text": written}
        if chat:
            row = {"prompt": text, "completion": written}
        yield number, row if usable(written) else None


def _called(
    text: str, written: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]]
) -> Row | None:
    """A conversation with tools; None where its call is broken, or it says nothing."""
    reply = tool_calls.reply(written, tokenizer, tools)
    if reply is None or (not reply.get("tool_calls") and not usable(written)):
        return None
    return {"messages": [{"role": "user", "content": text}, reply], "tools": list(tools)}


def _stored(part: Journal) -> dict[int, Row | None]:
    """The texts of a stopped run by number; None: one that is not usable."""
    found = part.begin()
    stored = dict[int, Row | None]()
    # Earlier versions wrote pairs.
    for line in part.path.read_text("utf-8").splitlines():
        with suppress(ValueError):  # the last one may be torn
            pair = json.loads(line)
            if isinstance(pair, list):
                stored[pair[0]] = pair[1]
    for (number,), record in found.items():
        stored[number] = record["row"]
    return stored


def _different(stored: Mapping[int, Row | None], most: int) -> list[Row]:
    """The first `most` different usable texts, in the order of their numbers."""
    rows = {}
    for number in sorted(stored):
        row = stored[number]
        if row is not None:
            rows[json.dumps(row)] = row
    return list(rows.values())[:most]


def _texts(
    settings: Settings,
    checkpoint: Checkpoint,
    part: Path,
    writing_plan: WritingPlan,
) -> list[Row]:
    """As many different texts as are asked for, each kept in the file `part`.

    Those of a stopped run come first; then new ones. MisError where too few are usable.
    """
    # what the texts depend on, and not where they go
    depends_on = {
        **asdict(settings),
        "model": str(checkpoint.path),
        "budget": 0,
        "out": "",
    }
    kept = Journal(part, ("number",), identity=depends_on)
    stored = _stored(kept)
    writer = writing_plan.open(checkpoint)
    tokenizer = load.tokenizer(checkpoint.path)
    count = settings.num_samples
    most = TRIES * (count + SPARE)
    asked = 0
    texts = list[Row]()
    with progress.bar("text", count) as show:
        while asked < most and len(texts) < count:
            # Which texts are asked for depends on the settings alone, so on no budget.
            end = min(most, asked + SPARE + count - len(texts))
            missing = [number for number in range(asked, end) if number not in stored]
            for number, row in write(settings, writer, tokenizer, missing):
                kept.add({"number": number, "row": row})
                stored[number] = row
                show(len(_different(stored, count)))
            mx.clear_cache()
            asked = end
            texts = _different({n: row for n, row in stored.items() if n < end}, count)
    if len(texts) < count:
        why = (
            f"only {len(texts)} of {most} texts of this model are usable, but {count} were "
            f"requested"
        )
        raise MisError(
            f"{why}: ask for fewer with --num-samples, or try another --temp or --openings"
        )
    return texts


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
    calls = chat_template.knows_tools(load.tokenizer(checkpoint.path))
    writing_plan = way_of(settings, model_of(checkpoint), limit, tools=calls)
    streamed = ""
    if writing_plan.headroom_bytes is not None:
        streamed = ", read from disk for every token of them"
    seconds = duration(writing_plan.seconds)
    size = f"{gib(writing_plan.peak_bytes)} of {gib(limit.limit_bytes)}, {seconds}"
    cli.say(f"{settings.num_samples} texts, {writing_plan.at_once} at once{streamed}: {size}")
    planned = {"peak_bytes": writing_plan.peak_bytes, "budget_bytes": limit.limit_bytes}
    if settings.dry_run:
        return planned
    # `mix` is a share of all characters, those that the model writes included.
    mixed = settings.mix / max(1e-9, 1 - settings.mix)
    given = preparation.load(settings.data, int(mixed * settings.num_samples * settings.max_tokens))
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
    mixed_in = _drawn(other, sum(map(_length, texts)) * mixed, settings.seed)
    source = {**asdict(settings), "model": str(checkpoint.path), "written": len(texts)}
    splits = {"train": texts + mixed_in, "valid": given.valid, "test": given.test}
    with protocol.commit_folder(out, DISK, PLACE_BYTES, "the text") as folder:
        for name, rows in splits.items():
            if not rows:  # a text without a split to choose by
                continue
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            DISK.write(folder / f"{name}.jsonl", lines.encode())
        DISK.write(folder / hub.PROVENANCE, json.dumps(source, indent=1).encode())
    DISK.remove_tree(part)
    cli.say(f"{out}: {len(texts)} texts that the model wrote, {len(mixed_in)} others mixed in")
    return {"out": str(out), "written": len(texts), "mixed_in": len(mixed_in), **planned}


if __name__ == "__main__":
    cli.main(Settings, run)
