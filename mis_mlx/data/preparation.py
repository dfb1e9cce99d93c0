"""Text in three splits, and token windows of it: held-out windows share nothing with training.

The text comes from folders in mlx-lm's format or the hub, or is built in: Python's manual in
English (`pydoc_data`), the Polish Miś texts (benchmarks/polish_text at bd583ffb wrote them), what
the default teacher wrote. Every row is judged first; notes say what was dropped.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.data import chat_template, draws, manual, token_windows
from mis_mlx.data.overlap import without_overlap
from mis_mlx.data.row_draw import drawn, drawn_bytes
from mis_mlx.data.rows import Reading, Row, collect, read, split_off
from mis_mlx.data.token_windows import Windows
from mis_mlx.storage import files
from mis_mlx.types import MisError

MIS = "mis"  # `--data mis`: the Polish texts; a folder of that name is reached as ./mis
MIS_FOLDER = Path(__file__).parent / "polish" / MIS
SPLITS = ("train", "valid", "test")
Stamps = tuple[tuple[str, int, int], ...]  # of a folder's files: name, time of change, bytes
WRITTEN = Path(__file__).parent / "written" / "train.jsonl"  # ABOUT says by whom
# of the default teacher, to data/prompts
ANSWERS = Path(__file__).parent / "written" / "answers.jsonl"
CONVERSATIONS = "conversations"
LEAST_CHOOSING = 4  # windows, of which a mean says something
# Of every draw of the built-in training text, without conversations (teacher_text.py at bd583ffb)
# and with them, which trials on one seed chose: more of them costs the manual, less of them answers
# (answers.py at bd583ffb compares).
TEXT_SHARES = {"Python documentation": 5 / 8, "Polish": 1 / 8, "written by a model": 2 / 8}
SHARES = {
    "Python documentation": 0.35,
    "Polish": 0.12,
    "written by a model": 0.09,
    CONVERSATIONS: 0.44,
}
TALK = {
    "messages": [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
    ]
}


class Source(NamedTuple):
    """Which text a run learns from.

    data: as `load` takes it. answers: a file of conversations to learn from besides. share: of
    conversations in every draw; None: the usual one, where there are any. tokens: that the run
    visits; a text too large to be used whole (data/row_draw) is read for so many. seed: of the
    answers that its teacher writes (distillation/conversations).
    """

    data: str | None = None
    answers: Path | None = None
    share: float | None = None
    tokens: int = 0
    seed: int = 0


class Texts(NamedTuple):
    """Rows per split, and sentences on where all this came from.

    train: to learn from. valid: to choose by, perhaps none. test: to judge by; no row of it chooses
    anything. Of the built-in text nothing reads `valid`.
    """

    train: Sequence[Row]
    valid: Sequence[Row]
    test: Sequence[Row]
    notes: Sequence[str]


def load(data: str | None = None, tokens: int = 0) -> Texts:
    """The rows of `data`: None (the English text built in), "mis" (the Polish), a folder, a hub id.

    tokens: that are visited; it matters for a large text alone, as in `Source`. What was read last
    is kept, and read again where a file has changed. MisError where there is no such text, or no
    row of it is usable.
    """
    if data is None:
        version = ".".join(map(str, sys.version_info[:3]))
        return _built_in(f"English text: the manual of Python {version}", manual.splits())
    if data == MIS:
        shared = (
            "; its splits share sentence templates but not values, so runs of 32 tokens from train "
            "are common"
        )
        splits = {name: read(MIS_FOLDER / f"{name}.jsonl").rows for name in SPLITS}
        return _built_in("Polish text: the Miś dataset", splits, shared)
    folder = Path(data).expanduser()
    if folder.is_dir():  # mlx-lm's: train.jsonl and perhaps valid.jsonl, test.jsonl
        stamps = []
        for file in sorted(folder.glob("*.jsonl")):
            facts = file.stat()
            stamps.append((file.name, facts.st_mtime_ns, facts.st_size))
        return _from_folder(folder.absolute(), tuple(stamps), tokens)
    if folder.exists():
        raise MisError(f"{folder} is a file: --data takes the folder that holds train.jsonl")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data):
        raise MisError(
            f"there is no folder {folder}: --data takes a folder with train.jsonl, or a hub id"
        )
    return _from_hub(data, tokens)


def forget() -> None:
    """Let go of what `load` keeps, once all windows are made."""
    _from_folder.cache_clear()
    _from_hub.cache_clear()


def _built_in(what: str, splits: Mapping[str, Sequence[Row]], note: str = "") -> Texts:
    counts = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
    return Texts(**splits, notes=[f"built-in {what}, {counts} documents{note}"])


def _most_bytes(split: str, tokens: int) -> int:
    """Of a large text. The training visits so many tokens; held-out windows are few."""
    return drawn_bytes(tokens if split == "train" else 0)


# A run asks for its text more than once: does it have conversations, its windows, those of another
# vocabulary.
@lru_cache(maxsize=1)
def _from_folder(folder: Path, _: Stamps, tokens: int) -> Texts:
    if not (folder / "train.jsonl").exists():
        raise MisError(f"{folder} has no train.jsonl: put one there, one JSON object per line")
    readings = {}
    for name in SPLITS:
        path = folder / f"{name}.jsonl"
        if path.exists():
            readings[name] = read(path, _most_bytes(name, tokens))
    return _splits(readings, str(folder))


@lru_cache(maxsize=1)
def _from_hub(name: str, tokens: int) -> Texts:
    try:
        import datasets
    except ImportError as error:
        raise MisError(
            f"'{name}' is not a folder here, and hub data sets need a package: pip install "
            f"'.[data]' in the checkout"
        ) from error
    try:
        dataset = datasets.load_dataset(name)
    except Exception as error:  # the package raises dozens of kinds, all of them "could not get it"
        raise MisError(
            f"the hub did not deliver the dataset '{name}' ({error}): check its name"
        ) from error
    readings = {}
    splits = {"train": "train", "validation": "valid", "valid": "valid", "test": "test"}
    for spelling, split in splits.items():
        if spelling in dataset:
            called = f"{name}[{spelling}]"
            rows = ((i, dict(row), None) for i, row in enumerate(dataset[spelling], 1))
            sized = ((row, len(repr(row[1]))) for row in rows)
            some = drawn(sized, _most_bytes(split, tokens))
            reading = collect(called, "row", some.items)
            readings[split] = reading._replace(left_out=some.note(called))
    if "train" not in readings:
        raise MisError(
            f"the dataset '{name}' has no split called train (it has {', '.join(dataset)}): choose "
            f"another"
        )
    return _splits(readings, name)


def _splits(readings: Mapping[str, Reading], source: str) -> Texts:
    """Texts out of one to three readings; missing splits are filled in, and notes say so."""
    notes = []
    for reading in readings.values():
        if not reading.rows:
            bad = f"{len(reading.problems)} bad ones"
            if reading.problems:
                bad += f" ({reading.problems[0]})"
            raise MisError(f"{source}: {reading.name} has 0 usable rows and {bad}: fix that file")
        notes += reading.notes()
    rows = {name: list(reading.rows) for name, reading in readings.items()}
    if len(rows) == 1:
        # by hash: the order of the rows does not matter
        rows["train"], rows["test"] = _split_by_hash(rows["train"])
        notes.append(
            f"no valid split: {len(rows['test'])} rows of train are held out instead, by a hash"
        )
    elif "test" not in rows:
        rows["test"] = rows.pop("valid")
        notes.append(f"no test split: the {len(rows['test'])} rows of valid serve as test")
    if "valid" not in rows:
        rows["valid"], rows["test"] = _halved(rows["test"])
        if rows["valid"]:
            notes.append(
                f"sizes are chosen by {len(rows['valid'])} held-out conversations, the other "
                f"{len(rows['test'])} held-out rows judge"
            )
    return Texts(**rows, notes=notes)


def _halved(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(half of the conversations, by hash; the others and the texts).

    Texts stay together: whoever chooses by their windows takes other ones than those that judge.
    """
    chosen = []
    others = []
    for row in rows:
        # The first digits of the hash hold rows out: the last one is as good as another coin.
        if "text" not in row and int(files.json_sha256(row)[-1], 16) % 2 == 0:
            chosen.append(row)
        else:
            others.append(row)
    if chosen and not others:
        others.append(chosen.pop())
    return chosen, others


