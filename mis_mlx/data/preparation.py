"""Text from where it is, in three splits; token windows of it: train, and held-out sets that share
nothing with it.

From folders in mlx-lm's format, the hub, or built in: Python's manual in English (`pydoc_data`),
the Polish Miś texts (benchmarks/polish_text), what the default teacher wrote. Every row is judged
first; notes say what was dropped.
"""

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.data import draws, token_windows
from mis_mlx.data.rows import Reading, Row, collect, read, split_off
from mis_mlx.storage import files, hub
from mis_mlx.types import MisError

MIS = "mis"  # `--data mis`: the Polish texts; a folder of that name is reached as ./mis
TEACHER = "teacher"  # `--data teacher` of distill, which has the teacher write first
MIS_FOLDER = Path(__file__).parent / "polish" / MIS
SPLITS = ("train", "valid", "test")
WRITTEN = Path(__file__).parent / "written" / "train.jsonl"  # ABOUT says by whom
# of the default teacher, to data/prompts
ANSWERS = Path(__file__).parent / "written" / "answers.jsonl"
CONVERSATIONS = "conversations"
# Of every draw of the built-in training text, without conversations (benchmarks/teacher_text.py)
# and with them, which trials on one seed chose: more of them costs the manual, less of them answers
# (benchmarks/answers.py compares).
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
    """Which text a run learns from. data: as `load` takes it. answers: a file of conversations that
    stands beside it. share: of conversations in every draw; None: the usual one, where there are
    any.
    """

    data: str | None = None
    answers: Path | None = None
    share: float | None = None


class Texts(NamedTuple):
    """Rows per split, and sentences on where all this came from."""

    train: Sequence[Row]
    valid: Sequence[Row]
    test: Sequence[Row]
    notes: Sequence[str]


def load(data: str | None = None) -> Texts:
    """The rows of `data`: None = the English text built in, "mis" = the Polish one, a folder, or a
    hub id.
    """
    if data in (None, MIS):
        splits = (
            _manual()
            if data is None
            else {name: read(MIS_FOLDER / f"{name}.jsonl").rows for name in SPLITS}
        )
        counts = (f"{len(splits[name])} {name}" for name in SPLITS)
        version = ".".join(map(str, sys.version_info[:3]))
        what = (
            f"English text: the manual of Python {version}"
            if data is None
            else "Polish text: the Miś dataset"
        )
        shared = (
            "; its splits share sentence templates, not values: a run of 32 tokens known "
            "from "
            "train is common"
        )
        note = f"built-in {what}, {', '.join(counts)} documents{shared if data == MIS else ''}"
        return Texts(**splits, notes=[note])
    if data == TEACHER:
        raise MisError(
            "--data teacher is for distill: let `synthesize` write, and give its folder here"
        )
    folder = Path(data).expanduser()
    if folder.is_dir():  # mlx-lm's: train.jsonl and perhaps valid.jsonl, test.jsonl
        if not (folder / "train.jsonl").exists():
            raise MisError(f"{folder} has no train.jsonl: put one there, one JSON object per line")
        paths = {name: folder / f"{name}.jsonl" for name in SPLITS}
        return _splits(
            {name: read(path) for name, path in paths.items() if path.exists()}, str(folder)
        )
    if folder.exists():
        raise MisError(f"{folder} is a file: --data takes the folder that holds train.jsonl")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data):
        raise MisError(
            f"there is no folder {folder}: --data takes a folder with train.jsonl, or a hub id"
        )
    return _from_hub(data)


def _manual() -> Mapping[str, Sequence[Row]]:
    """One document per help topic of Python's manual; the split depends on the topic's name
    alone.
    """
    from pydoc_data.topics import topics

    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for name in _without_repeats(topics):
        bucket = int(hashlib.sha256(f"GÓRAL-{name}".encode()).hexdigest()[:8], 16) % 100
        splits["train" if bucket < 80 else "valid" if bucket < 85 else "test"].append(
            {"text": topics[name]}
        )
    return splits


def _without_repeats(topics: Mapping[str, str]) -> list[str]:
    """Sorted names of the topics that are not mostly a part of a longer one: a quarter of the
    manual is there twice.
    """
    kept = []
    seen = set[str]()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [
            " ".join(p.split()) for p in topics[name].split("\n\n") if len(p.strip()) > 40
        ]
        if 2 * sum(len(p) for p in paragraphs if p in seen) <= sum(map(len, paragraphs)):
            kept.append(name)
        seen.update(paragraphs)
    return sorted(kept)


