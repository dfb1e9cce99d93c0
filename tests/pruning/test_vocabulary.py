"""Fewer tokens: the teacher as a model of fewer rows, and every stage and command after that."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx import prune, report
from mis_mlx.compute import precision
from mis_mlx.data import preparation, token_windows
from mis_mlx.judge import comparison, other_languages
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.opening.trimmed_tokenizer import Vocabulary
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.stream import Stream
from mis_mlx.pruning import vocabulary
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import (
    SMALL,
    Done,
    last_line,
    mostly_thorough,
    near,
    sentence,
    weights,
)

ROWS = 1024
KEPT = 512


def make(folder: Path, **changes: Any) -> Checkpoint:
    """The tiny llama with 1,024 tokens."""
    tiny.make(folder, vocab_size=ROWS, **changes)
    tiny.write_tokenizer(folder, ROWS)
    return load.open_checkpoint(folder)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The teacher of this module."""
    return make(tmp_path_factory.mktemp("teacher") / "big")


@pytest.fixture(scope="module")
def small(big: Checkpoint, text_folder: Path) -> tuple[object, ...]:
    """Flags of a `distill` of seconds that halves the vocabulary."""
    few = ("--vocab", "0.5x", "--iters", 6, "--save-every", 2)
    return ("--teacher", big.path, "--data", text_folder, *SMALL, *few)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    small: tuple[object, ...],
    command: Callable[..., Done],
) -> tuple[Path, Done]:
    """(run folder, process) of one undisturbed run that leaves what it made on the way."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = command("distill", *small, "--keep-steps", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def windows(model: Checkpoint, text_folder: Path) -> token_windows.Windows:
    """The training text in a model's tokens."""
    return preparation.prepare(str(text_folder), load.tokenizer(model.path), 32).train


def trimmed(
    teacher: Checkpoint, text_folder: Path, out: Path, rows: int = KEPT
) -> tuple[Checkpoint, list[int]]:
    """The teacher of the `rows` that the training text and the teacher itself choose, and which
    these are.
    """
    kept = vocabulary.chosen(
        teacher, rows, windows(teacher, text_folder), vocabulary.VocabularyConfig()
    )
    return vocabulary.write(teacher, kept, out), kept


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        *((asked, KEPT) for asked in ("0.5x", ".5x", "512", "257", " 0.4x ")),
        *((asked, ROWS) for asked in (None, "1024", "1x", "0.9x", "800")),
    ],
)
def test_sizes_are_multiples_of_256(big: Checkpoint, asked: str | None, rows: int) -> None:
    """A share or a number, rounded up; what rounds up to all rows is no cut."""
    assert vocabulary.size(asked, big.path, ROWS) == rows


@pytest.mark.parametrize("asked", ["200", "0", "1025", "1.5x", "half", "-3", "0.5", "nan"])
def test_a_size_that_cannot_be(big: Checkpoint, asked: str) -> None:
    """One sentence, with both numbers."""
    with pytest.raises(MisError, match=f"--vocab {asked} ") as caught:
        vocabulary.size(asked, big.path, ROWS)
    assert ("257" if asked == "200" else "1,024") in str(caught.value)


KINDS = (
    "llama",
    "untied",
    "packed",
    "granite",
    "phi3",
    "gemma3_text",
    "gemma4_text",
    "lfm2",
)


@pytest.mark.parametrize("kind", mostly_thorough(KINDS, "llama", "untied", "packed", "gemma3_text"))
def test_logits_of_the_rows_that_stay_are_the_teachers(
    tmp_path: Path, text_folder: Path, kind: str
) -> None:
    """On a text that uses no other tokens: the same ids but for their numbers, the same logits; in
    memory and streamed.
    """
    teacher = make(tmp_path / "teacher", **{**tiny.KINDS, **tiny.FAMILIES, "packed": {}}[kind])
    if kind == "packed":
        teacher = tiny.packed(teacher, tmp_path / "packed")
    text = windows(teacher, text_folder).tokens
    tokens = Vocabulary(teacher.path)
    needed = tokens.needed(teacher.config)
    used = len(needed.union(*map(tokens.parts, np.unique(text).tolist())))
    assert used < ROWS - 64
    kept = tokens.chosen(needed, np.bincount(text.reshape(-1), minlength=ROWS), used)
    seen = vocabulary.write(teacher, kept, tmp_path / "rows")
    assert seen.config["vocab_size"] == used == len(load.tokenizer(seen.path).get_vocab())
    mine = windows(seen, text_folder).tokens
    assert (np.array(kept)[mine] == text).all()
    dtype = precision.dtype_of(teacher)
    all_of = []
    for model, tokens in ((teacher, text), (seen, mine)):
        stream = Stream(model, dtype)
        batch = mx.array(tokens[:3])
        logits = load.resident_model(model, dtype)(batch).astype(mx.float32)
        again = load.logits(stream.head(), stream.forward([batch])[0]).astype(mx.float32)
        assert mx.allclose(logits, again, atol=near(1e-5, 0.05)).item()
        all_of.append(logits)
    whole, less = all_of
    assert mx.abs(whole[..., mx.array(kept)] - less).max().item() < near(1e-5, 0.05)


