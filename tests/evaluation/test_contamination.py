"""Questions that share words with the training text are counted, by hand-made overlaps."""

from __future__ import annotations

import json
from pathlib import Path

from mis_mlx.evaluation import questions

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
    assert {"text", "prompt", "completion", "message"} <= set(found) and "secret" not in found


def test_the_built_in_training_text_is_known() -> None:
    """Thirteen words of the manual of Python are found in it, and not backwards."""
    said = questions.training_words(None)
    known = questions.Known(said)
    assert len(said) > 100_000
    run = said[5000:5020]
    assert known.overlap(task(" ".join(run))) == (1, 1) and known.overlap(task(" ".join(run[::-1]))) == (0, 1)