def _split_by_hash(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(the others, a tenth of the rows, by hash)."""
    return split_off(rows, [files.json_sha256(row) for row in rows])


class Data(NamedTuple):
    """Windows to train on, and held-out windows by name, of which the first is the main one.

    notes: what was done, in words. talks: conversations that stand in no training window and in no
    held-out one; `search` chooses sizes by their answers. choosing: windows to choose by that are
    not held-out ones; None: the text has no split for that, and some held-out windows choose.
    """

    train: Windows
    held_out: dict[str, Windows]
    notes: tuple[str, ...]
    talks: tuple[Row, ...] = ()
    choosing: Windows | None = None


def calibration(data: Windows, count: int, seed: int, use: int = 1) -> list[mx.array]:
    """Up to `count` windows (1, T) of the training text, the same ones in every command.

    Another `use` gets others.
    """
    return [mx.array(data.tokens[i][None]) for i in calibration_indices(data, count, seed, use)]


def calibration_indices(data: Windows, count: int, seed: int, use: int = 1) -> np.ndarray:
    """Indices of the windows that `calibration` gives, each kind of text in its share."""
    return draws.drawn_windows(data, count, (seed, use, 1))


def has_conversations(data: str, tokens: int = 0) -> bool:
    """Whether the training rows of --data are conversations, some of them. tokens: as in `load`."""
    return any("text" not in row for row in load(data, tokens).train)


def takes_conversations(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template that takes a question and its answer."""
    try:
        token_windows.tokenize([TALK], tokenizer)
    except MisError:
        return False
    return True


def _written(tokenizer: Any) -> list[Row]:
    """The default teacher's texts; without a chat template its answers are plain text, too."""
    rows = list(read(WRITTEN).rows)
    if not takes_conversations(tokenizer):
        rows = [{"text": row.get("text") or "\n".join(row.values())} for row in rows]
    return rows


@dataclass(frozen=True)
class _Cutter:
    """Cuts rows into windows of `length` tokens."""

    tokenizer: Any
    length: int

    @cached_property
    def start(self) -> list[int]:
        """The tokens before every window."""
        return token_windows.start_tokens(self.tokenizer)

    def text(self, rows: Sequence[Row]) -> Windows:
        """Windows of rows one behind the other, cut wherever they are full."""
        tokenized = token_windows.tokenize(rows, self.tokenizer)
        return token_windows.windows(tokenized, self.length, self.start)

    def conversations(self, rows: Sequence[Row]) -> Windows:
        """Windows that begin where a conversation begins."""
        tokenized = token_windows.tokenize(rows, self.tokenizer)
        return token_windows.aligned(tokenized, self.length, self.start)

    def held_out(self, rows: Sequence[Row], train: Windows) -> tuple[Windows, int]:
        """(windows of rows, less those that overlap training; how many these were).

        Held-out text that was trained on would measure what the model remembers. A question or a
        template that many conversations share does not count, only a run that is mostly text or
        answer. MisError where none are left.
        """
        marked = list(token_windows.marked(rows, self.tokenizer))
        windows = token_windows.windows([ids for ids, _ in marked], self.length, self.start)
        # Windows of marks in the same places, 1 where a token is text or an answer.
        own = token_windows.windows([marks for _, marks in marked], self.length, self.start)
        return without_overlap(windows, train, own=own.tokens == 1)


@dataclass
class _Mixture:
    """Kinds of training text: {kind: its windows} and {kind: its share in every draw}.

    Both are in the same order. talks: conversations that are not trained on.
    """

    parts: dict[str, Windows]
    shares: dict[str, float]
    talks: tuple[Row, ...] = ()

    def add_conversations(self, file: Path, cut: _Cutter) -> None:
        """Train on those of a file, all but a tenth, by hash. Their share is still to be set."""
        train, held_out = _split_by_hash(read(file).rows)
        self.parts[CONVERSATIONS] = cut.conversations(train)
        self.talks = _answered(held_out)

    def set_conversations_share(self, share: float) -> None:
        """Give conversations this share of every draw; the others keep theirs among each other."""
        others = sum(self.shares.values()) - self.shares.get(CONVERSATIONS, 0)
        self.shares[CONVERSATIONS] = others * share / max(1e-9, 1 - share)


def _answered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Conversations whose answers are words; those with tools are learned from alone."""
    return tuple(row for row in rows if "text" not in row and not row.get("tools"))


def _taken(texts: Texts, tokenizer: Any) -> Texts:
    """The texts without conversations that a chat template would strip of their tools."""
    splits = {name: getattr(texts, name) for name in SPLITS}
    taken = {}
    for name, rows in splits.items():
        taken[name] = [row for row in rows if not row.get("tools")]
    count = sum(len(rows) - len(taken[name]) for name, rows in splits.items())
    if not count or chat_template.knows_tools(tokenizer):
        return texts
    for name in ("train", "test"):
        if not taken[name]:
            raise MisError(
                f"all {len(splits[name])} rows of {name} have tools, but this model's chat "
                f"template knows none: add other text, or take a model that calls tools"
            )
    note = f"{count} conversations with tools are left out: the chat template knows none"
    return Texts(**taken, notes=[*texts.notes, note])


def _own_parts(rows: Sequence[Row], cut: _Cutter) -> list[Windows]:
    """Windows of the text rows and of the conversations of --data, as far as there are any."""
    text = [row for row in rows if "text" in row]
    conversations = [row for row in rows if "text" not in row]
    parts = []
    if text:
        parts.append(cut.text(text))
    if conversations:
        parts.append(cut.conversations(conversations))
    return parts


def _own_mixture(
    texts: Texts,
    parts: Sequence[Windows],
    answers: Path | None,
    cut: _Cutter,
) -> _Mixture:
    """The text of --data, each kind by its size, and the conversations of `answers`."""
    sizes = [float(len(part.tokens)) for part in parts]
    mixture = _Mixture({}, {}, _answered(texts.valid))
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True), 1):
        mixture.parts[f"--data {number}"] = part
        mixture.shares[f"--data {number}"] = size / sum(sizes)
    if answers is not None and takes_conversations(cut.tokenizer):
        mixture.add_conversations(answers, cut)
        mixture.set_conversations_share(SHARES[CONVERSATIONS])
    return mixture


def _built_in_mixture(
    manual: Windows,
    polish: Sequence[Row],
    answers: Path | None,
    cut: _Cutter,
) -> _Mixture:
    """The built-in text. answers: those of another teacher than ours."""
    parts = {
        "Python documentation": manual,
        "Polish": cut.text(polish),
        "written by a model": cut.text(_written(cut.tokenizer)),
    }
    # A model without a chat template cannot be asked: it learns from text alone.
    if not takes_conversations(cut.tokenizer):
        return _Mixture(parts, dict(TEXT_SHARES))
    mixture = _Mixture(parts, dict(SHARES))
    mixture.add_conversations(answers or ANSWERS, cut)
    return mixture


def prepare(source: Source | str | None, tokenizer: Any, length: int) -> Data:
    """Windows of `length` tokens, and held-out ones, less those that overlap training.

    source: text alone stands for that as --data. data None: the built-in text, in SHARES: Python's
    manual, Polish Miś texts (whose splits share sentence templates by design: there overlap stays),
    what a model wrote, and, for a tokenizer with a chat template, conversations in which the
    default teacher answers, or those in the file `answers`. With other `data` there are
    conversations only where `answers` names them.
    """
    if not isinstance(source, Source):
        source = Source(source)
    data = source.data
    texts = _taken(load(data, source.tokens), tokenizer)
    cut = _Cutter(tokenizer, length)
    own_parts = _own_parts(texts.train, cut)
    own_train = token_windows.concatenated(own_parts)
    test, removed = cut.held_out(texts.test, own_train)
    counts = (
        f"{len(own_train.tokens)} training windows of {length} tokens, {len(test.tokens)} held out"
    )
    if removed:
        counts += f"; {removed} more shared 32 tokens in a row with training and were removed"
    notes = [*texts.notes, counts]
    held_out = {"held-out": test}
    choosing = None
    if data is None:
        polish = load(MIS)
        held_out = {"English": test, "Polish": cut.text(polish.test)}
        mixture = _built_in_mixture(own_train, polish.train, source.answers, cut)
        notes += polish.notes
    else:
        choosing = _choosing(texts.valid, own_train, cut)
        mixture = _own_mixture(texts, own_parts, source.answers, cut)
    train = _mixed(mixture, source, own_train)
    if train.shares:
        shares = zip(mixture.parts, train.shares, strict=True)
        listed = ", ".join(f"{share:.0%} {kind}" for kind, share in shares)
        notes.append(f"training windows are {listed}")
    sized = {name: _sized(windows, tokenizer) for name, windows in held_out.items()}
    return Data(train, sized, tuple(notes), mixture.talks, choosing=choosing)


def _sized(windows: Windows, tokenizer: Any) -> Windows:
    """With bytes: a loss per byte can be compared between tokenizers, one per token cannot."""
    return replace(windows, text_bytes=token_windows.text_bytes(windows, tokenizer))


def _choosing(valid: Sequence[Row], train: Windows, cut: _Cutter) -> Windows | None:
    """Windows of `valid` to choose sizes by, less those that overlap training.

    None where there are fewer than LEAST_CHOOSING.
    """
    try:
        windows, _ = cut.held_out(valid, train)
    except MisError:  # less than a window, or nothing but training text
        return None
    if len(windows.tokens) < LEAST_CHOOSING:
        return None
    return _sized(windows, cut.tokenizer)


def _mixed(mixture: _Mixture, source: Source, own_train: Windows) -> Windows:
    """The windows of all kinds, after the source's share of conversations is set."""
    if CONVERSATIONS in mixture.parts and source.share is not None:
        mixture.set_conversations_share(source.share)
        if source.share == 0:
            del mixture.parts[CONVERSATIONS], mixture.shares[CONVERSATIONS]
            mixture.talks = ()
            if source.data is None:
                mixture.shares = dict(TEXT_SHARES)
    # Windows of one kind stay without shares: `draws` permutes them.
    if len(mixture.parts) == 1:
        return own_train
    return token_windows.mixed_kinds(list(mixture.parts.values()), list(mixture.shares.values()))
