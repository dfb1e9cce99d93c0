"""Where text comes from: the built-in texts and their fixed splits, folders, the hub."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mis_mlx.data import manual, preparation
from mis_mlx.data.preparation import load
from mis_mlx.types import MisError


@pytest.fixture(autouse=True)
def nothing_read() -> None:
    """No text of another test is kept."""
    preparation.forget()


def _write(folder: Path, **files: Sequence[str]) -> str:
    for name, texts in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


def _texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


STAY = {
    "train": ("compound", "types"),
    "valid": ("typesmapping", "raise"),
    "test": ("formatstrings", "typesseq"),
}


def test_the_manual_is_split_by_name_for_ever() -> None:
    """These topics stay where they are: a name that moved would turn old test scores into training
    scores. No document stands twice; about 80 / 5 / 15 % of the characters; chapters that contain
    other topics whole ("compound" holds "with") are used once; the note names the Python.
    """
    from pydoc_data.topics import topics

    texts = load()
    splits = {name: _texts(getattr(texts, name)) for name in STAY}
    for name, stay in STAY.items():
        assert {topics[topic] for topic in stay} <= set(splits[name])
    assert len(set().union(*splits.values())) == sum(map(len, splits.values()))
    sizes = {name: sum(map(len, split)) for name, split in splits.items()}
    total = sum(sizes.values())
    for name, share, near in (("train", 0.8, 0.05), ("valid", 0.05, 0.02), ("test", 0.15, 0.05)):
        assert sizes[name] / total == pytest.approx(share, abs=near)

    def spans(split: str) -> set[str]:
        flat = [" ".join(text.split()) for text in splits[split]]
        return {text[at : at + 100] for text in flat for at in range(len(text) - 99)}

    assert len(spans("test") & spans("train")) < 0.01 * len(spans("test"))
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in texts.notes[0]


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "c6bfafc6481d934e03b50007dc5deaa4cbb5695e11aaeaf1743a5ec9636fecb5"),
        ("valid", "c7111822e5de7117aa3bfd228105b6293d05ca77e9e16bc4bb1365dbb7207955"),
        ("test", "9478157880fd312b31181929714cc249df1a53da1e024ed01af7d6d79a0d53cb"),
    ],
)
def test_the_polish_text_is_the_same_for_ever(split: str, digest: str) -> None:
    """sha256 of all rows, NUL between them: with one other letter no old loss could be compared."""
    rows = getattr(load("mis"), split)
    assert all(row.keys() == {"text"} for row in rows)
    assert hashlib.sha256("\0".join(_texts(rows)).encode()).hexdigest() == digest


def test_files_are_splits_and_missing_ones_are_filled_in(tmp_path: Path) -> None:
    """Each file is its split, in order, and counts are noted. Without test.jsonl valid serves, and
    a note says so. Without valid.jsonl nothing is taken from train, which is all there to learn
    from.
    """
    texts = load(_write(tmp_path, train=["a", "b"], valid=["c"], test=["d"]))
    splits = [_texts(texts.train), _texts(texts.valid), _texts(texts.test)]
    assert splits == [["a", "b"], ["c"], ["d"]]
    for note, name, count in zip(texts.notes, ("train", "valid", "test"), (2, 1, 1), strict=True):
        assert note.startswith(f"{name}.jsonl: {count} ")
    (tmp_path / "test.jsonl").unlink()
    texts = load(str(tmp_path))
    assert (texts.valid, texts.test) == ([], [{"text": "c"}])
    assert any("no test split" in note for note in texts.notes)
    (tmp_path / "valid.jsonl").unlink()
    rows = [f"row {i}" for i in range(1000)]
    texts = load(_write(tmp_path, train=rows, test=["d"]))
    assert (_texts(texts.train), texts.valid, _texts(texts.test)) == (rows, [], ["d"])


@pytest.mark.parametrize("held_out", ["valid", "test", "train"])
def test_conversations_that_choose_do_not_judge(tmp_path: Path, held_out: str) -> None:
    """Of the conversations in the one split that is held out, or in a tenth of train, about a half
    chooses and the others judge; texts judge.
    """
    rows: list[dict[str, str]] = [{"text": f"text {i}"} for i in range(100)]
    rows += [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(1000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(lines)
    (tmp_path / f"{held_out}.jsonl").write_text(lines)
    texts = load(str(tmp_path))
    talks = [row for row in texts.test if "text" not in row]
    assert all("text" not in row for row in texts.valid)
    assert not [row for row in talks if row in texts.valid]
    count = len(texts.valid) + len(talks)
    assert 0.35 * count < len(texts.valid) < 0.65 * count
    if held_out != "train":
        assert (len(texts.train), len(texts.valid) + len(texts.test)) == (1100, 1100)


def test_with_train_alone_a_tenth_is_held_out(tmp_path: Path) -> None:
    """Neither valid nor test: about 10 % by hash of content, the same whatever the order of the
    lines. All copies of a text are on one side; of a single row nothing is held out.
    """
    names = [f"row {i}" for i in range(300)]
    texts = load(_write(tmp_path, train=names))
    assert sorted(_texts(texts.train) + _texts(texts.test)) == sorted(names)
    assert 15 < len(texts.test) < 45
    assert any("no valid split" in note for note in texts.notes)
    turned = load(_write(tmp_path, train=names[::-1]))
    assert set(_texts(turned.test)) == set(_texts(texts.test))
    texts = load(_write(tmp_path, train=["a", "a", "b", "b"]))
    train, test = set(_texts(texts.train)), set(_texts(texts.test))
    assert train and test and not train & test
    texts = load(_write(tmp_path, train=["a"]))
    assert (len(texts.train), len(texts.valid), len(texts.test)) == (1, 0, 0)
    assert any("0 rows of train are held out" in note for note in texts.notes)


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ({"train": []}, ".", "jsonl has 0 .* 0 "),
        ({"train": ["a"], "valid": ["", " "]}, ".", "jsonl has 0 .* 2 "),
        ({}, ".", "train.jsonl"),
        ({"train": ["a"]}, "train.jsonl", "--data"),
        ({}, "absent", "absent"),
    ],
)
def test_folders_that_are_refused(
    tmp_path: Path, files: dict[str, list[str]], name: str, said: str
) -> None:
    """An empty file, one of bad rows; no train.jsonl, a file in the folder's place, no folder."""
    _write(tmp_path, **files)
    with pytest.raises(MisError, match=said):
        load(str(tmp_path / name))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of a hub set, "validation" included, pass the same judgement as lines, with row
    numbers. Whatever the package raises, a set without a train split, and no package are sentences.
    """
    found = list[Any]()

    def load_dataset(name: str) -> Any:
        if isinstance(found[-1], Exception):
            raise found[-1]
        return found[-1]

    stands_in = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stands_in)
    found.append({"train": [{"text": "a"}, {"text": None}], "validation": [{"text": "b"}]})
    texts = load("some-user/some-data")
    assert (_texts(texts.train), _texts(texts.test)) == (["a"], ["b"])
    assert any(note.startswith("some-user/some-data[train] row 2:") for note in texts.notes)
    for bad, said in ((OSError("offline"), "'a/b' .*offline"), ({"dev": []}, "train")):
        found.append(bad)
        with pytest.raises(MisError, match=said):
            load("a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MisError, match=r"\.\[data\]"):
        load("a/b")


def test_mostly_repeated_topics_are_dropped() -> None:
    """Pencil: the topic that is a part of a longer one goes, one that shares a little stays."""
    one = "x" * 50
    two = "y" * 50
    three = "z" * 120
    topics = {"big": f"{one}\n\n{two}", "part": two, "own": f"{two}\n\n{three}"}
    assert manual.without_repeats(topics) == ["big", "own"]
