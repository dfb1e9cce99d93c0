"""Windows of a text for one tokenizer: what is trained on is not what is measured on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.data import draws, overlap, preparation, token_windows
from mis_mlx.data.rows import split_off
from mis_mlx.models.opening import load
from mis_mlx.storage import files
from mis_mlx.types import Checkpoint, MisError
from tests import tiny


def test_a_folder_of_the_users(llama: Checkpoint, text_folder: Path, tmp_path: Path) -> None:
    """Windows of the length asked for, int32, always the same, and the notes say how many. Held-out
    text that is also trained on is removed; too little text is refused with both numbers.
    """
    data = preparation.prepare(str(text_folder), load.tokenizer(llama.path), 32)
    assert list(data.held_out) == ["held-out"]
    held_out = data.held_out["held-out"]
    assert data.train.tokens.shape[1] == held_out.tokens.shape[1] == 32
    assert data.train.tokens.dtype == np.int32
    assert data.train.tokens.max() < 512
    assert len(overlap.overlap(data.train, held_out)) == 0
    again = preparation.prepare(str(text_folder), load.tokenizer(llama.path), 32)
    assert token_windows.fingerprint(again.train) == token_windows.fingerprint(data.train)
    sentence = f"{len(data.train.tokens)} training windows of 32 tokens"
    assert any(sentence in note for note in data.notes)
    folder = Path(shutil.copytree(text_folder, tmp_path / "text"))
    first, *_ = (folder / "train.jsonl").read_text().splitlines()
    with (folder / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": json.loads(first)["text"][100:]}) + "\n")
    copied = preparation.prepare(str(folder), load.tokenizer(llama.path), 32)
    assert len(overlap.overlap(copied.train, copied.held_out["held-out"])) == 0
    assert abs(len(copied.held_out["held-out"].tokens) - len(held_out.tokens)) <= 1
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text('{"text": "a few words of ' + split + '"}\n')
    with pytest.raises(MisError, match="takes 256.*--max-seq-length"):
        preparation.prepare(str(folder), load.tokenizer(llama.path), 256)


MANUAL, POLISH, WRITTEN, TALK = preparation.SHARES


@pytest.fixture(scope="module")
def chat(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of the tiny llama, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    return load.tokenizer(tiny.chatting(llama.path, folder))


@pytest.fixture(scope="module")
def built_in(chat: Any) -> tuple[preparation.Data, preparation.Data]:
    """No --data, with conversations and without."""
    without = preparation.Source(share=0.0)
    return preparation.prepare(None, chat, 256), preparation.prepare(without, chat, 256)


def answers_of(path: Path, count: int = 9) -> tuple[Path, list[dict[str, Any]]]:
    """A file of short conversations, and its rows."""
    rows = list[dict[str, Any]]()
    for number in range(count):
        said = (
            f"It is number {number}, and what follows it is {number + 1}, in this list as in "
            f"any other."
        )
        messages = [
            {"role": "user", "content": f"Which {number}?"},
            {"role": "assistant", "content": said},
        ]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def shares_of(windows: token_windows.Windows, at: Any) -> list[float]:
    """Of a draw: how much of it each kind is."""
    counts = np.bincount(windows.kind[at], minlength=len(windows.shares))
    return (counts / len(at)).tolist()


def tokens_of(windows: token_windows.Windows, kind: int) -> list[list[int]]:
    """The windows of one kind."""
    return windows.tokens[windows.kind == kind].tolist()


def cut(rows: Sequence[Any], tokenizer: Any, length: int) -> list[list[int]]:
    """The windows of these conversations alone."""
    ids = token_windows.tokenize(rows, tokenizer)
    return token_windows.aligned(ids, length).tokens.tolist()


def test_built_in_text_without_a_chat_template(llama: Checkpoint) -> None:
    """No --data: both languages held out, English first. Three kinds of text in their shares,
    without conversations, in calibration whatever its seed and use is, and in training; and a note
    says so.
    """
    data = preparation.prepare(None, load.tokenizer(llama.path), 256)

    assert list(data.held_out) == ["English", "Polish"]
    assert all(len(w.tokens) >= 3 for w in data.held_out.values())
    wanted = [5 / 8, 1 / 8, 2 / 8]
    assert data.train.shares == pytest.approx(wanted)
    assert f"training windows are 62% {MANUAL}, 12% {POLISH}, 25% {WRITTEN}" in data.notes
    for count, seed, use in ((8, 0, 1), (64, 1, 2)):
        at = preparation.calibration_indices(data.train, count, seed, use)
        assert shares_of(data.train, at) == pytest.approx(wanted, abs=1 / count)
    visited = np.concatenate([draws.drawn_batch(data.train, 2, step, seed=0) for step in range(60)])
    assert shares_of(data.train, visited) == pytest.approx(wanted, abs=1 / 120)


def trained(rows: Sequence[Any]) -> list[Any]:
    """The conversations that stand in training windows: all but a tenth, by hash."""
    return split_off(list(rows), [files.json_sha256(row) for row in rows])[0]


def test_conversations_held_out_are_in_no_training_window(
    chat: Any, built_in: tuple[preparation.Data, preparation.Data], tmp_path: Path
) -> None:
    """A tenth of them, with their ids nowhere in the text that trains; none where none are wanted.
    Of a folder's own conversations those of its valid split.
    """
    data, without = built_in
    rows = preparation.read(preparation.ANSWERS).rows
    assert 0.05 * len(rows) < len(data.talks) < 0.15 * len(rows)
    flat = data.train.tokens.reshape(-1).tolist()
    trained_ids = " ".join(map(str, flat))
    for ids in token_windows.tokenize(data.talks, chat):
        assert " ".join(map(str, ids[-32:])) not in trained_ids
    assert without.talks == ()

    folder = tmp_path / "talks"
    folder.mkdir()
    answers_of(folder / "train.jsonl")
    _, own = answers_of(folder / "valid.jsonl", 5)
    answers_of(folder / "test.jsonl", 7)
    assert list(preparation.prepare(str(folder), chat, 32).talks) == list(own)


def test_with_a_chat_template_much_is_conversations(
    chat: Any, built_in: tuple[preparation.Data, preparation.Data], tmp_path: Path
) -> None:
    """The default teacher's answers, or another's in any share, each window from the beginning of
    one on; the kinds are cut as each alone is; and held-out text is what it was without.
    """
    data, without = built_in
    assert data.train.shares == pytest.approx(tuple(preparation.SHARES.values()))
    assert sum(data.train.shares) == pytest.approx(1.0)
    rows = trained(preparation.read(preparation.ANSWERS).rows)
    talks = tokens_of(data.train, 3)
    assert talks == cut(rows, chat, 256)
    assert chat.decode(talks[0][:8]).startswith("user\n")
    assert without.train.shares == pytest.approx((5 / 8, 1 / 8, 2 / 8))
    assert without.train.tokens.tolist() == data.train.tokens[data.train.kind < 3].tolist()
    path, own = answers_of(tmp_path / "answers.jsonl")
    others = preparation.prepare(preparation.Source(None, answers=path, share=0.2), chat, 256)
    rest = 0.8 / (1 - preparation.SHARES[TALK])
    wanted = [rest * preparation.SHARES[kind] for kind in (MANUAL, POLISH, WRITTEN)]
    assert others.train.shares == pytest.approx([*wanted, 0.2])
    assert tokens_of(others.train, 3) == cut(trained(own), chat, 256)
    for name, held_out in data.held_out.items():
        assert held_out.tokens.tolist() == without.held_out[name].tokens.tolist()


@pytest.mark.parametrize(("share", "wanted"), [(None, 0.44), (0.25, 0.25), (0.95, 0.95)])
def test_answers_stand_beside_a_folder(
    chat: Any, text_folder: Path, tmp_path: Path, share: float | None, wanted: float
) -> None:
    """The folder's windows as they are alone, then the answers, in the share asked for, or in the
    usual one. Without a file of answers nothing stands beside it, whatever share is asked for.
    """
    path, rows = answers_of(tmp_path / "answers.jsonl")
    alone = preparation.prepare(str(text_folder), chat, 64)
    talks = cut(trained(rows), chat, 64)

    source = preparation.Source(str(text_folder), answers=path, share=share)
    data = preparation.prepare(source, chat, 64)

    assert data.train.shares == pytest.approx((1 - wanted, wanted))
    assert tokens_of(data.train, 0) == alone.train.tokens.tolist()
    assert tokens_of(data.train, 1) == talks
    at = preparation.calibration_indices(data.train, 12, seed=3)
    _, of_talks = shares_of(data.train, at)
    assert of_talks == pytest.approx(min(wanted, len(talks) / 12), abs=1 / 12)
    held_out = data.held_out["held-out"].tokens
    assert held_out.tolist() == alone.held_out["held-out"].tokens.tolist()
    without = preparation.prepare(preparation.Source(str(text_folder), share=share), chat, 64)
    assert token_windows.fingerprint(without.train) == token_windows.fingerprint(alone.train)


def test_text_and_conversations_of_a_folder_are_two_kinds(
    llama: Checkpoint, chat: Any, text_folder: Path, tmp_path: Path
) -> None:
    """In the shares that they have there, by windows; conversations begin windows of their own.
    Where a tokenizer has no way to say who speaks, there are none.
    """
    folder = Path(shutil.copytree(text_folder, tmp_path / "text"))
    path, rows = answers_of(tmp_path / "answers.jsonl", 30)
    with (folder / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    data = preparation.prepare(str(folder), chat, 64)

    text = preparation.prepare(str(text_folder), chat, 64).train.tokens.tolist()
    talks = cut(rows, chat, 64)
    assert tokens_of(data.train, 0) == text
    assert tokens_of(data.train, 1) == talks
    count = len(data.train.tokens)
    assert data.train.shares == pytest.approx((len(text) / count, len(talks) / count))
    assert preparation.has_conversations(str(folder))
    assert not preparation.has_conversations(str(text_folder))
    source = preparation.Source(str(text_folder), answers=path, share=0.5)
    tokenizer = load.tokenizer(llama.path)
    assert preparation.prepare(source, tokenizer, 64).train.kind is None
    assert not preparation.takes_conversations(tokenizer)


def test_conversations_share_their_instruction_and_stay(tmp_path: Path, chat: Any) -> None:
    """A long order before every row is no leak; an answer that training has, too, is one."""
    order = (
        "Say in a few words of your own what the number of this letter stands for, "
        "and nothing more than that: "
    )
    answers = [" ".join(map(str, range(40 * n, 80 * n, n))) for n in range(3, 48, 3)]
    rows = [json.dumps({"prompt": order + str(n), "completion": a}) for n, a in enumerate(answers)]
    for name, some in {"train": rows[:10], "valid": rows[10:], "test": rows[10:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    alone = preparation.prepare(str(tmp_path), chat, 192)
    assert "more shared 32 tokens" not in alone.notes[-1]
    (tmp_path / "test.jsonl").write_text("\n".join([*rows[10:], rows[0]]))
    assert "; 0 more" not in preparation.prepare(str(tmp_path), chat, 192).notes[-1]
