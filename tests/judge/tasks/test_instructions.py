"""Answers to instructions: IFEval's accuracies, what a row must hold, the checker's process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx import evaluate
from mis_mlx.hardware import child_process, memory
from mis_mlx.judge import recovery_table
from mis_mlx.judge.tasks import answering, instructions, questions, task_answers, task_registry
from mis_mlx.judge.tasks.instructions import Instruction, Levels
from mis_mlx.types import Checkpoint, MisError
from tests.judge.tasks.test_questions import write

NO_COMMA = "punctuation:no_comma"
TITLE = "detectable_format:title"
WORDS = "length_constraints:number_words"
ROW = {
    "key": 1,
    "prompt": "Write about sheep. No commas, and a title in double angular brackets.",
    "instruction_id_list": [NO_COMMA, TITLE],
    "kwargs": [{}, {}],
}
SHORT = {
    "prompt": "Write about sheep in at least five words.",
    "instruction_id_list": [WORDS],
    "kwargs": [{"relation": "at least", "num_words": 5, "num_bullets": None}],
}
NO_COMMAS = {"instruction_id_list": [NO_COMMA], "kwargs": [{}]}

needs_package = pytest.mark.skipif(
    find_spec(instructions.PACKAGE) is None,
    reason=f"if-verifiable is not here: {instructions.INSTALL}",
)


pytestmark = pytest.mark.usefixtures("cache")


def test_both_accuracies_and_their_mean_by_hand() -> None:
    """Of 1, 2, 3 and 2 instructions: two prompts are followed whole, and 5 of 8 instructions."""
    followed = [1, 2, 2, 0]
    counts = [1, 2, 3, 2]

    levels = instructions.levels(followed, counts)
    marks = instructions.marks(followed, counts)

    assert levels == Levels(prompt_strict=2 / 4, inst_strict=5 / 8)
    assert levels.mean == 0.5625
    # The weight of an instruction is 4 / 8: marks are (1 + 0.5) / 2, (1 + 1) / 2, (0 + 1) / 2 and
    # 0.
    assert marks == [0.75, 1.0, 0.5, 0.0]
    assert np.mean(marks) == levels.mean
    outcome = recovery_table.Outcome(
        "ifeval", "", {"teacher": np.array(marks)}, np.zeros(4), levels={"teacher": levels}
    )
    assert "prompt 50.0%, instruction 62.5%, mean 56.2%" in recovery_table.markdown([outcome])
    found = outcome.json()["models"]["teacher"]
    assert (found["prompt_strict"], found["inst_strict"]) == (0.5, 0.625)
    assert found["mean"] == found["score"][0] == 0.5625


def test_what_cannot_check_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any model is asked: no package, one that breaks, and where a question needs it, one
    without what splits sentences.
    """
    plain = [Instruction(NO_COMMA, {})]
    counting = [Instruction("length_constraints:number_sentences", {})]

    def broken(*_: Any) -> None:
        raise child_process.NoAnswer("ImportError: no nltk")

    monkeypatch.setattr(instructions, "find_spec", lambda name: None)
    with pytest.raises(MisError, match="if-verifiable"):
        instructions.check("ifeval", [plain])
    monkeypatch.setattr(instructions, "find_spec", lambda name: name)
    monkeypatch.setattr(child_process, "ask", lambda *_: {"problems": [], "splitter": False})
    assert instructions.check("ifeval", [plain]) == []
    with pytest.raises(MisError, match="1 of 2 .*punkt_tab"):
        instructions.check("ifeval", [plain, counting])
    monkeypatch.setattr(child_process, "ask", broken)
    with pytest.raises(MisError, match="ImportError: no nltk"):
        instructions.check("ifeval", [plain])


def test_a_row_becomes_a_question_that_is_written(tmp_path: Path) -> None:
    """The prompt alone is read; null arguments are left out; chance is not known."""
    task = questions.file(write(tmp_path / "ifeval.jsonl", ROW, SHORT))
    assert (task.kind, task.max_tokens) == ("instructions", 512)
    first, second = task.questions
    assert first.context == ROW["prompt"]
    assert first.instructions == (Instruction(NO_COMMA, {}), Instruction(TITLE, {}))
    assert second.instructions == (Instruction(WORDS, {"relation": "at least", "num_words": 5}),)
    assert first.chance == 0.0
    assert questions.best_constant_answer(task) is None


