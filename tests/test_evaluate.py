"""The command `evaluate`, and the recovery table: shares and intervals by hand, and sentences that
say what the numbers can bear.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.hardware import memory
from mis_mlx.judge.recovery_table import Outcome, markdown
from mis_mlx.judge.tasks import answering, task_registry
from mis_mlx.maths.stats import interval, recovery
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import Done, last_line, sentence

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
    """A copy recovers 100 % exactly, with KL 0; random weights in a folder of the same name recover
    0 % within their interval; asked once only.
    """
    copy = shutil.copytree(llama.path, tmp_path / "a" / "model")
    (tmp_path / "b").mkdir()
    stranger = tiny.make(tmp_path / "b" / "model", seed=7)
    flags = ["--teacher", llama.path, "--students", copy, stranger]
    flags += ["--data", text_folder, "--max-seq-length", 32, "--eval-windows", 3]
    flags += ["--num-questions", QUESTIONS, "--tasks", quiz, "text", "--out", tmp_path / "out"]
    done = command("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    recovered = last_line(done)["recovered"]["by-heart"]
    assert recovered["a/model"] == [1.0, 1.0, 1.0]
    assert -0.4 < recovered["b/model"][1] < 0 < recovered["b/model"][2] < 0.4
    losses = last_line(done)["held_out"]["held-out"]
    assert losses["nll_a/model"] == losses["nll_teacher"]
    assert losses["kl_a/model"] == 0 and losses["top1_a/model"] == 1.0
    assert losses["kl_b/model"] > 0.01 and losses["top1_b/model"] < 0.9
    page = (tmp_path / "out" / "recovery.md").read_text()
    assert "| by-heart | 240 | 50.0% |" in page
    assert "| 100% [100%, 100%] |" in page
    assert page.partition("\n\n![")[0] in done.stdout
    found = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert found["sha256"]["teacher"] == found["sha256"]["a/model"] != found["sha256"]["b/model"]
    assert str(tmp_path) not in json.dumps(found)
    again = command("evaluate", *flags)
    assert "3 of 3" in again.stderr and "3 of 3" not in done.stderr
    assert last_line(again)["recovered"] == last_line(done)["recovered"]


def test_another_tokenizer_is_refused(
    tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]
) -> None:
    """Before any model is asked."""
    other = tiny.make(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    flags = ("--teacher", llama.path, "--students", other, "--tasks", "logic")
    assert "tokenizer" in sentence(command("evaluate", *flags))


def test_a_dry_run_counts_questions(llama: Checkpoint, command: Callable[..., Done]) -> None:
    """Of each task, beside what all contracts ask for."""
    flags = ("--tasks", "logic", "maths-written", "--num-questions", 7, "--dry-run")
    found = last_line(command("evaluate", "--teacher", llama.path, *flags))
    assert found["questions"] == {"logic": 7, "maths-written": 7}


N = 100


def outcome(task: str = "sums", chance: float = 0.5, **right: int) -> Outcome:
    """A task of 100 questions, the first `right` of which each model answers."""
    marks = {name: (np.arange(N) < count).astype(float) for name, count in right.items()}
    return Outcome(
        task=task,
        about="made for a test",
        marks=marks,
        chance=np.full(N, chance),
        constant=(0.5, "option 1"),
        sha256="0" * 64,
    )


def test_recovery_by_hand() -> None:
    """(70 % - 50 %) / (90 % - 50 %) is a half; the teacher recovers all of itself, exactly and in
    every draw.
    """
    o = outcome(teacher=90, student=70)
    value, low, high = recovery(o.marks["student"], o.teacher, o.chance)
    assert value == pytest.approx(0.5)
    assert 0.2 < low < 0.5 < high < 0.8
    assert o.recovered("teacher") == (1.0, 1.0, 1.0)


def test_the_page_says_how_models_were_asked() -> None:
    """In one way, or each in its own; the marks of both stand in one table."""
    o = outcome(teacher=90, student=70)
    same = o._replace(ways={"teacher": "as plain text", "student": "as plain text"})
    assert markdown([same]).count("as plain text") == 1
    ways = {"teacher": "through its chat template", "student": "as plain text"}
    apart = o._replace(ways=ways)
    said = markdown([apart])
    assert said.count("as plain text") == said.count("through its chat template") == 1
    assert apart.json()["models"]["teacher"]["asked"] == "through its chat template"
    assert "asked" not in o.json()["models"]["teacher"]


def test_the_interval_is_paired() -> None:
    """A student that loses two of the teacher's answers is judged by these two, not by the luck of
    the questions.
    """
    o = outcome(teacher=80, student=78)
    _, low, high = interval(o.marks["student"] - o.teacher)
    assert -0.06 < low < 0
    assert high <= 0
    apart = interval(o.teacher)
    assert high - low < (apart[2] - apart[1]) / 2
    _, low, high = recovery(o.marks["student"], o.teacher, o.chance)
    assert 0.8 < low < high <= 1


def test_nothing_is_recovered_of_a_teacher_who_knows_nothing() -> None:
    """A dash, and a sentence; nobody divides by noise."""
    o = outcome(teacher=53, student=60)
    assert o.recovered("student") is None
    assert o.json()["models"]["student"]["recovery"] is None
    assert "| sums | – |" in markdown([o])


def test_the_table_has_chance_and_the_constant() -> None:
    """n, chance, U Zośki, uniform, then the models with ± half of the interval, or with what may be
    where no spread was seen: of 100 answers, all wrong, 3 % can be right.
    """
    page = markdown([outcome(teacher=90, student=70)])
    assert "| | n | chance | U Zośki | uniform | teacher | student |" in page
    row = next(line for line in page.splitlines() if line.startswith("| sums | 100 "))
    assert re.fullmatch(
        r"\| sums \| 100 \| 50.0% \| 50.0% \| – \| 90.0% ± [56].\d% \| 70.0% ± [89].\d% \|", row
    )
    assert re.search(r"^\| sums \| 50% \[\d+%, \d+%\] \|$", page, re.M)
    assert "± 0" not in page
    certain = markdown([outcome(teacher=90, student=0)])
    assert "± 0" in certain and "3%" in certain


def test_differences_are_told_from_noise() -> None:
    """A clear loss, one that may be none, a gain that luck explains, a clear one, and a constant as
    good as the teacher: each has a sentence of its own about its task.
    """

    def said(**given: Any) -> str:
        rows = markdown([outcome("bus", **given)]).splitlines()
        return "\n".join(line for line in rows if line.startswith("- ") and " bus" in line)

    lost = said(teacher=90, student=60)
    same = said(teacher=80, student=80)
    lucky = said(teacher=80, student=81)
    clear = said(teacher=70, student=95)
    constant = said(chance=0.25, teacher=51, student=30)
    assert len({lost, same, lucky, clear, constant, ""}) == 6
    assert "+1.0" in lucky
    assert "option 1" in constant and "option 1" not in lost


def test_what_counting_tokens_gives_is_not_knowledge() -> None:
    """A teacher who does as well as a model to which all tokens are equally likely has nothing that
    can be recovered, however far above chance both are; one who does better has.
    """
    o = outcome(chance=0.25, teacher=60, student=58)
    counted = o._replace(uniform=np.array([0.0, 1.0, 1.0, 0.5] * 25))
    assert o.recovered("student")
    assert counted.recovered("student") is None
    assert "| sums | 100 | 25.0% | 50.0% | 62.5% |" in markdown([counted])
    assert "| sums | – |" in markdown([counted])
    assert counted.json()["uniform"] == 0.625
    assert o.json()["uniform"] is None
    assert o._replace(uniform=np.full(N, 0.3)).recovered("student") == o.recovered("student")
