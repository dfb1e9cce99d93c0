"""The vocabulary as an axis: fewer rows of embedding and head, and a teacher that has only these.

That teacher is a folder of the rows that stay and their tokenizer; all its other weights stay where
they are. Later steps see an ordinary model of a smaller vocabulary. Its losses are not those of the
teacher itself, which reads longer tokens.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import quick_exp
from mis_mlx.data import draws, preparation, token_windows
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge import comparison
from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load, pre_tokenizers
from mis_mlx.models.opening.config import read_config
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.opening.tokenizer_check import ROWS
from mis_mlx.models.opening.trimmed_tokenizer import Vocabulary, moved_ids
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.pass_cost import forward_flops, streamed_pass
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError

VOCABULARY_WINDOWS = 16  # in which the teacher says which tokens it expects, where not all stay
VOCABULARY_LOGITS = 2**25  # of all its tokens that are held then, in float32
PAYS = 1 / 8  # of all parameters: a smaller vocabulary is left whole, since longer texts cost too
# of all parameters: where the removed rows have so many, all else stays (benchmarks/README.md)
ALONE = 0.3
MULTIPLE = 256  # rows: Metal's fast kernels and GGUF's K-quants need it
# the beginnings of the names of tensors with a row for each token
TENSORS = (load.EMBEDDING, arch.PER_LAYER, "lm_head.")
FOLDER = "vocabulary"  # in a run, of the teacher's rows
SHORTEST_CHAT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}


@dataclass(frozen=True)
class VocabularyConfig:
    """How many tokens stay, and the text that says which."""

    vocab: str | None = None
    """tokens to keep: a number, rounded up to a multiple of 256, or a share such as 0.5x; keeps
    special tokens, bytes, and the tokens that are most frequent in --data or that the teacher
    expects there. Default: as the scenario or the search says
    """
    vocab_text: str | None = None
    """more text to count tokens in, like --data"""
    languages: tuple[str, ...] = ()
    """languages whose most common words are counted too, such as pl de; needs pip install
    '.[languages]' in the checkout
    """


# a tokenizer.json takes a third of a second to read, and is asked for at every step of a plan
@cache
def size(asked: str | None, model: Path | None, rows: int) -> int:
    """The rows that --vocab leaves of `rows`.

    MisError where that is no number of them, or fewer than must stay of the tokenizer in the folder
    `model`, if there is one.
    """
    wanted = arch.count("--vocab", asked, rows, "tokens")
    if wanted is None:
        return rows
    rounded = min(rows, _round_up(wanted))
    if rounded == rows or model is None:
        return rounded
    least = len(needed(model)[1])
    if least > rounded:
        why = (
            f"bytes, special tokens and the chat template need {least:,} tokens, but "
            f"--vocab {asked} leaves {rounded:,}"
        )
        raise MisError(f"{model}: {why}: give {_round_up(least)} or more")
    return rounded


def _round_up(rows: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-rows // MULTIPLE) * MULTIPLE


def defaults(
    name: str | None, asked: str | None, config: Mapping[str, Any], model: Path | None
) -> dict[str, Any]:
    """{"scenario", "vocab"} of a model of this config, where one or both may be left out.

    none where --vocab takes nearly a third of all, or can; half-vocab where it is a cut, or can be
    one that pays, else half-ffn. half-vocab has its own --vocab. model: the folder, if there is
    one.
    """
    s = shape_of(config)
    if name is not None:
        name = scenarios.plain(name)
    elif s.experts:
        name = "fewer-experts"
    own = {
        scenario: f"{ratios['vocab']}x"
        for scenario, ratios in scenarios.RATIOS.items()
        if "vocab" in ratios
    }
    if name is None:
        share = s.vocab * arch.row_params(config) / arch.params(config)
        wanted = asked
        if not wanted and share >= PAYS:
            wanted = own["half-vocab"]
        name = "half-ffn"
        try:
            gone = share * (1 - size(wanted, model, s.vocab) / s.vocab)
        except MisError:  # of a tokenizer that cannot be trimmed
            if asked:
                raise
        else:
            own["none"] = wanted or ""
            if gone >= ALONE or (gone and family(config).side_width):
                name = "none"
            elif gone:
                name = "half-vocab"
    return {"scenario": name, "vocab": asked or own.get(name)}


def needed(model: Path) -> tuple[Vocabulary, set[int]]:
    """(a folder's tokens, the rows that must stay).

    Among them are those of the text that a chat template writes around messages.
    """
    around: list[int] = []
    # A model may have no template, or one that refuses; it is a program and can raise anything.
    with suppress(Exception):
        tokenizer = load.tokenizer(model)  # opened before the lists below are there
        (talk,) = token_windows.tokenize([{"messages": SHORTEST_CHAT}], tokenizer)
        # Before an answer there may be more, such as an empty thought.
        around = [*talk.tolist(), *token_windows.prompt_ids(SHORTEST_CHAT[:1], tokenizer)]
    tokens = Vocabulary(model)
    rows = tokens.needed(read_config(model))
    for token in around:
        rows |= tokens.parts(token)
    return tokens, rows


def first_rows(teacher: Checkpoint, rows: int) -> Checkpoint:
    """A teacher of the first `rows` tokens alone, for a plan; nobody can read it.

    It is as large as one of any others.
    """
    tensors = dict(teacher.tensors)
    if rows < shape_of(teacher.config).vocab:
        for name, t in teacher.tensors.items():
            if name.startswith(TENSORS):
                row_bytes = t.nbytes // t.shape[0]
                tensors[name] = replace(t, shape=(rows, *t.shape[1:]), nbytes=row_bytes * rows)
    return replace(teacher, config=with_rows(teacher.config, rows), tensors=tensors)


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config of a model of so many rows, in each of its tables."""
    tables = {"vocab_size_per_layer_input": rows} if family(config).side_width else {}
    return {**config, "vocab_size": rows, **tables}


def expected(teacher: Checkpoint, windows: token_windows.Windows) -> np.ndarray:
    """(V,) how often the teacher expects each of its tokens in windows.

    Its probabilities, summed over all positions. Streamed; logits come in chunks of positions, from
    parts of the head that are read again for each.
    """
    s = shape_of(teacher.config)
    rows = stream.head_rows(s.hidden, s.vocab)
    hidden = comparison.final_hidden(teacher, windows)
    source = stream.Stream(teacher)
    sums = np.zeros(s.vocab)
    chunks = []
    for states in hidden:
        step = _positions(states.shape[1], s.vocab)
        for first in range(0, states.shape[1], step):
            chunks.append(states[0][first : first + step])
    for chunk in cli.show_progress("window", chunks):
        logits = list[mx.array]()
        for _, head in source.head_parts(s.vocab, rows):
            logits.append(load.wide_logits(head, chunk))
            stream.evaluate_now(logits[-1])  # else every part of the head waits in memory
        # A softmax over parts: its denominator needs all of them. The largest logit is taken off
        # first, so that one exponential of each is enough.
        largest = mx.stack([part.max(axis=-1) for part in logits]).max(axis=0)[:, None]
        for number, part in enumerate(logits):
            logits[number] = quick_exp.exp(part - largest)
            stream.evaluate_now(logits[number])
        total = mx.stack([part.sum(axis=-1) for part in logits]).sum(axis=0)
        weights = 1 / total
        sums += np.concatenate([np.array(weights @ part) for part in logits])
    return sums


def _positions(length: int, vocab: int) -> int:
    """Positions of a window whose logits (n, V) are held at once: as VOCABULARY_LOGITS allows."""
    return min(length, VOCABULARY_LOGITS // vocab)


@dataclass(frozen=True)
class _Expectation:
    """What `expected` is asked: equal where the teacher's folder and the windows' text are."""

    path: Path
    fingerprint: str
    teacher: Checkpoint = field(compare=False)
    windows: token_windows.Windows = field(compare=False)


@cache
def _expected_once(asked: _Expectation) -> np.ndarray:
    """`expected`, computed once a process: a search asks for each vocabulary."""
    counts = expected(asked.teacher, asked.windows)
    memory.give_back()  # before the lists of merges
    return counts


@cache
def _counts_of(text: str, model: Path, vocab: int) -> np.ndarray:
    """(`vocab`,) how often each token comes in more text; tokenized once a process, as above."""
    counts = np.zeros(vocab)
    for ids, _ in token_windows.marked(preparation.load(text).train, load.tokenizer(model)):
        counts += np.bincount(ids, minlength=vocab)
    return counts


@cache
def words(languages: tuple[str, ...]) -> dict[str, float]:
    """{word: how frequent} in the languages together; tens of thousands of each.

    MisError for a language that has no list.
    """
    if not languages:
        return {}
    try:
        import wordfreq
    except ImportError:
        raise MisError(
            "--languages needs word lists: pip install '.[languages]' in the checkout"
        ) from None
    available = wordfreq.available_languages()
    for language in languages:
        if language not in available:
            raise MisError(
                f"--languages {language}: there is no word list for it; choose from "
                f"{', '.join(sorted(available))}"
            )
    shares: dict[str, float] = {}
    for language in languages:
        for word, share in wordfreq.get_frequency_dict(language, "small").items():
            shares[word] = shares.get(word, 0.0) + share / len(languages)
    return shares


def chosen(
    teacher: Checkpoint, rows: int, train: token_windows.Windows, config: VocabularyConfig
) -> list[int]:
    """Which `rows` of the teacher's stay: those that must, then the most frequent.

    Half of that is counted in windows of its own tokens and in more text, half is the teacher's
    expectation in some of the windows: it knows words that fit there and did not come up
    (vocabulary_choice.py at bd583ffb). Words of languages count as much as these two.
    """
    # What the teacher expects in a few windows: a streamed pass, kept for the next vocabulary.
    some = train.pick(draws.drawn_windows(train, VOCABULARY_WINDOWS, (0, 0, 1)))
    expectation = _Expectation(teacher.path, token_windows.fingerprint(some), teacher, some)
    expected_counts = _expected_once(expectation)
    # What the text has: counts (V,) of all its windows, and of more text by its length beside that
    # of the training text.
    tokenizer = load.tokenizer(teacher.path)
    vocab = shape_of(teacher.config).vocab
    counts = draws.token_counts(train, vocab)
    if config.vocab_text is not None:
        further = _counts_of(config.vocab_text, teacher.path, vocab)
        counts = counts * train.tokens.size + further
    listed = np.zeros(vocab)
    for word, share in words(config.languages).items():
        # A word inside a sentence has a space before it; a token may come up twice in it.
        np.add.at(listed, tokenizer.encode(f" {word}", add_special_tokens=False), share)
    # Each of the three counts by its shares of one.
    listed += counts / counts.sum() + expected_counts / expected_counts.sum()
    tokens, least = needed(teacher.path)
    kept = tokens.chosen(least, listed, rows)
    share = counts[kept].sum() / counts.sum()
    covered = "all of" if share > 0.99995 else f"{share:.2%} of"
    cli.outcome(
        f"vocabulary: {rows:,} of {len(counts):,} tokens stay; they cover {covered} the text"
    )
    return kept


def write(teacher: Checkpoint, rows: Sequence[int], out: Path) -> Checkpoint:
    """Commit the new folder `out`: these rows of the teacher's embedding and head.

    With its tokenizer of these tokens, and which they are. Returned is the teacher as it is with
    them.
    """
    numbers = np.array(rows)
    new = {old: i for i, old in enumerate(rows)}
    cut = first_rows(teacher, len(rows)).tensors
    tensors = {name: t for name, t in cut.items() if name.startswith(TENSORS)}
    config = with_rows(moved_ids(teacher.config, new), len(rows))
    rows_file = {"rows": list(rows), "pre_tokenizer": pre_tokenizers.pre_tokenizer(teacher.path)}
    nbytes = sum(t.nbytes for t in tensors.values())
    with protocol.commit_folder(out, nbytes, "the vocabulary") as folder:
        specs = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        parts = ((name, load.stored_parts(teacher, name, numbers)) for name in tensors)
        safetensors.write_tensors(folder, specs, parts)
        for name, content in Vocabulary(teacher.path).files(rows):
            DISK.write(folder / name, content)
        DISK.write(folder / "config.json", json.dumps(config).encode())
        DISK.write(folder / ROWS, json.dumps(rows_file).encode())
    return open_trimmed(teacher, out)


def open_trimmed(teacher: Checkpoint, folder: Path) -> Checkpoint:
    """The teacher with the rows and the tokenizer in `folder`, which `write` made."""
    tensors = {**teacher.tensors, **safetensors.index(folder)}
    return replace(teacher, path=folder, config=read_config(folder), tensors=tensors)


def rows_of(model: Path) -> list[int] | None:
    """Which of its parent's rows a trimmed model has, None where it is not trimmed."""
    path = model / ROWS
    if not path.is_file():
        return None
    try:
        rows: Any = json.loads(path.read_text("utf-8"))["rows"]
        numbers = all(type(row) is int for row in rows)
        if not rows or not numbers or sorted(set(rows)) != rows:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise MisError(
            f"{path} does not say which rows it has: copy the tokenizer files again"
        ) from None
    return rows


def rows_read_by(student: Checkpoint, teacher: Checkpoint) -> list[int] | None:
    """Which of the teacher's rows its student has; None where it has all.

    MisError where the vocabulary is another.
    """
    rows = rows_of(student.path)
    if rows is None or rows == rows_of(teacher.path) or rows[-1] >= shape_of(teacher.config).vocab:
        comparison.same_vocabulary(teacher, student)
        return None
    return rows


@contextmanager
def shared(teacher: Checkpoint, students: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
    """The teacher with the vocabulary of its students, as long as the context is open.

    MisError where these do not share one that was made of the teacher's.
    """
    rows = rows_read_by(students[0], teacher) if students else None
    with tempfile.TemporaryDirectory(prefix="mis_mlx-") as place:
        seen = teacher
        if rows:
            seen = write(teacher, rows, Path(place) / FOLDER)
        for student in students:
            comparison.same_vocabulary(seen, student)
        yield seen


def rows_left(teacher: Checkpoint, config: VocabularyConfig, student: str | None = None) -> int:
    """How many rows a student has that is to be made, or that is in the folder `student`."""
    total = shape_of(teacher.config).vocab
    words(config.languages)  # refuses unknown ones, before any work
    if student is None:
        return size(config.vocab, teacher.path, total)
    rows = rows_read_by(load.open_checkpoint(student), teacher)
    return len(rows) if rows else total


def of_run(
    teacher: Checkpoint,
    student: str | None,
    rows: int,
    own: preparation.Data,
    config: VocabularyConfig,
    source: preparation.Source | str | None,
    run: Path,
) -> tuple[Checkpoint, preparation.Data]:
    """The teacher with the `rows` that a run's student has, and its text in these tokens.

    own: the text in the teacher's tokens. student: a folder, where it exists already.
    """
    seen = teacher_of_run(teacher, student, rows, own.train, config=config, run=run)
    if seen is teacher:
        return teacher, own
    length = own.train.tokens.shape[1]
    return seen, preparation.prepare(source, load.tokenizer(seen.path), length)


def teacher_of_run(
    teacher: Checkpoint,
    student: str | None,
    rows: int,
    train: token_windows.Windows,
    *,
    config: VocabularyConfig,
    run: Path,
) -> Checkpoint:
    """The teacher of `of_run`; itself where the student has all rows. train: in its tokens."""
    out = run / FOLDER
    if rows == shape_of(teacher.config).vocab:
        return teacher
    if not out.exists():
        kept = rows_of(Path(student)) if student else None
        if not kept:
            kept = chosen(teacher, rows, train, config)
        write(teacher, kept, out)
        memory.give_back(cache=False)  # lists of all tokens and merges, 1,500 bytes a token
    seen = open_trimmed(teacher, out)
    if student:
        comparison.same_vocabulary(seen, load.open_checkpoint(student))
    return seen


def vocabulary_cost(t: ModelSize, length: int) -> StageCost:
    """Ask a teacher with all of its tokens which it expects.

    Final states of all windows, then logits of all tokens at some positions, with two parts of the
    head and the temporaries of one.
    """
    tokens = VOCABULARY_WINDOWS * length
    vocab = t.shape.vocab
    rows = stream.head_rows(t.shape.hidden, vocab)
    final_states = streamed_pass(
        "vocabulary", t, tokens=tokens, length=length, head=False, spool=False
    )
    positions = _positions(length, vocab)
    head = tokens * t.shape.hidden * t.item + 3 * (rows * t.head_work // vocab)
    logits = 4 * positions * (vocab + 2 * rows)
    head_reads = VOCABULARY_WINDOWS * math.ceil(length / positions)
    return replace(
        final_states,
        peak_bytes=max(final_states.peak_bytes, head + logits),
        read_bytes=final_states.read_bytes + head_reads * t.head_bytes,
        flops=forward_flops(t, tokens, length),
    )
