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

from mis_mlx import distill, prune, report
from mis_mlx.compute import precision
from mis_mlx.data import preparation, token_windows
from mis_mlx.judge import comparison, other_languages
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.opening.trimmed_tokenizer import Vocabulary
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.stream import Stream
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import (
    SMALL,
    Done,
    last_line,
    losses,
    mostly_thorough,
    near,
    sentence,
    settings_of,
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
    return (
        "--teacher",
        big.path,
        "--data",
        text_folder,
        *SMALL,
        "--vocab",
        "0.5x",
        "--iters",
        6,
        "--save-every",
        2,
    )


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
    return vocabulary.write(teacher, kept, out, DISK), kept


@pytest.mark.parametrize("asked", ["0.5x", ".5x", "512", "257", " 0.4X ".lower()])
def test_sizes_are_multiples_of_256(big: Checkpoint, asked: str) -> None:
    """A share or a number, rounded up."""
    assert vocabulary.size(asked, big.path, ROWS) == KEPT


def test_all_tokens_are_no_cut(big: Checkpoint) -> None:
    """Whatever rounds up to all rows; without --vocab as well."""
    assert {
        vocabulary.size(asked, big.path, ROWS) for asked in (None, "1024", "1x", "0.9x", "800")
    } == {ROWS}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("200", "need 257 tokens, but --vocab 200 leaves 256: give 512 or more"),
        (
            "0",
            "--vocab 0 is not a number of tokens from 1 to 1,024: give one, or a share such as "
            "0.5x",
        ),
        ("1025", "--vocab 1025 is not a number"),
        ("1.5x", "is not a number"),
        ("half", "is not a number"),
        ("-3", "is no"),
        ("0.5", "is not a number"),
        ("nan", "is not a number"),
    ],
)
def test_a_size_that_cannot_be(big: Checkpoint, asked: str, why: str) -> None:
    """One sentence, with both numbers."""
    with pytest.raises(MisError, match=why):
        vocabulary.size(asked, big.path, ROWS)


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
    """On a text that uses no other tokens: the same ids but for their numbers, the same logits, and
    so the same probabilities but for the softmax's denominator; in memory and streamed.
    """
    teacher = make(tmp_path / "teacher", **{**tiny.KINDS, **tiny.FAMILIES, "packed": {}}[kind])
    if kind == "packed":
        packed_format.write_quantized(
            teacher, tmp_path / "packed", packed_format.formats_of(teacher.config, 64), DISK
        )
        teacher = load.open_checkpoint(tmp_path / "packed")
    text = windows(teacher, text_folder).tokens
    tokens = Vocabulary(teacher.path)
    needed = tokens.needed(teacher.config)
    used = len(needed.union(*map(tokens.parts, np.unique(text).tolist())))
    assert used < ROWS - 64
    kept = tokens.chosen(needed, np.bincount(text.reshape(-1), minlength=ROWS), used)
    seen = vocabulary.write(teacher, kept, tmp_path / "rows", DISK)
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
    labels = mx.array(mine[:3, 1:, None])
    nll = mx.logsumexp(less[:, :-1], -1) - mx.take_along_axis(less[:, :-1], labels, -1)[..., 0]
    denominators = mx.logsumexp(whole[:, :-1], -1) - mx.logsumexp(less[:, :-1], -1)
    own = mx.logsumexp(whole[:, :-1], -1)
    own -= mx.take_along_axis(whole[:, :-1], mx.array(text[:3, 1:, None]), -1)[..., 0]
    assert mx.abs(own - nll - denominators).max().item() < near(1e-5, 0.05)
    assert (denominators >= 0).all().item()


def test_the_plan_counts_what_is_there(big: Checkpoint, text_folder: Path, tmp_path: Path) -> None:
    """Planned before the text is read: the sizes are those of the teacher that is written then."""
    seen, _ = trimmed(big, text_folder, tmp_path / "rows")
    planned = model_of(vocabulary.first_rows(big, KEPT), dtype=precision.dtype_of(big))
    there = model_of(seen)
    assert replace(planned, config={}) == replace(there, config={})
    assert vocabulary.first_rows(big, ROWS) == big


