"""`synthesize`: text that a model writes, mixed with other text, as a folder for --data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import distill, synthesize
from mis_mlx.data import preparation
from mis_mlx.distillation import run_text
from mis_mlx.hardware import memory
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing import continuous_batch, mlx_generate, text_writer
from mis_mlx.models.writing.continuous_batch import Room
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.planner import distillation_spec
from mis_mlx.settings import recipe
from mis_mlx.storage import hub
from mis_mlx.types import Budget, Checkpoint, MisError
from tests import tiny
from tests.conftest import Done

QUICK: dict[str, Any] = {"num_samples": 6, "max_tokens": 40}


@pytest.fixture
def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes no words: its texts are long enough and that is all."""
    monkeypatch.setattr(synthesize, "WORDLIKE", 0.0)
    monkeypatch.setattr(synthesize, "SHORT", 10)
    monkeypatch.setattr(synthesize.repetition, "loops", lambda _text: False)


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """Of a folder of text."""
    return [
        json.loads(line) for line in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]


def test_usable_by_hand() -> None:
    """Sentences are; a loop, a word, and numbers are not."""
    text = (
        "The shepherd left the hut early in the morning and counted his sheep, of which there were "
        "forty. " * 2
    )
    assert synthesize.usable(text + "Then he walked down to the village to buy bread.")
    assert not synthesize.usable("and so on " * 60)
    assert not synthesize.usable("Too short.")
    assert not synthesize.usable(" ".join(str(n * 7919 % 104729) for n in range(200)))


def test_our_openings_are_there_and_differ() -> None:
    """In both languages, dozens, none twice; an unknown language is named."""
    english = synthesize.openings(("en",))
    polish = synthesize.openings(("pl",))
    assert len(english) >= 80
    assert len(polish) >= 60
    assert len({*english, *polish}) == len(english) + len(polish)
    assert synthesize.openings(("en", "pl")) == english + polish
    with pytest.raises(MisError, match="no openings in de: use en, pl, or --openings FILE"):
        synthesize.openings(("pl", "de"))


def texts_of(
    s: synthesize.Settings, writer: TextWriter, model: Checkpoint, numbers: Sequence[int]
) -> dict[int, Any]:
    """The texts of these numbers, in their order."""
    found = dict(synthesize.write(s, writer, load.tokenizer(model.path), numbers))
    return {number: found[number] for number in numbers}


def test_texts_are_the_models_own(llama: Checkpoint, anything_goes: None, tmp_path: Path) -> None:
    """Half begin with an opening; a text is the same again whichever came before; it is what the
    model would say: greedily, the continuation that mlx_lm writes.
    """
    model, tokenizer = mlx_generate.open_model(compute_type.open_to_compute(llama.path))
    writer = text_writer.opened(llama, None)
    (tmp_path / "openings.txt").write_text("A shepherd\n")
    asked = synthesize.Settings(openings=str(tmp_path / "openings.txt"), max_tokens=24, seed=5)
    first = texts_of(asked, writer, llama, range(12))
    assert texts_of(asked, writer, llama, [6, 3]) == {6: first[6], 3: first[3]}
    assert len({str(row) for row in first.values()}) == 12
    assert sum(row["text"].startswith("A shepherd") for row in first.values()) == 6
    sure = replace(asked, temp=0.0)
    texts = [row["text"] for row in texts_of(sure, writer, llama, range(4)).values()]
    (greedy,) = {text for text in texts if text.startswith("A shepherd")}
    start = tokenizer.get_vocab().get(synthesize.DOCUMENT, tokenizer.bos_token_id)
    ids = [start, *tokenizer.encode("A shepherd", add_special_tokens=False)]
    wanted = [t for t in mlx_generate.greedy(model, ids, 24) if t not in tokenizer.eos_token_ids]
    assert greedy == ("A shepherd" + tokenizer.decode(wanted)).strip()


@pytest.mark.thorough
@pytest.mark.usefixtures("cpu_policy")
def test_a_streamed_model_writes_the_same(
    llama: Checkpoint, anything_goes: None, tmp_path: Path
) -> None:
    """Read from disk for every token, two or all side by side, it says what it says whole, after
    openings of several lengths.
    """
    (tmp_path / "openings.txt").write_text(
        "A shepherd\nIn the early morning, before the sun was up, he\n"
    )
    asked = synthesize.Settings(openings=str(tmp_path / "openings.txt"), max_tokens=24)
    whole = texts_of(asked, text_writer.opened(llama, None), llama, range(8))
    for room in (None, Room(2)):
        streamed = text_writer.opened(llama, 0, room=room)
        assert texts_of(asked, streamed, llama, range(8)) == whole
    assert len({str(row) for row in whole.values()}) == 8