@needs_package
def test_instructions_that_nobody_can_check_are_refused(tmp_path: Path) -> None:
    """Unknown ones, and arguments that a checker does not take, by the real package."""
    unknown = {**ROW, "instruction_id_list": [NO_COMMA, "punctuation:no_vowels"]}
    odd = {**SHORT, "kwargs": [{"sheep": 3}]}
    path = write(tmp_path / "ifeval.jsonl", ROW, unknown, odd)

    with pytest.raises(MisError, match="2 rows cannot be used") as refused:
        task_registry.find([str(path)], 10)

    assert "ifeval question 2" in str(refused.value) and "no_vowels" in str(refused.value)
    assert f"ifeval question 3: {WORDS}" in str(refused.value)


@needs_package
def test_what_is_followed_by_the_real_package() -> None:
    """Both, one and none of two instructions; nothing follows from an empty text. Loosely, a comma
    in the first or last line alone does not count, one in the middle does.
    """
    task = questions.task("ifeval", [ROW] * 4, "")
    texts = ["<<Sheep>> They eat grass.", "Sheep eat grass.", "Grass, grass", " "]
    assert task_answers.count_followed(task, range(4), texts) == [2, 1, 0, 0]
    task = questions.task("ifeval", [SHORT | NO_COMMAS] * 3, "")
    texts = [
        "Sure, here it is:\nSheep eat grass",
        "Sheep eat\nGrass, grass",
        "1\n2, 3\n4",
    ]
    assert task_answers.count_followed(task, range(3), texts) == [0, 0, 0]
    assert task_answers.count_followed(task, range(3), texts, loosely=True) == [1, 1, 0]


def test_an_answer_that_breaks_the_checker_follows_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others of its batch keep their marks."""
    checker = tmp_path / "checker.py"
    checker.write_text(
        "def followed(completions):\n    return [{'good': 2}[text] for text in completions]\n"
    )
    monkeypatch.setattr(instructions, "__name__", str(checker))
    task = questions.task("ifeval", [ROW, ROW], "")

    marks = task_answers.count_followed(task, range(2), ["good", "odd"])

    assert marks == [2.0, 0.0]
    assert "ifeval question 2" in capsys.readouterr().err


def test_a_model_writes_and_is_marked(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are kept with what they follow, give both accuracies, and are asked once."""
    task = questions.task("ifeval", [ROW, SHORT, ROW], "").chosen(3)
    task = questions.replace(task, max_tokens=4)
    right = {0: 2.0, 1: 0.0, 2: 1.0}
    # Answers are judged in the order in which they end.
    monkeypatch.setitem(
        task_answers.JUDGES,
        "instructions",
        ("followed", lambda _task, numbers, _texts: [right[number] for number in numbers]),
    )
    limit = memory.budget(None)

    marks = answering.scores(llama, "0" * 64, task, limit)
    levels = answering.levels("0" * 64, task)

    assert levels == Levels(prompt_strict=1 / 3, inst_strict=3 / 5)
    assert marks.mean() == pytest.approx(levels.mean)
    kept = answering.read(answering.answers_path("0" * 64, task.sha256))
    assert [kept[n]["followed"] for n in range(3)] == [2.0, 0.0, 1.0]
    assert answering.plan(llama, "0" * 64, task, limit) is None
    quiz = questions.task("quiz", [{"prompt": "1 + 1?", "answer": "2"}], "")
    assert answering.levels("0" * 64, quiz) is None


@needs_package
def test_chance_and_the_best_constant_are_what_their_texts_earn() -> None:
    """`ok` follows the no comma and no title of the first row, and is too short for the second."""
    task = questions.task("ifeval", [ROW, SHORT], "")

    chance = answering.chance(task)
    constant = answering.best_constant(task)

    # An instruction has the weight 2 / 3: one of three followed, no prompt whole.
    assert chance.tolist() == pytest.approx([1 / 3, 0.0])
    assert constant == (pytest.approx(1 / 6), instructions.FORMATTED_ANSWER)


@needs_package
def test_end_to_end(
    tmp_path: Path,
    llama: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both files by path, a teacher that babbles: a table, and both accuracies in the result."""
    monkeypatch.setattr(questions, "INSTRUCTION_TOKENS", 8)
    pairs = [{"good": f"{n} dogs bark.", "bad": f"{n} dogs barks."} for n in range(3)]
    files = write(tmp_path / "ifeval.jsonl", ROW, SHORT), write(tmp_path / "blimp.jsonl", *pairs)
    settings = evaluate.Settings(
        teacher=str(llama.path), tasks=tuple(map(str, files)), num_questions=10
    )

    result = evaluate.run(settings)

    page = capsys.readouterr().out
    assert set(result["recovered"]) == {"ifeval", "blimp"}
    assert set(result["instructions"]) == {"ifeval"}
    accuracies = result["instructions"]["ifeval"]["teacher"]
    assert accuracies["mean"] == (accuracies["prompt_strict"] + accuracies["inst_strict"]) / 2
    assert "| blimp" in page