def test_full_size_is_the_identity(tmp_path: Path, big: Checkpoint, text_folder: Path) -> None:
    """`prune --scenario none --vocab 1x`: the same bytes in every file."""
    how = prune.Settings(
        model=str(big.path),
        data=str(text_folder),
        num_samples=2,
        max_seq_length=32,
        scenario="none",
        dtype="float32",
        vocab="1x",
        mlx_path=str(tmp_path / "same"),
    )
    prune.run(how)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (big.path / name).read_bytes()
    assert not (tmp_path / "same" / vocabulary.ROWS).exists()


@pytest.mark.thorough
def test_prune_alone(
    tmp_path: Path, big: Checkpoint, text_folder: Path, command: Callable[..., Done]
) -> None:
    """The kept rows of the teacher, byte for byte; which they are; stock mlx-lm opens it. More text
    chooses others.
    """
    flags = ("--model", big.path, "--data", text_folder, "--num-samples", 2, "--max-seq-length", 32)
    flags += ("--scenario", "none", "--dtype", "float32", "--vocab", 500)
    done = command("prune", *flags, "--mlx-path", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert "vocabulary: 512 of 1,024 tokens stay; they cover " in done.stderr
    kept = vocabulary.rows_of(tmp_path / "p")
    student = load.open_checkpoint(tmp_path / "p")
    assert kept is not None
    assert shape_of(student.config) == replace(shape_of(big.config), vocab=KEPT)
    table = load.dense(big, "model.embed_tokens.weight")[mx.array(kept)]
    assert mx.array_equal(table, load.dense(student, "model.embed_tokens.weight"))
    model, tokenizer = load.mlx_lm("utils").load(str(tmp_path / "p"))
    assert mx.isfinite(model(mx.array([tokenizer.encode("for x in y")]))).all()
    assert last_line(done)["params_before"] - last_line(done)["params"] == (ROWS - KEPT) * 64
    rows = [json.dumps({"text": "Zażółć gęślą jaźń. " * 500})]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.jsonl").write_text("\n".join([*rows, json.dumps({"text": "Ćma."})]))
    again = command(
        "prune", *flags, "--vocab-text", tmp_path / "more", "--mlx-path", tmp_path / "q"
    )
    assert again.returncode == 0, again.stderr
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
    finished: tuple[Path, Done], big: Checkpoint, text_folder: Path, tmp_path: Path
) -> None:
    """Every model has half of the rows and says which; the tables show the teacher with its own
    tokens, in bits per byte, and no nats per token beside each other.
    """
    out, done = finished
    result = last_line(done)
    kept = vocabulary.rows_of(out / "pruned")
    assert kept is not None
    assert len(kept) == KEPT
    for name in ("pruned", "distilled", "model"):
        model, tokenizer = load.mlx_lm("utils").load(str(out / name))
        assert model(mx.array([tokenizer.encode("for x in y")])).shape[-1] == KEPT
        assert vocabulary.rows_of(out / name) == kept
    assert result["nll_teacher"] is None is result["nll_student"]
    assert result["params_teacher"] > 512 * 1024
    table = (out / "table.md").read_text()
    assert "bits per byte of text" in table
    assert "nats/token |" not in table.replace("KL(teacher ‖ model), nats/token |", "")
    assert comparison.ACROSS in table
    data = preparation.prepare(str(text_folder), load.tokenizer(out / "pruned"), 32)
    chosen = comparison.spread_windows(data.held_out["held-out"], 3)
    text = [
        load.tokenizer(out / "pruned").decode(w.tolist()).strip("\ufffd") for w in chosen.tokens
    ]
    nats = 0.0
    nbytes = 0
    tokenizer = load.tokenizer(big.path)
    model = load.resident_model(big, mx.float32)
    for each in text:
        ids = mx.array([tokenizer.encode(each)])
        logits = model(ids[:, :-1])
        nats += (
            (mx.logsumexp(logits, -1) - mx.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0])
            .sum()
            .item()
        )
        nbytes += len(each.encode()) - len(tokenizer.decode(ids[0, :1].tolist()).encode())
    assert result["bits_per_byte_teacher"] == pytest.approx(
        nats / nbytes / math.log(2), rel=near(1e-4, 0.02)
    )