def test_the_plan_counts_what_is_there(big: Checkpoint, text_folder: Path, tmp_path: Path) -> None:
    """Planned before the text is read: the sizes are those of the teacher that is written then."""
    seen, _ = trimmed(big, text_folder, tmp_path / "rows")
    planned = model_of(vocabulary.first_rows(big, KEPT), dtype=precision.dtype_of(big))
    there = model_of(seen)
    assert replace(planned, config={}) == replace(there, config={})
    assert vocabulary.first_rows(big, ROWS) == big


def pruned(model: Checkpoint, text: Path, out: Path, **given: Any) -> dict[str, Any]:
    """What `prune` says of a model of which only tokens are cut."""
    brief: dict[str, Any] = {"num_samples": 2, "max_seq_length": 32, "dtype": "float32"}
    paths = {"model": str(model.path), "data": str(text), "mlx_path": str(out)}
    return prune.run(prune.Settings(**paths, **brief, scenario="none", **given))


def test_full_size_is_the_identity(tmp_path: Path, big: Checkpoint, text_folder: Path) -> None:
    """`prune --scenario none --vocab 1x`: the same bytes in every file."""
    pruned(big, text_folder, tmp_path / "same", vocab="1x")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (big.path / name).read_bytes()
    assert not (tmp_path / "same" / vocabulary.ROWS).exists()


@pytest.mark.thorough
def test_prune_alone(tmp_path: Path, big: Checkpoint, text_folder: Path) -> None:
    """The kept rows of the teacher, byte for byte, and which they are. More text chooses others."""
    result = pruned(big, text_folder, tmp_path / "p", vocab="500")
    kept = vocabulary.rows_of(tmp_path / "p")
    assert kept is not None
    table = load.dense(big, "model.embed_tokens.weight")[mx.array(kept)]
    own = load.dense(load.open_checkpoint(tmp_path / "p"), "model.embed_tokens.weight")
    assert mx.array_equal(table, own)
    assert result["params_before"] - result["params"] == (ROWS - KEPT) * 64
    (tmp_path / "more").mkdir()
    rows = [json.dumps({"text": text}) for text in ("Zażółć gęślą jaźń. " * 500, "Ćma.")]
    (tmp_path / "more" / "train.jsonl").write_text("\n".join(rows))
    more = {"vocab": "500", "vocab_text": str(tmp_path / "more")}
    pruned(big, text_folder, tmp_path / "q", **more)
    assert vocabulary.rows_of(tmp_path / "q") != kept


def test_bytes_and_the_same_text_in_other_tokens(
    big: Checkpoint, text_folder: Path, tmp_path: Path
) -> None:
    """Windows count the bytes of what they predict; read again with all tokens they are the same
    text, special tokens included, in fewer tokens; half of a letter at an end is left out.
    """
    seen, _ = trimmed(big, text_folder, tmp_path / "rows")
    small = load.tokenizer(seen.path)
    whole = load.tokenizer(big.path)
    text = "zażółć <|endoftext|> the statement\n"
    end = small.eos_token_id
    ids = [end, *small.encode(text, split_special_tokens=True), end, *small.encode("语 with")[1:]]
    loss_mask = np.array([[1.0] * (len(ids) - 1) + [0.0]], np.float32)
    one = token_windows.Windows(np.array([ids], np.int32), loss_mask)
    half = len("语".encode()) - 1
    assert token_windows.text_bytes(one, small).tolist() == [
        len(text.encode()) + half + len(" with")
    ]
    again = token_windows.retokenized(one, small, whole)
    own = [end, *whole.encode(text, split_special_tokens=True), end, *whole.encode(" with")]
    assert again.tokens.tolist() == [own]
    assert len(own) < len(ids)
    assert again.loss_mask.tolist() == [[1.0] * (len(own) - 1) + [0.0]]
    assert again.text_bytes is not None
    assert again.text_bytes.tolist() == [len(text.encode()) + len(" with")]


