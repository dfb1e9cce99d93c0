"""Windows of a text for one tokenizer: what is trained on is not what is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mis_mlx.data import preparation, token_windows
from mis_mlx.models import load
from mis_mlx.types import Checkpoint, MisError


def test_a_folder_of_the_users(llama: Checkpoint, text_folder: Path) -> None:
    """Windows of the length asked for, int32, held out apart, always the same, and the notes say how many."""
    data = preparation.prepare(str(text_folder), load.tokenizer(llama.path), 32)
    assert list(data.held_out) == ["held-out"]
    held_out = data.held_out["held-out"]
    assert data.train.tokens.shape[1] == held_out.tokens.shape[1] == 32
    assert data.train.tokens.dtype == np.int32 and data.train.tokens.max() < 512
    assert len(token_windows.overlap(data.train, held_out)) == 0
    again = preparation.prepare(str(text_folder), load.tokenizer(llama.path), 32)
    assert token_windows.fingerprint(again.train) == token_windows.fingerprint(data.train)
    assert any(f"{len(data.train.tokens)} training windows of 32 tokens" in note for note in data.notes)


def test_held_out_text_that_is_also_trained_on_is_removed(tmp_path: Path, llama: Checkpoint, text_folder: Path) -> None:
    """A test row copied from train: its windows go, and the note counts them."""
    train = (text_folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(train))
    fresh = (text_folder / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join([*fresh, json.dumps({"text": json.loads(train[3])["text"][100:]})]))
    data = preparation.prepare(str(tmp_path), load.tokenizer(llama.path), 32)
    assert len(token_windows.overlap(data.train, data.held_out["held-out"])) == 0
    alone = preparation.prepare(str(text_folder), load.tokenizer(llama.path), 32)
    assert abs(len(data.held_out["held-out"].tokens) - len(alone.held_out["held-out"].tokens)) <= 1


def test_built_in_text_is_english_with_an_eighth_of_polish(llama: Checkpoint) -> None:
    """No --data: both languages held out, English first; one training window in eight is Polish."""
    data = preparation.prepare(None, load.tokenizer(llama.path), 256)
    assert list(data.held_out) == ["English", "Polish"]
    assert all(len(w.tokens) >= 3 for w in data.held_out.values())
    (note,) = (n for n in data.notes if "are Polish" in n)
    assert int(note.split()[0]) / len(data.train.tokens) == pytest.approx(1 / 8, abs=0.02)


def test_too_little_text_is_a_sentence(tmp_path: Path, llama: Checkpoint) -> None:
    """A text shorter than one window names both numbers and --max-seq-length."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a few words of ' + split + '"}\n')
    with pytest.raises(MisError, match="one window takes 256.*--max-seq-length"):
        preparation.prepare(str(tmp_path), load.tokenizer(llama.path), 256)


def test_conversations_share_their_instruction_and_stay(tmp_path: Path, llama: Checkpoint) -> None:
    """Every row begins with the same long order, which is no leak; an answer that training has, too, is one."""
    order = "Say in a few words of your own what the number of this letter stands for, and nothing more than that: "
    answers = [" ".join(f"{n * k}" for k in range(40, 80)) for n in range(3, 48, 3)]
    rows = [json.dumps({"prompt": order + str(n), "completion": a}) for n, a in enumerate(answers)]
    for name, some in {"train": rows[:10], "valid": rows[10:], "test": rows[10:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    tokenizer = load.tokenizer(llama.path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    alone = preparation.prepare(str(tmp_path), tokenizer, 64)
    assert "; 0 more held-out windows" in alone.notes[-1]
    (tmp_path / "test.jsonl").write_text("\n".join([*rows[10:], rows[0]]))
    assert "; 0 more" not in preparation.prepare(str(tmp_path), tokenizer, 64).notes[-1]