def test_what_other_languages_lose(finished: tuple[Path, Done], big: Checkpoint) -> None:
    """The same texts, every token after the end token, by models that are whole in memory."""
    out, done = finished
    result = last_line(done)
    before = result["languages"]
    assert len(before) == len(other_languages.texts()) == 3
    shown = ", ".join(f"{name} {lost:+.3f}" for name, lost in before.items())
    assert f"{shown} bits per byte" in (out / "table.md").read_text()
    for language, text in other_languages.texts().items():
        bits = []
        for folder in (big.path, out / "model"):
            tokenizer = load.tokenizer(folder)
            model = load.resident_model(load.open_checkpoint(folder), mx.float32)
            ids = mx.array([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
            nats = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="sum")
            bits.append(nats.item() / math.log(2) / len(text.encode()))
        lost = before[language]
        assert lost == pytest.approx(bits[1] - bits[0], abs=near(1e-3, 0.05))
        assert abs(lost) > 0.01


@pytest.mark.slow
def test_distill_a_phi(
    tmp_path: Path, small: tuple[object, ...], command: Callable[..., Done]
) -> None:
    """Joined matrices, LongRoPE and half of the tokens: stock mlx_lm opens the 4-bit student."""
    phi = make(tmp_path / "phi", **{**tiny.FAMILIES["phi3"], "num_hidden_layers": 3})
    done = command(
        "distill", *small, "--teacher", phi.path, "--iters", 2, "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = load.mlx_lm("utils").load(str(tmp_path / "run" / "model"))
    assert len(tokenizer.get_vocab()) == model.args.vocab_size == KEPT
    assert model.args.model_type == "phi3"
    assert mx.isfinite(model(mx.array([tokenizer.encode("Zażółć gęślą jaźń")]))).all().item()


def test_nothing_but_tokens_is_cut(
    tmp_path: Path, small: tuple[object, ...], command: Callable[..., Done]
) -> None:
    """Such a student is its teacher, so nobody repairs or trains it: weights as they were, then
    rounded and tuned.
    """
    done = command(
        "distill", *small, "--scenario", "none", "--keep-steps", "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "| | teacher | fewer tokens | student |" in done.stdout
    run = tmp_path / "run"
    phases = {
        record["phase"]
        for record in run_folder.records(run / run_folder.PHASES)
        if "seconds" in record
    }
    assert phases == {"vocabulary", "quantize", "logit store", "distil scales", "measure"}
    assert not (run / "distilled").exists()
    result = last_line(done)
    kinds = {name.removeprefix("bytes_") for name in result if name.startswith("bytes_")}
    assert kinds == {"teacher", "trimmed", "4-bit"}
    assert result["mode"] == "none"
    assert result["kl_pruned"] is result["kl_student"] is result["gap_closed"] is None
    made = weights(run)
    (run / "result.json").unlink()
    for name in ("model", "rounded", "tune-steps"):
        shutil.rmtree(run / name)
    again = command("distill", "--resume", "--out", run)
    assert again.returncode == 0
    assert weights(run) == made


WAYS = [("--train", "sharded"), ("--train", "blocks")]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_other_ways(
    tmp_path: Path, small: tuple[object, ...], command: Callable[..., Done], way: Any
) -> None:
    """Part by part, or all blocks; what nobody needs goes."""
    done = command("distill", *small, *way, "--q-iters", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert last_line(done)["bits_per_byte_distilled"] < last_line(done)["bits_per_byte_pruned"] + 1
    assert not (tmp_path / "run" / vocabulary.FOLDER).exists()


@pytest.mark.thorough
def test_resumed_after_each_stage(
    tmp_path: Path,
    finished: tuple[Path, Done],
    small: tuple[object, ...],
    command: Callable[..., Done],
) -> None:
    """Half done, and with the teacher's rows gone: the same weights and losses, bit for bit."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("model", "rounded", "tune-steps", "distilled", vocabulary.FOLDER):
        shutil.rmtree(run / name)
    shutil.rmtree(max((run / "steps").iterdir()))
    (run / "result.json").unlink()
    done = command("distill", "--resume", "--out", run)
    assert done.returncode == 0, done.stderr
    assert weights(run) == weights(finished[0]) and losses(run) == losses(finished[0])
    with pytest.raises(MisError, match=r"--vocab is 700, but the run has 0\.5x"):
        distill.run(replace(settings_of(distill, small, run), resume=True, vocab="700"))


@pytest.mark.thorough
def test_a_student_made_earlier(
    tmp_path: Path,
    finished: tuple[Path, Done],
    big: Checkpoint,
    small: tuple[object, ...],
    command: Callable[..., Done],
) -> None:
    """`--student` brings its rows along: the same weights. One whose rows are not this teacher's is
    refused.
    """
    flags = [f for f in small if f not in ("--vocab", "0.5x")]
    done = command(
        "distill",
        *flags,
        "--keep-steps",
        "--student",
        finished[0] / "pruned",
        "--out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(finished[0])
    stranger = shutil.copytree(finished[0] / "pruned", tmp_path / "stranger")
    rows = json.loads((stranger / vocabulary.ROWS).read_text())
    rows["rows"] = [
        *rows["rows"][:-1],
        ROWS - 1 if rows["rows"][-1] < ROWS - 1 else rows["rows"][-1] - 1,
    ]
    (stranger / vocabulary.ROWS).write_text(json.dumps(rows))
    refused = command("distill", *flags, "--student", stranger, "--out", tmp_path / "other")
    assert "has a different tokenizer from" in sentence(refused)
    (stranger / vocabulary.ROWS).write_text("{}")
    refused = command("distill", *flags, "--student", stranger, "--out", tmp_path / "third")
    assert "vocabulary.json does not say which rows it has" in sentence(refused)


@pytest.mark.thorough
def test_commands_on_a_trimmed_student(
    tmp_path: Path,
    finished: tuple[Path, Done],
    big: Checkpoint,
    text_folder: Path,
    command: Callable[..., Done],
) -> None:
    """evaluate and quantize take the whole teacher beside it; generate takes no
    such draft.
    """
    student = finished[0] / "distilled"
    common = ("--data", text_folder, "--max-seq-length", 32)
    both = ("--teacher", big.path, "--students", student, finished[0] / "model", *common)
    done = command("evaluate", *both, "--eval-windows", 3)
    assert done.returncode == 0, done.stderr
    said = last_line(done)["held-out"]
    result = last_line(finished[1])
    assert comparison.ACROSS in done.stdout
    assert "perplexity" not in done.stdout
    for key, name in (
        ("bpb_teacher", "teacher"),
        ("bpb_distilled", "distilled"),
        ("bpb_model", "4-bit"),
    ):
        assert said[key] == pytest.approx(result[f"bits_per_byte_{name}"], rel=near(1e-6, 1e-3))
    flags = ("--num-samples", 2, "--q-iters", 2, "--mlx-path", tmp_path / "q")
    done = command("quantize", "--model", student, "--teacher", big.path, *common, *flags)
    assert done.returncode == 0, done.stderr
    assert vocabulary.rows_of(tmp_path / "q") == vocabulary.rows_of(student)
    refused = command("generate", "--model", big.path, "--draft-model", student)
    assert "has a different tokenizer from" in sentence(refused)


def test_gguf_keeps_the_parents_pre_tokenizer(
    tmp_path: Path, text_folder: Path, command: Callable[..., Done]
) -> None:
    """llama.cpp knows a pre-tokenizer by ids, which have changed; gguf-py reads tokens, merges and
    special ids.
    """
    from gguf import GGUFReader

    teacher = make(tmp_path / "teacher", bos_token_id=0, eos_token_id=0)
    seen, kept = trimmed(teacher, text_folder, tmp_path / "rows")
    named = json.loads((seen.path / vocabulary.ROWS).read_text())
    assert (named["rows"], named["pre_tokenizer"]) == (kept, "gpt-2")
    (seen.path / vocabulary.ROWS).write_text(json.dumps({**named, "pre_tokenizer": "parents"}))
    how = prune.Settings(
        model=str(teacher.path),
        data=str(text_folder),
        num_samples=2,
        max_seq_length=32,
        scenario="none",
        vocab="0.5x",
        mlx_path=str(tmp_path / "p"),
    )
    prune.run(how)
    shutil.copy(seen.path / vocabulary.ROWS, tmp_path / "p")
    done = command("export", "--model", tmp_path / "p", "--format", "gguf", "--out", tmp_path / "g")
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(next((tmp_path / "g").glob("*.gguf")))

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    spec = json.loads((tmp_path / "p" / "tokenizer.json").read_text())["model"]
    assert field("pre") == "parents"
    assert field("eos_token_id") == 0
    assert {text: i for i, text in enumerate(field("tokens"))} == spec["vocab"]
    assert [m.split(" ") for m in field("merges")] == spec["merges"]


def test_the_page_of_such_a_run(finished: tuple[Path, Done]) -> None:
    """Whole, its losses in bits a byte, since nats a token cannot be compared."""
    out, done = finished
    report.run(report.Settings(str(out), str(out.parent / "page.html")))
    page = (out.parent / "page.html").read_text("utf-8")
    bits = last_line(done)["bits_per_byte_distilled"]
    assert (
        "is missing: a file comes from" not in page
        and f"{bits:.3f} bits per byte of text" in " ".join(page.split())
    )


@pytest.mark.thorough
def test_plan_follows(big: Checkpoint, in_process: Callable[..., Done]) -> None:
    """`plan --vocab`: fewer parameters in the student, all of the teacher's."""
    whole, half = (
        last_line(in_process("plan", "--teacher", big.path, "--scenario", "goral", *more))
        for more in ((), ("--vocab", 512))
    )
    assert whole["params_student"] - half["params_student"] == (ROWS - KEPT) * 64
    assert whole["params_teacher"] == half["params_teacher"]
    assert half["peak_bytes"] <= whole["peak_bytes"]


def test_what_is_cut_by_default(big: Checkpoint, tmp_path: Path) -> None:
    """Half of the tokens where they are an eighth of the model or more and can be fewer, and
    nothing else where that is nearly a third of the model; what is given counts.
    """
    small_share = {**big.config, "intermediate_size": 4096}
    large_share = {**big.config, "num_hidden_layers": 1}
    half_vocab = {"scenario": "half-vocab", "vocab": "0.5x"}
    half_ffn = {"scenario": "half-ffn", "vocab": None}
    assert vocabulary.defaults(None, None, large_share, big.path) == half_vocab
    assert vocabulary.defaults(None, None, large_share, None) == half_vocab
    assert vocabulary.defaults(None, None, small_share, big.path) == half_ffn
    assert vocabulary.defaults(None, "512", small_share, big.path) == {
        "scenario": "half-vocab",
        "vocab": "512",
    }
    assert vocabulary.defaults(None, "1x", large_share, big.path) == {
        "scenario": "half-ffn",
        "vocab": "1x",
    }
    assert vocabulary.defaults("redyk", None, small_share, big.path) == half_vocab
    assert vocabulary.defaults("goral", None, large_share, big.path) == {
        "scenario": "balanced",
        "vocab": None,
    }
    # without a tokenizer.json
    assert vocabulary.defaults(None, None, large_share, tmp_path) == half_ffn
    mostly_tokens = {**big.config, "num_hidden_layers": 1, "intermediate_size": 64}  # 0.79 of it
    assert vocabulary.defaults(None, None, mostly_tokens, big.path) == {
        "scenario": "none",
        "vocab": "0.5x",
    }
    assert vocabulary.defaults(None, "768", mostly_tokens, big.path) == {
        "scenario": "half-vocab",
        "vocab": "768",
    }
    assert vocabulary.defaults("gazda", None, mostly_tokens, big.path) == half_ffn


def test_the_teacher_knows_words_that_did_not_come_up(big: Checkpoint, text_folder: Path) -> None:
    """What it expects are its probabilities, summed; of tokens that no window has, those it expects
    most are kept.
    """
    train = windows(big, text_folder).pick(slice(0, 3))
    model = load.resident_model(big, precision.dtype_of(big))
    wanted = mx.softmax(model(mx.array(train.tokens)).astype(mx.float32), axis=-1).sum(axis=(0, 1))
    sums = vocabulary.expected(big, train)
    assert np.allclose(sums, np.array(wanted), rtol=near(1e-4, 0.05))
    assert sums.sum() == pytest.approx(train.tokens.size, rel=near(1e-5, 1e-2))
    kept = vocabulary.chosen(big, KEPT, train, vocabulary.VocabularyConfig())
    unseen = np.setdiff1d(np.arange(ROWS), train.tokens)
    inside = np.isin(unseen, kept)
    assert inside.any()
    assert sums[unseen[inside]].mean() > sums[unseen[~inside]].mean()


def test_the_head_in_parts_says_the_same(
    monkeypatch: pytest.MonkeyPatch, big: Checkpoint, text_folder: Path
) -> None:
    """Parts of the head, for some positions at a time: what the teacher expects is as with all at
    once.
    """
    train = windows(big, text_folder).pick(slice(0, 3))
    shape = shape_of(big.config)
    whole = vocabulary.expected(big, train)
    assert shape.vocab % 100
    monkeypatch.setattr(stream, "HEAD_PART", 100 * shape.hidden)
    monkeypatch.setattr(vocabulary, "VOCABULARY_LOGITS", 7 * shape.vocab)
    assert np.allclose(vocabulary.expected(big, train), whole, rtol=near(1e-5, 0.05))


def test_words_of_a_language(big: Checkpoint, text_folder: Path) -> None:
    """The tokens of its commonest words stay; a language without a list is a sentence with those
    that have one.
    """
    pytest.importorskip("wordfreq")
    train = windows(big, text_folder)
    polish = vocabulary.VocabularyConfig(languages=("pl",))
    alone, more = (
        set(vocabulary.chosen(big, KEPT, train, how))
        for how in (vocabulary.VocabularyConfig(), polish)
    )
    listed = vocabulary.words(("pl",))
    top = sorted(listed, key=lambda word: -listed[word])[:50]
    tokens = set[int]()
    for word in top:
        tokens |= set(load.tokenizer(big.path).encode(f" {word}", add_special_tokens=False))
    assert len(tokens & more) == len(tokens) > len(tokens & alone)
    with pytest.raises(
        MisError, match="--languages xx: there is no word list for it; choose from ar, bg"
    ):
        vocabulary.rows_left(big, vocabulary.VocabularyConfig(languages=("pl", "xx")))


def test_words_need_a_package(monkeypatch: pytest.MonkeyPatch, big: Checkpoint) -> None:
    """Which is named before any work."""
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    vocabulary.words.cache_clear()
    with pytest.raises(
        MisError, match=r"--languages needs word lists: pip install '.\[languages\]'"
    ):
        vocabulary.rows_left(big, vocabulary.VocabularyConfig(languages=("de",)))
