"""The command `evaluate`."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx.hardware import memory
from mis_mlx.judge.tasks import answering, task_registry
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import Done, last_line, sentence


def test_end_to_end(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]
) -> None:
    """A copy of the teacher has no KL and always agrees; a stranger of the same name does not; the
    table has both.
    """
    copy = shutil.copytree(llama.path, tmp_path / "a" / "model")
    stranger = tmp_path / "b" / "model"
    stranger.parent.mkdir()
    tiny.make(stranger, seed=3)
    flags = ("--data", text_folder, "--max-seq-length", 32, "--eval-windows", 3)
    done = command("evaluate", "--teacher", llama.path, "--students", copy, stranger, *flags)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)["held-out"]
    assert found["nll_a/model"] == found["nll_teacher"]
    assert abs(found["kl_a/model"]) < 1e-5
    assert found["top1_a/model"] == 1.0
    assert found["kl_b/model"] > 0.01
    assert found["top1_b/model"] < 0.9
    assert "| | teacher | a/model | b/model |" in table
    assert any("100.0% (too few)" in line for line in table)  # of 3 windows


QUESTIONS = 240


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory, llama: Checkpoint) -> Path:
    """A task that the tiny teacher knows by heart: what is right is what it finds likelier.

    Every option is a word of one token, so models of other random weights can but guess.
    """
    folder = tmp_path_factory.mktemp("quiz")
    rng = random.Random(0)
    vocabulary = json.loads((llama.path / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha())
    rows = []
    for n in range(QUESTIONS):
        options = rng.sample(words, 2)
        rows.append({"question": f"{n}?", "options": options, "answer": options[0]})
    path = folder / "by-heart.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIS_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        (task,) = task_registry.find([str(folder)], QUESTIONS).tasks
        knows = answering.scores(llama, "0" * 64, task, memory.budget(None))
    for row, first in zip(rows, knows, strict=True):
        row["answer"] = row["options"][0 if first else 1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_recovery_table(
    tmp_path: Path, llama: Checkpoint, quiz: Path, text_folder: Path, command: Callable[..., Done]
) -> None:
    """A copy recovers 100 % exactly, with KL 0; random weights recover 0 % within their interval;
    asked once only.
    """
    shutil.copytree(llama.path, tmp_path / "copy")
    tiny.make(tmp_path / "random", seed=7)
    flags = ["--teacher", llama.path, "--students", tmp_path / "copy", tmp_path / "random"]
    flags += ["--data", text_folder, "--max-seq-length", 32, "--eval-windows", 3]
    flags += ["--num-questions", QUESTIONS, "--tasks", quiz, "text", "--out", tmp_path / "out"]
    done = command("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    recovered = last_line(done)["recovered"]["by-heart"]
    assert recovered["copy"] == [1.0, 1.0, 1.0]
    assert -0.4 < recovered["random"][1] < 0 < recovered["random"][2] < 0.4
    assert last_line(done)["held_out"]["held-out"]["kl_copy"] == 0
    page = (tmp_path / "out" / "recovery.md").read_text()
    assert "| by-heart | 240 | 50.0% |" in page
    assert "| 100% [100%, 100%] |" in page
    assert page.partition("\n\n![")[0] in done.stdout
    found = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert found["sha256"]["teacher"] == found["sha256"]["copy"] != found["sha256"]["random"]
    assert str(tmp_path) not in json.dumps(found)
    again = command("evaluate", *flags)
    assert "3 of 3" in again.stderr and "3 of 3" not in done.stderr
    assert last_line(again)["recovered"] == last_line(done)["recovered"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tasks", "bad"), "quiz.jsonl line 1: the answer '4' .* 2 options"),
        (("--tasks", "logic", "--students", "other"), "tokenizer"),
        (("--out", "none"), "--tasks"),
        (("--dry-run",), "--tasks"),
    ],
)
def test_refusals(
    flags: tuple[object, ...],
    said: str,
    tmp_path: Path,
    llama: Checkpoint,
    in_process: Callable[..., Done],
) -> None:
    """Before any model is asked: a bad row, another tokenizer, flags that need others."""
    bad = {"question": "2 + 2?", "options": ["3", "5"], "answer": "4"}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "quiz.jsonl").write_text(json.dumps(bad))
    other = tiny.make(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    done = in_process("evaluate", "--teacher", llama.path, *flags, cwd=tmp_path)
    assert re.search(said, sentence(done))
    assert not (tmp_path / "none").exists()


def test_a_dry_run_counts_questions(llama: Checkpoint, in_process: Callable[..., Done]) -> None:
    """Of each task, beside what all contracts ask for."""
    flags = ("--tasks", "logic", "maths-written", "--num-questions", 7, "--dry-run")
    found = last_line(in_process("evaluate", "--teacher", llama.path, *flags))
    assert found["questions"] == {"logic": 7, "maths-written": 7}