def test_bits_per_byte_by_pencil() -> None:
    """Nats of all windows over bytes of all windows, whatever a window's share; a constant ratio
    has no spread.
    """
    loss_mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], np.float32)
    held_out = token_windows.Windows(np.zeros((2, 4), np.int32), loss_mask, np.array([4, 6]))
    nll = np.array([2.0, 3.0]) * math.log(2)
    rows = {r.metric: r for r in comparison.rows_of({("m", "nll"): nll}, held_out)}
    assert rows["bpb"].value == pytest.approx((2 * 2 + 3 * 3) / 10)
    assert rows["tpb"].value == pytest.approx(0.5)
    many = held_out.pick(np.tile([0, 1], 6))
    even = comparison.rows_of({("m", "nll"): nll[:1].repeat(12)}, many)
    bits = next(r for r in even if r.metric == "bpb")
    assert bits.low == bits.high == pytest.approx(bits.value) == pytest.approx(1.0)


def test_distill_end_to_end(
    finished: tuple[Path, Done], big: Checkpoint, text_folder: Path
) -> None:
    """Every model has half of the rows and says which; what is told of the teacher is in bits a
    byte of its own tokens, and nats a token are nowhere.
    """
    out, done = finished
    result = last_line(done)
    kept = vocabulary.rows_of(out / "pruned")
    assert kept is not None and len(kept) == KEPT
    for name in ("pruned", "distilled", "model"):
        model, tokenizer = load.mlx_lm("utils").load(str(out / name))
        assert model(mx.array([tokenizer.encode("for x in y")])).shape[-1] == KEPT
        assert vocabulary.rows_of(out / name) == kept
    assert result["nll_teacher"] is None is result["nll_student"]
    data = preparation.prepare(str(text_folder), tokenizer, 32)
    chosen = comparison.spread_windows(data.held_out["held-out"], 3)
    own = load.tokenizer(big.path)
    model = load.resident_model(big, mx.float32)
    nats = 0.0
    nbytes = 0
    for window in chosen.tokens:
        text = tokenizer.decode(window.tolist()).strip("\ufffd")
        ids = mx.array([own.encode(text)])
        nats += nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="sum").item()
        nbytes += len(text.encode()) - len(own.decode(ids[0, :1].tolist()).encode())
    assert result["bits_per_byte_teacher"] == pytest.approx(
        nats / nbytes / math.log(2), rel=near(1e-4, 0.02)
    )
    report.run(report.Settings(str(out), str(out.parent / "page.html")))
    page = (out.parent / "page.html").read_text("utf-8")
    assert f"{result['bits_per_byte_distilled']:.3f} bits" in " ".join(page.split())


