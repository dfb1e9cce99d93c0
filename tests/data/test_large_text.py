"""Text of which a run needs a small part: what is read, drawn, tokenized and held in memory."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.data import examples, preparation, row_draw
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint
from tests.peaks import counted

MIB = 2**20
LARGE_BYTES = 24 * 10**6
ROW_BYTES = 1500  # about
HELD_BYTES = 64 * MIB  # by numpy and Python while a large text is prepared: 15 times less than all


class Counting:
    """A tokenizer that counts the texts it is given, each row being one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.texts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        """As the tokenizer."""
        self.texts[text] += 1
        return list(self.tokenizer.encode(text, **options))


def write_rows(path: Path, nbytes: int, key: str = "text", *, seed: int = 0) -> list[str]:
    """Rows of so many bytes in all, no two alike; returns their texts."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnoprstuwyząćęłńóśźż", k=6)) for _ in range(4000)]
    pieces = [" ".join(chance.choices(words, k=ROW_BYTES // 16)) for _ in range(500)]
    texts = []
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < nbytes:
            text = f"{len(texts)} {chance.choice(pieces)} {chance.choice(pieces)}"
            line = json.dumps({key: text, **({"completion": "yes"} if key == "prompt" else {})})
            written += file.write(line + "\n")
            texts.append(text)
    return texts


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 24 MB of training text."""
    folder = tmp_path_factory.mktemp("large")
    write_rows(folder / "train.jsonl", LARGE_BYTES)
    write_rows(folder / "test.jsonl", 40 * ROW_BYTES, seed=1)
    yield folder
    preparation.forget()


def test_a_large_text_is_prepared_within_its_budget(
    large: Path, llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held is bounded by what is drawn, not by the file; the notes say what was left. Of
    its rows those that are drawn are tokenized, each of them once.
    """
    counting = Counting(load.tokenizer(llama.path))
    with counted(monkeypatch) as peak:
        data = preparation.prepare(str(large), counting, 128)
    assert peak.nbytes < HELD_BYTES
    assert len(data.train.tokens) * 128 < LARGE_BYTES / 4
    assert any("rows are drawn" in note for note in data.notes)
    texts = preparation.load(str(large))
    own = Counter(row["text"] for row in [*texts.train, *texts.test])
    assert len(own) * ROW_BYTES < LARGE_BYTES / 4
    ours = {text: count for text, count in counting.texts.items() if text in own}
    assert ours == own
    # The others are the built-in held-out text, which is not of this folder.
    everything = (large / "train.jsonl").read_text("utf-8")
    others = [text for text in counting.texts if text and text not in own]
    assert not [text for text in others if json.dumps(text) in everything]


def test_a_longer_training_draws_more_and_the_same(large: Path) -> None:
    """What a short one draws is a part of it; each draw comes from the whole file, in its order."""
    few = [row["text"] for row in preparation.load(str(large)).train]
    many = [row["text"] for row in preparation.load(str(large), tokens=10**6).train]
    assert set(few) < set(many)
    numbers = [int(text.split()[0]) for text in few]
    assert numbers == sorted(numbers)
    total = (large / "train.jsonl").read_bytes().count(b"\n")
    assert np.mean(numbers) == pytest.approx(total / 2, rel=0.05)
    assert min(numbers) < 0.01 * total
    assert max(numbers) > 0.99 * total


def test_the_file_is_read_once_and_again_when_it_changes(tmp_path: Path) -> None:
    """The same rows as long as it stays as it is."""
    write_rows(tmp_path / "train.jsonl", 20 * ROW_BYTES)
    first = preparation.load(str(tmp_path))
    assert preparation.load(str(tmp_path)) is first
    write_rows(tmp_path / "train.jsonl", 30 * ROW_BYTES, seed=2)
    assert len(preparation.load(str(tmp_path)).train) > len(first.train)


@pytest.mark.parametrize(("size", "kept"), [(100, 100), (101, 25)])
def test_up_to_a_size_a_text_is_whole(
    size: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All items in their order, not one left out; of one item more, as many as are asked for."""
    monkeypatch.setattr(row_draw, "WHOLE_BYTES", 1000)
    found = row_draw.drawn(((number, 10) for number in range(size)), 250)
    assert (len(found.items), found.total) == (kept, size)
    assert found.items == sorted(found.items)
    assert bool(found.note("x")) is (kept < size)
    everything = row_draw.drawn(((number, 10) for number in range(size)), 10 * size)
    assert everything.items == list(range(size))


def test_rows_to_align_with_are_drawn_too(
    tmp_path: Path, llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sft, dpo and grpo read a part of a large file as well."""
    monkeypatch.setattr(row_draw, "WHOLE_BYTES", 2**18)
    monkeypatch.setattr(row_draw, "LEAST_DRAWN_BYTES", 2**16)
    write_rows(tmp_path / "train.jsonl", 2**20, "prompt")
    found = examples.load(str(tmp_path), ["completion"])
    counting = Counting(load.tokenizer(llama.path))
    encoded, _ = examples.encode(found.train, counting, 64, mask_prompt=False)
    count = len(found.train) + len(found.valid)
    assert count * ROW_BYTES < 2**17
    assert len(encoded) == len(found.train)
    more = examples.load(str(tmp_path), ["completion"], tokens=2**15)
    assert len(more.train) > 2 * len(found.train)
    assert any("rows are drawn" in note for note in found.notes)
