"""The vocabulary as an axis: fewer rows of embedding and head, and the teacher as a model that has
only these.

That teacher is a folder of the rows that stay and their tokenizer; all else of it stays where it
is. What comes after sees an ordinary model of a smaller vocabulary. Its losses are not the
teacher's own, which reads longer tokens.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data import draws, preparation, token_windows
from mis_mlx.evaluation import comparison
from mis_mlx.gguf_export import vocab as gguf_vocabulary
from mis_mlx.hardware import memory
from mis_mlx.models import arch, distributed, load, stream
from mis_mlx.models.config import read_config, shape_of
from mis_mlx.models.families import family
from mis_mlx.models.tokenizer_check import ROWS
from mis_mlx.models.trimmed_tokenizer import Vocabulary, moved_ids
from mis_mlx.planner.recipe import VOCABULARY_LOGITS, VOCABULARY_WINDOWS
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import DISK, Files
from mis_mlx.types import Checkpoint, MisError

PAYS = 1 / 8  # of all parameters: a smaller vocabulary is left whole, since longer texts cost too
# of all parameters: where its rows that go are so many, all else stays (benchmarks/README.md)
ALONE = 0.3
MULTIPLE = 256  # rows: Metal's fast kernels and GGUF's K-quants need it
# what the names of tensors with a row a token begin with
TENSORS = (load.EMBEDDING, arch.PER_LAYER, "lm_head.")
FOLDER = "vocabulary"  # in a run, of the teacher's rows
# what a teacher expects in windows: a search asks for each vocabulary
EXPECTED = dict[tuple[Path, str], np.ndarray]()
PLAIN = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}


@dataclass(frozen=True)
class VocabularyConfig:
    """How many tokens stay, and the text that says which."""

    vocab: str | None = None
    """tokens that stay: a number, rounded up to a multiple of 256, or a share of them, such as
    0.5x; those most frequent in --data or expected there by the teacher, special ones and bytes in
    any case. Default: all
    """
    vocab_text: str | None = None
    """more text that counts for that, like --data"""
    languages: tuple[str, ...] = ()
    """languages whose commonest words count for that, such as pl de; needs pip install
    'mis-mlx[languages]'
    """


# a tokenizer.json takes a third of a second to read, and is asked for at every step of a plan
@cache
def size(asked: str | None, model: Path | None, rows: int) -> int:
    """The rows that --vocab leaves of `rows`. MisError where that is no number of them, or fewer
    than must stay of the tokenizer in the folder `model`, if there is one.
    """
    if (wanted := arch.count("--vocab", asked, rows, "tokens")) is None:
        return rows
    rounded = min(rows, -(-wanted // MULTIPLE) * MULTIPLE)
    if rounded == rows or model is None:
        return rounded
    least = len(needed(Vocabulary(model), model))
    if least > rounded:
        why = (
            f"bytes, special tokens and the chat template need {least:,} tokens, --vocab "
            f"{asked} "
            f"leaves {rounded:,}"
        )
        raise MisError(f"{model}: {why}: give {-(-least // MULTIPLE) * MULTIPLE} or more")
    return rounded


def defaults(
    name: str | None, asked: str | None, config: Mapping[str, Any], model: Path | None
) -> dict[str, Any]:
    """--scenario and --vocab, of which one or both may be left out, for a model of this config, in
    the folder `model` if there is one: none where --vocab takes nearly a third of all, or can;
    redyk where it is a cut, or can be one that pays, else gazda. redyk has its own --vocab.
    """
    s = shape_of(config)
    share = s.vocab * arch.row_params(config) / arch.params(config)
    if s.experts and name is None:
        name = "stado"
    own = {
        known: f"{ratios['vocab']}x"
        for known, ratios in arch.SCENARIOS.items()
        if "vocab" in ratios
    }
    if name is None:
        wanted = asked or (own["redyk"] if share >= PAYS else None)
        name = "gazda"
        with suppress(*() if asked else (MisError,)):  # of a tokenizer that cannot be trimmed
            gone = share * (1 - size(wanted, model, s.vocab) / s.vocab)
            alone = gone >= ALONE or (gone and family(config).per_layer)
            own["none"], name = wanted or "", "none" if alone else "redyk" if gone else "gazda"
    return {"scenario": name, "vocab": asked or own.get(name)}


def needed(tokens: Vocabulary, model: Path) -> set[int]:
    """Rows that must stay, those of what a chat template writes around messages among them."""
    rows = tokens.needed(read_config(model))
    with suppress(MisError):  # of a model without a template, or one that refuses
        for ids in token_windows.tokenize([{"messages": PLAIN}], load.tokenizer(model)):
            rows |= set[int]().union(*map(tokens.parts, ids))
    return rows


def first_rows(teacher: Checkpoint, rows: int) -> Checkpoint:
    """A teacher of the first `rows` tokens alone: as large as one of any others, for a plan; nobody
    can read it.
    """
    tensors = dict(teacher.tensors)
    for name, t in teacher.tensors.items() if rows < shape_of(teacher.config).vocab else ():
        if name.startswith(TENSORS):
            tensors[name] = replace(
                t, shape=(rows, *t.shape[1:]), nbytes=t.nbytes // t.shape[0] * rows
            )
    return replace(teacher, config=with_rows(teacher.config, rows), tensors=tensors)


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config of a model of so many rows, in each of its tables."""
    tables = {"vocab_size_per_layer_input": rows} if family(config).per_layer else {}
    return {**config, "vocab_size": rows, **tables}