def test_what_other_languages_lose(finished: tuple[Path, Done], big: Checkpoint) -> None:
    """The same texts, every token after the end token, by models that are whole in memory."""
    out, done = finished
    found = last_line(done)["languages"]
    assert found.keys() == other_languages.texts().keys()
    for language, text in other_languages.texts().items():
        bits = []
        for folder in (big.path, out / "model"):
            tokenizer = load.tokenizer(folder)
            model = load.resident_model(load.open_checkpoint(folder), mx.float32)
            ids = mx.array([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
            nats = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="sum")
            bits.append(nats.item() / math.log(2) / len(text.encode()))
        assert found[language] == pytest.approx(bits[1] - bits[0], abs=near(1e-3, 0.05))
        assert abs(found[language]) > 0.01


def test_nothing_but_tokens_is_cut(
    tmp_path: Path, small: tuple[object, ...], command: Callable[..., Done]
) -> None:
    """Such a student is its teacher, so nobody repairs or trains it: weights as they were, then
    rounded and tuned; gone on with, the same again.
    """
    run = tmp_path / "run"
    few = ("--scenario", "none", "--eval-windows", 1, "--q-iters", 1, "--keep-steps")
    done = command("distill", *small, *few, "--out", run)
    assert done.returncode == 0, done.stderr
    records = run_folder.records(run / run_folder.PHASES)
    phases = {record["phase"] for record in records if "seconds" in record}
    assert phases == {"vocabulary", "quantize", "logit store", "distil scales", "measure"}
    result = last_line(done)
    kinds = {name.removeprefix("bytes_") for name in result if name.startswith("bytes_")}
    assert kinds == {"teacher", "trimmed", "4-bit"}
    assert result["mode"] == "none"
    assert result["kl_pruned"] is result["kl_student"] is result["gap_closed"] is None
    made = weights(run)
    (run / "result.json").unlink()
    for name in ("model", "rounded", "tune-steps"):
        shutil.rmtree(run / name)
    assert command("distill", "--resume", "--out", run).returncode == 0
    assert weights(run) == made


@pytest.mark.thorough
def test_a_student_made_earlier(
    tmp_path: Path,
    finished: tuple[Path, Done],
    small: tuple[object, ...],
    command: Callable[..., Done],
) -> None:
    """`--student` brings its rows along: the same weights. One whose rows are not this teacher's,
    or that does not say which it has, is refused.
    """
    flags = [f for f in small if f not in ("--vocab", "0.5x")]
    given = ("--keep-steps", "--student", finished[0] / "pruned", "--out", tmp_path / "run")
    done = command("distill", *flags, *given)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(finished[0])
    stranger = shutil.copytree(finished[0] / "pruned", tmp_path / "stranger")
    named = json.loads((stranger / vocabulary.ROWS).read_text())
    last = named["rows"][-1]
    named["rows"][-1] = ROWS - 1 if last < ROWS - 1 else last - 1
    for content in (named, {}):
        (stranger / vocabulary.ROWS).write_text(json.dumps(content))
        refused = command("distill", *flags, "--student", stranger, "--out", tmp_path / "other")
        assert "stranger" in sentence(refused)


@pytest.mark.thorough
def test_commands_on_a_trimmed_student(
    tmp_path: Path,
    finished: tuple[Path, Done],
    big: Checkpoint,
    text_folder: Path,
    command: Callable[..., Done],
) -> None:
    """evaluate and quantize take the whole teacher beside it; generate takes no such draft."""
    student = finished[0] / "distilled"
    common = ("--data", text_folder, "--max-seq-length", 32)
    both = ("--teacher", big.path, "--students", student, finished[0] / "model", *common)
    done = command("evaluate", *both, "--eval-windows", 3)
    assert done.returncode == 0, done.stderr
    said = last_line(done)["held-out"]
    result = last_line(finished[1])
    for key, name in (("teacher", "teacher"), ("distilled", "distilled"), ("model", "4-bit")):
        wanted = result[f"bits_per_byte_{name}"]
        assert said[f"bpb_{key}"] == pytest.approx(wanted, rel=near(1e-6, 1e-3))
    flags = ("--num-samples", 2, "--q-iters", 2, "--mlx-path", tmp_path / "q")
    done = command("quantize", "--model", student, "--teacher", big.path, *common, *flags)
    assert done.returncode == 0, done.stderr
    assert vocabulary.rows_of(tmp_path / "q") == vocabulary.rows_of(student)
    sentence(command("generate", "--model", big.path, "--draft-model", student))


def test_gguf_keeps_the_parents_pre_tokenizer(
    tmp_path: Path, text_folder: Path, command: Callable[..., Done]
) -> None:
    """llama.cpp knows a pre-tokenizer by ids, which have changed; gguf-py reads tokens, merges and
    special ids.
    """
    from gguf import GGUFReader

    teacher = make(tmp_path / "teacher", bos_token_id=0, eos_token_id=0)
    pruned(teacher, text_folder, tmp_path / "p", vocab="0.5x")
    named = json.loads((tmp_path / "p" / vocabulary.ROWS).read_text())
    assert named["pre_tokenizer"] == "gpt-2"
    (tmp_path / "p" / vocabulary.ROWS).write_text(json.dumps({**named, "pre_tokenizer": "parents"}))
    done = command("export", "--model", tmp_path / "p", "--format", "gguf", "--out", tmp_path / "g")
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(next((tmp_path / "g").glob("*.gguf")))
    found = {
        name: reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("pre", "eos_token_id", "tokens", "merges")
    }
    spec = json.loads((tmp_path / "p" / "tokenizer.json").read_text())["model"]
    assert (found["pre"], found["eos_token_id"]) == ("parents", 0)
    assert {text: i for i, text in enumerate(found["tokens"])} == spec["vocab"]
    assert [m.split(" ") for m in found["merges"]] == spec["merges"]


LARGE = {"num_hidden_layers": 1}  # half of the tokens are nearly a third of this model


SMALL_SHARE = {"intermediate_size": 4096}


MOSTLY = {"num_hidden_layers": 1, "intermediate_size": 64}  # 0.79 of it


@pytest.mark.parametrize(
    ("changes", "asked", "made"),
    [
        (LARGE, (None, None), ("half-vocab", "0.5x")),
        (SMALL_SHARE, (None, None), ("half-ffn", None)),
        (SMALL_SHARE, (None, "512"), ("half-vocab", "512")),
        (LARGE, (None, "1x"), ("half-ffn", "1x")),
        (SMALL_SHARE, ("redyk", None), ("half-vocab", "0.5x")),
        (LARGE, ("goral", None), ("balanced", None)),
        (MOSTLY, (None, None), ("none", "0.5x")),
        (MOSTLY, (None, "768"), ("half-vocab", "768")),
        (MOSTLY, ("gazda", None), ("half-ffn", None)),
    ],
)
def test_what_is_cut_by_default(
    big: Checkpoint, changes: dict[str, int], asked: tuple[Any, Any], made: tuple[str, str | None]
) -> None:
    """Half of the tokens where they are an eighth of the model or more, and nothing else where that
    is nearly a third of it; what is given counts.
    """
    found = vocabulary.defaults(*asked, {**big.config, **changes}, big.path)
    assert found == dict(zip(("scenario", "vocab"), made, strict=True))


def test_the_teacher_knows_words_that_did_not_come_up(
    monkeypatch: pytest.MonkeyPatch, big: Checkpoint, text_folder: Path
) -> None:
    """What it expects are its probabilities, summed, by parts of the head for some positions at a
    time; of tokens that no window has, those it expects most are kept.
    """
    train = windows(big, text_folder).pick(slice(0, 3))
    model = load.resident_model(big, precision.dtype_of(big))
    wanted = mx.softmax(model(mx.array(train.tokens)).astype(mx.float32), axis=-1).sum(axis=(0, 1))
    shape = shape_of(big.config)
    assert shape.vocab % 100
    monkeypatch.setattr(stream, "HEAD_PART", 100 * shape.hidden)
    monkeypatch.setattr(vocabulary, "VOCABULARY_LOGITS", 7 * shape.vocab)
    sums = vocabulary.expected(big, train)
    assert np.allclose(sums, np.array(wanted), rtol=near(1e-4, 0.05))
    kept = vocabulary.chosen(big, KEPT, train, vocabulary.VocabularyConfig())
    unseen = np.setdiff1d(np.arange(ROWS), train.tokens)
    inside = np.isin(unseen, kept)
    assert inside.any()
    assert sums[unseen[inside]].mean() > sums[unseen[~inside]].mean()


def test_words_of_a_language(
    big: Checkpoint, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of its commonest words stay. A language without a list is refused, as all are
    without the package, before any work.
    """
    pytest.importorskip("wordfreq")
    train = windows(big, text_folder)
    polish = vocabulary.VocabularyConfig(languages=("pl",))
    alone, more = (
        set(vocabulary.chosen(big, KEPT, train, how))
        for how in (vocabulary.VocabularyConfig(), polish)
    )
    listed = vocabulary.words(("pl",))
    tokens = set[int]()
    for word in sorted(listed, key=lambda word: -listed[word])[:50]:
        tokens |= set(load.tokenizer(big.path).encode(f" {word}", add_special_tokens=False))
    assert len(tokens & more) == len(tokens) > len(tokens & alone)
    with pytest.raises(MisError, match="xx"):
        vocabulary.rows_left(big, vocabulary.VocabularyConfig(languages=("pl", "xx")))
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    vocabulary.words.cache_clear()
    with pytest.raises(MisError, match="pip install"):
        vocabulary.rows_left(big, vocabulary.VocabularyConfig(languages=("de",)))


def test_tokens_that_cannot_be_fewer_stay(big: Checkpoint, tmp_path: Path) -> None:
    """Those of a folder without a tokenizer.json; of a model without a folder they can."""
    config = {**big.config, **LARGE}
    assert vocabulary.defaults(None, None, config, tmp_path)["vocab"] is None
    assert vocabulary.defaults(None, None, config, None)["vocab"] == "0.5x"