def test_what_does_not_fit_is_streamed(tmp_path: Path) -> None:
    """Many at once while the model fits, then fewer, then from disk with what there is room for."""
    deep = load.open_checkpoint(tiny.make(tmp_path / "deep", num_hidden_layers=48))
    m = model_of(deep)
    s = synthesize.Settings(max_tokens=64)
    whole = next(
        n
        for n in range(2**20, 2**30, 2**12)
        if n
        >= memory.process_bytes(n)
        + continuous_batch.resident_bytes(m, 1, 64 + synthesize.OPENING_TOKENS)
    )
    ways = [
        synthesize.way_of(s, m, Budget(nbytes)) for nbytes in (2**34, whole + 2**20, whole - 2**12)
    ]
    assert [way.at_once for way in ways[:2]] == [48, 1]
    assert ways[0].headroom_bytes is ways[1].headroom_bytes is None
    assert ways[2].headroom_bytes is not None
    assert all(way.seconds > 0 for way in ways)


def test_questions_are_asked_through_the_template(
    llama: Checkpoint, anything_goes: None, tmp_path: Path
) -> None:
    """A chat model answers half of the openings as questions: such a row is one of mlx-lm's."""
    shutil.copytree(llama.path, chat := tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    model = load.open_checkpoint(chat)
    assert load.tokenizer(chat).has_chat_template
    writer = text_writer.opened(model, None)
    written = texts_of(synthesize.Settings(max_tokens=16), writer, model, range(8)).values()
    asked = [row for row in written if "prompt" in row]
    assert len(asked) == 2
    assert len(written) == 8
    assert all(
        row["prompt"] in synthesize.openings(("en", "pl")) and row["completion"] for row in asked
    )


def test_end_to_end(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, anything_goes: None
) -> None:
    """Texts of the model and pieces of the other text, half each by characters; held-out splits are
    the other text's; the folder is one that --data takes.
    """
    s = synthesize.Settings(
        model=str(llama.path), out=str(tmp_path / "text"), data=str(text_folder), **QUICK
    )
    before = mx.get_active_memory()
    most = continuous_batch.resident_bytes(
        model_of(llama), synthesize.AT_ONCE[0], 40 + synthesize.OPENING_TOKENS
    )
    mx.reset_peak_memory()
    found = synthesize.run(s)
    out = tmp_path / "text"
    assert mx.get_peak_memory() - before < most < found["peak_bytes"] <= found["budget_bytes"]
    train = rows(out)
    written = train[: found["written"]]
    mixed = train[found["written"] :]
    assert len(written) == 6
    assert len(mixed) == found["mixed_in"] > 0
    own = sum(len(row["text"]) for row in written)
    added = sum(len(row["text"]) for row in mixed)
    assert own <= added <= own + synthesize.PIECE * 2
    for row in mixed:
        assert any(row["text"] in other["text"] for other in rows(text_folder))
    assert rows(out, "test") == rows(text_folder, "test")
    assert [row for row in preparation.load(str(out)).train if row in mixed] == mixed
    assert not list(tmp_path.glob(".text*"))
    alone = synthesize.Settings(
        model=str(llama.path), out=str(tmp_path / "b"), data=str(text_folder), mix=0.0, **QUICK
    )
    assert synthesize.run(alone)["mixed_in"] == 0
    assert rows(tmp_path / "b") == written


def test_distill_has_its_teacher_write(
    llama: Checkpoint, tmp_path: Path, anything_goes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--data teacher`: once for a teacher and a seed, half built-in text beside, judged on the
    built-in texts. Other commands say who takes that word.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "TEACHER_TEXTS", 6)
    monkeypatch.setattr(run_text, "TEXT_TOKENS", 16)
    small: dict[str, Any] = {
        "max_seq_length": 32,
        "num_samples": 4,
        "reconstruct_samples": 4,
        "eval_windows": 3,
    }
    s = distill.Settings(
        teacher=str(llama.path),
        data="teacher",
        scenario="goral",
        out="run",
        iters=2,
        quantize=0,
        bench_tokens=0,
        **small,
    )
    assert distill.run(s.with_values(dry_run=True))
    assert not Path("runs/text").exists()
    result = distill.run(s)
    (folder,) = Path("runs/text").iterdir()
    source = json.loads((folder / hub.PROVENANCE).read_text())
    assert source["written"] == 6
    assert source["data"] is None
    assert source["model"] == str(llama.path)
    table = Path("run/table.md").read_text()
    assert "English, " in table
    assert "Polish, " in table
    assert distill.run(s.with_values(resume=True))["params_student"] == result["params_student"]
    assert [int(path.name.rpartition("-")[2]) for path in Path("runs/text").iterdir()] == [6]
    with pytest.raises(MisError, match="--data teacher works with distill only"):
        preparation.load("teacher")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("repaired", [0, 4])
def test_a_resumed_run_asks_for_the_same_text(
    models: Callable[[str], Checkpoint], kind: str, repaired: int
) -> None:
    """A run stores the usual number of steps where none was given; its text is that of before. More
    steps, more.
    """
    teacher = models(kind)
    begun = distill.Settings(
        teacher=str(teacher.path),
        data="teacher",
        batch_size=16,
        reconstruct_samples=repaired,
        dry_run=True,
    )
    seen = model_of(teacher)
    stored = replace(begun, iters=distillation_spec.spec_of(seen, seen, begun).iters)
    longer = replace(begun, iters=4 * (stored.iters or 0))
    text = run_text.teacher_text(begun, teacher)
    assert text == run_text.teacher_text(stored, teacher)
    more = run_text.teacher_text(longer, teacher)
    assert text and more
    assert text.out != more.out
    assert synthesize.Settings.num_samples < text.texts < more.texts
    assert run_text.teacher_text(replace(begun, data=None), teacher) is None


def test_stopped_and_started_again_it_writes_the_same(
    llama: Checkpoint,
    text_folder: Path,
    tmp_path: Path,
    anything_goes: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a stop left is used, whatever the budget is now; other settings begin anew."""
    monkeypatch.setattr(synthesize, "AT_ONCE", (2,))
    s = {"model": str(llama.path), "data": str(text_folder), **QUICK}
    synthesize.run(synthesize.Settings(out=str(tmp_path / "whole"), **s))
    part = tmp_path / ".half.part.jsonl"
    kept = list[str]()

    def stop(*_: Any) -> None:
        kept.extend(part.read_text("utf-8").splitlines())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthesize, "_drawn", stop)
        synthesize.run(synthesize.Settings(out=str(tmp_path / "half"), **s))
    first, second, *others = kept[:-2]
    record = json.loads(second)
    as_earlier_versions = json.dumps([record["number"], record["row"]])
    before = [first, as_earlier_versions, *others]
    torn = kept[-2][: len(kept[-2]) // 2]
    part.write_text("\n".join([*before, torn]), "utf-8")  # as if it had come sooner
    written = list[int]()
    real = synthesize.write

    def watched(settings: Any, writer: Any, tokenizer: Any, numbers: Sequence[int]) -> Any:
        written.extend(numbers)
        return real(settings, writer, tokenizer, numbers)

    monkeypatch.setattr(synthesize, "write", watched)
    monkeypatch.setattr(synthesize, "AT_ONCE", (5,))
    synthesize.run(synthesize.Settings(out=str(tmp_path / "half"), **s))
    assert rows(tmp_path / "half") == rows(tmp_path / "whole")
    assert len(written) == 2
    assert not part.exists()


def test_what_cannot_be_is_a_sentence(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, in_process: Callable[..., Done]
) -> None:
    """Nothing usable, no openings, no memory: one sentence, no folder."""
    (tmp_path / "empty.txt").write_text("\n \n")
    flags = (
        "--model",
        llama.path,
        "--data",
        text_folder,
        "--out",
        tmp_path / "text",
        "--num-samples",
        2,
    )
    cases = {
        ("--max-tokens", 4): "of this model are usable, but 2 were requested",
        ("--openings", tmp_path / "empty.txt"): "has 0 lines with text",
        ("--openings", tmp_path): "cannot be read",
        ("--languages", "xx"): "no openings in xx",
    }
    for more, said in cases.items():
        done = in_process("synthesize", *flags, *more)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
    assert not (tmp_path / "text").exists()