def expected(teacher: Checkpoint, windows: token_windows.Windows) -> np.ndarray:
    """(V,) how often the teacher expects each of its tokens in windows: its probabilities, summed
    over all places. Streamed; logits come in chunks of positions, from parts of the head that are
    read again for each.
    """
    vocab, rows = (s := shape_of(teacher.config)).vocab, stream.HEAD_PART // s.hidden
    hidden = comparison.final_hidden(teacher, windows)
    of = stream.Stream(teacher)
    sums = np.zeros(vocab)
    step = VOCABULARY_LOGITS // vocab
    places = [states[0][i : i + step] for states in hidden for i in range(0, states.shape[1], step)]
    for at in cli.counted("window", places, len(places)):
        z = list[mx.array]()
        for _, head in of.head_parts(vocab, rows):
            z.append(load.wide_logits(head, at))
            stream.evaluate_now(z[-1])  # else every part of the head waits in memory
        whole = mx.logsumexp(mx.stack([mx.logsumexp(part, axis=-1) for part in z]), axis=0)
        sums += np.concatenate([np.array(mx.exp(part - whole[:, None]).sum(axis=0)) for part in z])
    return sums


@cache
def words(languages: tuple[str, ...]) -> dict[str, float]:
    """{word: how frequent} in the languages together; tens of thousands of each. MisError for one
    that has no list.
    """
    if not languages:
        return {}
    try:
        import wordfreq
    except ImportError:
        raise MisError(
            "--languages needs lists of words: pip install 'mis-mlx[languages]'"
        ) from None
    if unknown := [each for each in languages if each not in wordfreq.available_languages()]:
        known = ", ".join(sorted(wordfreq.available_languages()))
        raise MisError(
            f"--languages {unknown[0]}: there is no list of its words; give some of {known}"
        )
    shares: dict[str, float] = {}
    for each in languages:
        for word, share in wordfreq.get_frequency_dict(each, "small").items():
            shares[word] = shares.get(word, 0.0) + share / len(languages)
    return shares


def chosen(
    teacher: Checkpoint, rows: int, train: token_windows.Windows, how: VocabularyConfig
) -> list[int]:
    """Which `rows` of the teacher's stay: what must, then the most frequent. Half of that is
    counted in windows of its own tokens and in more text, half is what the teacher expects in some
    of the windows: it knows words that fit there and did not come up
    (benchmarks/vocabulary_choice.py). Words of languages count as much as these two.
    """
    some = train.pick(draws.some(train, VOCABULARY_WINDOWS, (0, 0, 1)))
    if (key := (teacher.path, token_windows.fingerprint(some))) not in EXPECTED:
        EXPECTED[key] = expected(teacher, some)
        memory.give_back()  # before the lists of merges
    tokenizer = load.tokenizer(teacher.path)
    vocab = shape_of(teacher.config).vocab
    counts = draws.token_counts(train, vocab)
    if how.vocab_text is not None:
        more = np.zeros(vocab)
        for ids in token_windows.tokenize(preparation.load(how.vocab_text).train, tokenizer):
            more += np.bincount(ids, minlength=vocab)
        # More text counts by its length beside that of the training text.
        counts = counts * train.tokens.size + more
    listed = np.zeros(vocab)
    for word, share in words(how.languages).items():
        np.add.at(listed, tokenizer.encode(f" {word}", add_special_tokens=False), share)
    listed += counts / counts.sum() + EXPECTED[key] / EXPECTED[key].sum()
    tokens = Vocabulary(teacher.path)
    used = np.count_nonzero(counts)
    kept = tokens.chosen(needed(tokens, teacher.path), listed, rows)
    cli.say(
        f"vocabulary: {rows:,} of {len(counts):,} rows stay; of the {used:,} tokens that the text "
        f"uses they have "
        f"{np.count_nonzero(counts[kept]):,}, {counts[kept].sum() / counts.sum():.2%} of all of it"
    )
    return kept


