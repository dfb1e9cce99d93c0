"""Questions that share words with the training text are counted, by hand-made overlaps."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

import mis_mlx
from mis_mlx.data import preparation, rows
from mis_mlx.judge.tasks import questions

PACKAGE = Path(mis_mlx.__file__).parent
KNOWN_DATA = Path(os.environ.get("MIS_MLX_KNOWN_DATA") or PACKAGE.parent.parent / "shared" / "data")
TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def task(*asked: str) -> questions.Task:
    rows = [{"prompt": text, "answer": "zażółć"} for text in asked]
    return questions.task("t", rows, "")


def test_thirteen_words_in_a_row_are_found_whatever_the_case_and_marks() -> None:
    """12 of them are not; a short question is found whole; one of under five words says nothing."""
    known = questions.Known(questions.words(f"{TEXT} and baca had seven sheep Zażółć then"))
    words = TEXT.split()
    thirteen = "Odd start! " + ", ".join(words[1:14]).upper()
    twelve = "Odd start! " + ", ".join(words[1:13])
    assert known.overlap(task(thirteen)) == (1, 1)
    assert known.overlap(task(twelve)) == (0, 1)
    assert known.overlap(task("Baca had seven sheep")) == (1, 1)
    assert known.overlap(task("Baca had seven goats")) == (0, 1)
    inside = questions.Known(questions.words("then baca had seven sheep zażółćcie"))
    assert inside.overlap(task("baca had seven sheep")) == (0, 1)  # not the same word
    assert known.overlap(task("seven sheep")) == (0, 0)
    assert known.overlap(task(thirteen, twelve, "Baca had seven sheep", "sheep")) == (2, 3)


def test_long_text_is_held_in_little_memory() -> None:
    """A run of 13 words is one number: the words themselves are not held 13 times over."""
    known = [f"word{number}" for number in range(100_000)]
    tracemalloc.start()
    try:
        looked_up = questions.Known(known)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert looked_up.overlap(task(" ".join(known[500:520]))) == (1, 1)
    assert peak < 60 * len(known)


def test_all_training_rows_are_read(tmp_path: Path) -> None:
    """Of every format; the held-out rows are not."""
    rows = [
        {"text": "from the text"},
        {"prompt": "from the prompt", "completion": "from the completion"},
        {"messages": [{"role": "user", "content": "from a message"}]},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for split in ("valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": "secret"}) + "\n")
    found = questions.training_words(str(tmp_path))
    assert {"text", "prompt", "completion", "message"} <= set(found)
    assert "secret" not in found


def test_the_built_in_training_text_is_known() -> None:
    """Thirteen words of the manual of Python are found in it, and not backwards."""
    said = questions.training_words(None)
    known = questions.Known(said)
    assert len(said) > 100_000
    run = said[5000:5020]
    assert known.overlap(task(" ".join(run))) == (1, 1)
    assert known.overlap(task(" ".join(run[::-1]))) == (0, 1)


def test_what_models_wrote_is_known_too() -> None:
    """The built-in training text holds it: every file beside preparation.WRITTEN."""
    known = questions.Known(questions.training_words(None))
    for path in sorted(preparation.WRITTEN.parent.glob("*.jsonl")):
        texts = [questions.text_of(row) for row in rows.read(path).rows]
        longest = max(texts, key=len)
        asked = " ".join(questions.words(longest)[:20])

        assert known.overlap(task(asked)) == (1, 1), path.name


@pytest.fixture(scope="module")
def all_built_in() -> questions.Known:
    """Every text of the package that something is trained with, or that a model is asked for
    training text with.
    """
    words = questions.training_words(None)
    for path in sorted((PACKAGE / "data").rglob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            words += questions.words(line)
    for path in sorted((PACKAGE / "data").rglob("*.txt")):
        words += questions.words(path.read_text("utf-8"))
    return questions.Known(words)


@pytest.mark.parametrize("name", ["ifeval.jsonl", "blimp.jsonl"])
def test_no_training_text_holds_a_known_benchmark(name: str, all_built_in: questions.Known) -> None:
    """13 words in a row of a prompt, or of either sentence of a pair; a shorter one is looked up
    whole.

    The files are for measuring only and no part of this repository: MIS_MLX_KNOWN_DATA says where
    they are.
    """
    path = KNOWN_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: set MIS_MLX_KNOWN_DATA to the folder that holds {name}")
    asked = questions.file(path)
    wrong = [q._replace(right=1 - q.right) for q in asked.questions if q.options]

    shared = [q.context or q.answer for q in asked.questions if all_built_in.holds(q)]
    shared += [q.options[q.right] for q in wrong if all_built_in.holds(q)]

    assert len(asked.questions) > 500
    assert shared == []