def _from_hub(name: str) -> Texts:
    try:
        import datasets
    except ImportError as error:
        raise MisError(
            f"'{name}' is no folder here, the hub needs datasets: pip install 'mis-mlx[data]'"
        ) from error
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the package raises dozens of kinds, all of them "could not get it"
        raise MisError(
            f"the hub did not give the dataset '{name}' ({error}): check its name"
        ) from error
    readings = {}
    for spelling, split in {
        "train": "train",
        "validation": "valid",
        "valid": "valid",
        "test": "test",
    }.items():
        if spelling in found:
            parsed = ((i, dict(row), None) for i, row in enumerate(found[spelling], 1))
            readings[split] = collect(f"{name}[{spelling}]", "row", parsed)
    if "train" not in readings:
        raise MisError(
            f"the dataset '{name}' has no split called train (it has {', '.join(found)}): choose "
            f"another"
        )
    return _splits(readings, name)


def _splits(readings: Mapping[str, Reading], source: str) -> Texts:
    """Texts out of one to three readings, the missing splits filled in and everything doubtful
    said.
    """
    for reading in readings.values():
        if not reading.rows:
            bad = f"{len(reading.problems)} bad ones" + (
                f" ({reading.problems[0]})" if reading.problems else ""
            )
            raise MisError(f"{source}: {reading.name} has 0 usable rows and {bad}: fix that file")
    notes = [note for reading in readings.values() for note in reading.notes()]
    rows = {name: list(reading.rows) for name, reading in readings.items()}
    if "valid" not in rows:
        rows["train"], rows["valid"] = split_off(
            rows["train"], [files.json_sha256(row) for row in rows["train"]]
        )
        notes.append(
            f"no valid split: {len(rows['valid'])} rows of train are held out for it, by hash"
        )
    if "test" not in rows:
        rows["test"] = rows["valid"]
        notes.append(f"no test split: the {len(rows['valid'])} rows of valid serve as test too")
    return Texts(**rows, notes=notes)


class Data(NamedTuple):
    """Windows to train on, held-out windows by name (the first is the main one), and what was done,
    in words.

    talks: conversations that stand in no training window; `search` chooses sizes by their answers.
    """

    train: token_windows.Windows
    held_out: dict[str, token_windows.Windows]
    notes: tuple[str, ...]
    talks: tuple[Row, ...] = ()


def calibration(data: token_windows.Windows, count: int, seed: int, use: int = 1) -> list[mx.array]:
    """Up to `count` windows (1, T) of the training text, the same ones in every command; another
    `use` gets others.
    """
    return [mx.array(data.tokens[i][None]) for i in drawn(data, count, seed, use)]


def drawn(data: token_windows.Windows, count: int, seed: int, use: int = 1) -> np.ndarray:
    """Which windows `calibration` gives: their indices, each kind of text in its share."""
    return draws.some(data, count, (seed, use, 1))


def has_conversations(data: str) -> bool:
    """Whether the training rows of --data are conversations, some of them."""
    return any("text" not in row for row in load(data).train)