def write(teacher: Checkpoint, rows: Sequence[int], out: Path, files: Files) -> Checkpoint:
    """Commit the new folder `out`: these rows of the teacher's embedding and head, its tokenizer of
    these tokens, and which they are. Returned is the teacher as it is with them.
    """
    at = np.array(rows)
    new = {old: i for i, old in enumerate(rows)}
    mine = {
        n: t for n, t in first_rows(teacher, len(rows)).tensors.items() if n.startswith(TENSORS)
    }
    config = with_rows(moved_ids(teacher.config, new), len(rows))
    named = {"rows": list(rows), "pre_tokenizer": gguf_vocabulary.pre_tokenizer(teacher.path)}
    with protocol.commit_folder(
        out, files, sum(t.nbytes for t in mine.values()), "the vocabulary"
    ) as folder:
        cut = ((name, load.stored_parts(teacher, name, at)) for name in mine)
        safetensors.write_tensors(
            folder, {name: (t.dtype, t.shape) for name, t in mine.items()}, cut, files
        )
        for name, content in Vocabulary(teacher.path).files(rows):
            files.write(folder / name, content)
        for name, value in (("config.json", config), (ROWS, named)):
            files.write(folder / name, json.dumps(value).encode())
    return opened(teacher, out)


def opened(teacher: Checkpoint, folder: Path) -> Checkpoint:
    """The teacher with the rows and the tokenizer in `folder`, which `write` made."""
    return Checkpoint(folder, read_config(folder), {**teacher.tensors, **safetensors.index(folder)})


def rows_of(model: Path) -> list[int] | None:
    """Which rows of its parent's a trimmed model has, None where it is not trimmed."""
    path = model / ROWS
    if not path.is_file():
        return None
    try:
        rows: Any = json.loads(path.read_text("utf-8"))["rows"]
        if not rows or any(type(row) is not int for row in rows) or sorted(set(rows)) != rows:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise MisError(
            f"{path} does not say which rows it has: copy the tokenizer files again"
        ) from None
    return rows


def rows_read_by(student: Checkpoint, teacher: Checkpoint) -> list[int] | None:
    """Which of the teacher's rows its student has; None where it has all. MisError where the
    vocabulary is another.
    """
    rows = rows_of(student.path)
    if rows is None or rows == rows_of(teacher.path) or rows[-1] >= shape_of(teacher.config).vocab:
        comparison.same_vocabulary(teacher, student)
        return None
    return rows


@contextmanager
def shared(teacher: Checkpoint, students: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
    """The teacher with the vocabulary of its students, as long as the context is open. MisError
    where these do not share one that was made of the teacher's.
    """
    rows = rows_read_by(students[0], teacher) if students else None
    with tempfile.TemporaryDirectory(prefix="mis_mlx-") as place:
        seen = write(teacher, rows, Path(place) / FOLDER, DISK) if rows else teacher
        for student in students:
            comparison.same_vocabulary(seen, student)
        yield seen


def rows_left(teacher: Checkpoint, how: VocabularyConfig, student: str | None = None) -> int:
    """How many rows a student has that is to be made, or that is in a folder already."""
    total = shape_of(teacher.config).vocab
    words(how.languages)  # which are known, before any work
    if student is None:
        return size(how.vocab, teacher.path, total)
    return len(rows_read_by(load.open_checkpoint(student), teacher) or range(total))


def of_run(
    teacher: Checkpoint,
    student: str | None,
    rows: int,
    own: preparation.Data,
    how: VocabularyConfig,
    source: preparation.Source | str | None,
    run: Path,
    files: Files,
) -> tuple[Checkpoint, preparation.Data]:
    """The teacher with the `rows` that a run's student has, and its text in these tokens. own: the
    text in the teacher's. student: a folder, where it exists already.
    """
    out = run / FOLDER
    if rows == shape_of(teacher.config).vocab:
        return teacher, own
    if distributed.is_main() and not out.exists():
        kept = (rows_of(Path(student)) if student else None) or chosen(
            teacher, rows, own.train, how
        )
        write(teacher, kept, out, files)
    distributed.broadcast_folder(out, files)
    seen = opened(teacher, out)
    if student:
        comparison.same_vocabulary(seen, load.open_checkpoint(student))
    return seen, preparation.prepare(source, load.tokenizer(seen.path), own.train.tokens.shape[1])