def takes_conversations(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template that takes a question and its answer."""
    try:
        token_windows.tokenize([TALK], tokenizer)
    except MisError:
        return False
    return True


def _written(tokenizer: Any) -> list[Row]:
    """What the default teacher wrote; its answers are plain text where there is no chat template
    that takes them.
    """
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
        """What stands before every window."""
        return token_windows.start_of(self.tokenizer)

    def text(self, rows: Sequence[Row]) -> token_windows.Windows:
        """Windows of rows one behind the other, cut wherever they are full."""
        return token_windows.windows(
            token_windows.tokenize(rows, self.tokenizer), self.length, self.start
        )

    def conversations(self, rows: Sequence[Row]) -> token_windows.Windows:
        """Windows that begin where a conversation begins."""
        return token_windows.aligned(
            token_windows.tokenize(rows, self.tokenizer), self.length, self.start
        )


def _own_parts(
    rows: Sequence[Row], cut: _Cutter
) -> tuple[list[token_windows.Windows], list[float]]:
    """(windows of the text rows and of the conversations of --data, as far as there are any; the
    windows of each).
    """
    text = [row for row in rows if "text" in row]
    talks = [row for row in rows if "text" not in row]
    parts = list[token_windows.Windows]()
    if text:
        parts.append(cut.text(text))
    if talks:
        parts.append(cut.conversations(talks))
    return parts, [float(len(part.tokens)) for part in parts]


def _built_in_parts(
    manual: token_windows.Windows, polish: Sequence[Row], answers: Path | None, cut: _Cutter
) -> tuple[dict[str, token_windows.Windows], dict[str, float], tuple[Row, ...]]:
    """({kind: its windows}, {kind: its share}, conversations held out) of the built-in text.
    answers: those of another teacher than ours.
    """
    talks: tuple[Row, ...] = ()
    parts = {
        "Python documentation": manual,
        "Polish": cut.text(polish),
        "written by a model": cut.text(_written(cut.tokenizer)),
    }
    if takes_conversations(cut.tokenizer):
        train, talks = _apart(answers or ANSWERS)
        parts[CONVERSATIONS] = cut.conversations(train)
    return parts, {kind: SHARES[kind] for kind in parts}, talks


def _apart(file: Path) -> tuple[list[Row], tuple[Row, ...]]:
    """(the conversations of a file that train, a tenth of them that does not, by hash)."""
    rows = list(read(file).rows)
    train, held = split_off(rows, [files.json_sha256(row) for row in rows])
    return train, tuple(held)


def _share_beside(share: float, others: float) -> float:
    """What is `share` of itself and the others together."""
    return others * share / max(1e-9, 1 - share)


def prepare(source: Source | str | None, tokenizer: Any, length: int) -> Data:
    """Windows of `length` tokens, and held-out ones; of these, those that overlap training are
    removed.

    source: text alone stands for that as --data. data None: the built-in text, in SHARES: Python's
    manual, Polish Miś texts (whose splits share sentence templates by design: there overlap stays),
    what a model wrote, and, for a tokenizer with a chat template, conversations in which the
    default teacher answers, or those in the file `answers`. Beside another `data` conversations
    stand only where `answers` names them. What `synthesize` wrote beside the built-in text is held
    against the same held-out text.
    """
    data, answers, share = source if isinstance(source, Source) else Source(source)
    texts = load(data)
    cut = _Cutter(tokenizer, length)
    held = token_windows.marked(texts.test, tokenizer)
    test, own = (
        token_windows.windows([row[at] for row in held], length, cut.start) for at in (0, 1)
    )
    own_parts, own_sizes = _own_parts(texts.train, cut)
    own_train = token_windows.joined(own_parts)
    test, removed = token_windows.without_overlap(test, own_train, own=own.tokens == 1)
    counts = (
        f"{len(own_train.tokens)} training windows of {length} tokens, {len(test.tokens)} held out"
    )
    gone = (
        f"{removed} more held-out windows shared 32 tokens in a row with training and were removed"
    )
    notes = [*texts.notes, f"{counts}; {gone}"]
    polish = load(MIS)
    held_out = {"held-out": test}
    # A folder that `synthesize` wrote says of what --data its held-out splits are: None, the
    # built-in text.
    if data is None or hub.provenance(Path(data).expanduser()).get("data", data) is None:
        held_out = {"English": test, "Polish": cut.text(polish.test)}
    if data is None:
        parts, shares, talks = _built_in_parts(own_train, polish.train, answers, cut)
        notes += polish.notes
    else:
        parts = {f"--data {number}": part for number, part in enumerate(own_parts, 1)}
        shares = {kind: size / sum(own_sizes) for kind, size in zip(parts, own_sizes, strict=True)}
        talks = tuple(row for row in texts.test if "text" not in row)
        if answers is not None and takes_conversations(tokenizer):
            train_talks, talks = _apart(answers)
            parts[CONVERSATIONS] = cut.conversations(train_talks)
            shares[CONVERSATIONS] = _share_beside(SHARES[CONVERSATIONS], sum(shares.values()))
    if CONVERSATIONS in parts and share is not None:
        shares[CONVERSATIONS] = _share_beside(share, sum(shares.values()) - shares[CONVERSATIONS])
        if share == 0:
            del parts[CONVERSATIONS], shares[CONVERSATIONS]
            talks = ()
    if data is None and CONVERSATIONS not in parts:
        shares = dict(TEXT_SHARES)
    train = (
        own_train
        if len(parts) == 1
        else token_windows.of_kinds(list(parts.values()), list(shares.values()))
    )
    if train.shares:
        told = [f"{share:.0%} {kind}" for kind, share in zip(parts, train.shares, strict=True)]
        notes.append(f"every draw of training windows holds {', '.join(told)}")
    sized = {
        name: replace(w, text_bytes=token_windows.text_bytes(w, tokenizer))
        for name, w in held_out.items()
    }
    return Data(train, sized, tuple(notes), talks)
