"""`evaluate --tasks answers`: tables first, nothing asked twice, the budget, students of fewer
tokens, refusals.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx import evaluate
from mis_mlx.hardware import memory
from mis_mlx.judge import answers, keep
from mis_mlx.judge.keep import Kept
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.models.opening import load
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line

PROMPTS = 36  # of which six are Polish


@pytest.fixture(autouse=True)
def few_tokens(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own, and answers of few tokens."""
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(answers, "GREEDY_TOKENS", 6)


@pytest.fixture
def chat(llama: Checkpoint, tmp_path: Path) -> Path:
    """The tiny llama with a chat template."""
    return tiny.chatting(llama.path, tmp_path / "chat")


def asked(*texts: str) -> list[Prompt]:
    """Prompts of one turn each."""
    return [Prompt(({"role": "user", "content": text},), "explain", "en") for text in texts]


@pytest.mark.thorough
def test_end_to_end(tmp_path: Path, chat: Path, in_process: Callable[..., Done]) -> None:
    """Answers come first, beside another task; a copy costs nothing above its teacher; asked once
    only.
    """
    copy = shutil.copytree(chat, tmp_path / "copy")
    other = tiny.chatting(tiny.make(tmp_path / "other", seed=3), tmp_path / "student")
    flags = ["--teacher", chat, "--students", copy, other, "--num-questions", PROMPTS]
    flags += ["--tasks", "logic", "answers", "--out", tmp_path / "out"]

    planned = in_process("evaluate", *flags[:-2], "--dry-run")
    done = in_process("evaluate", *flags)
    again = in_process("evaluate", *flags)

    assert done.returncode == 0, done.stderr
    assert last_line(planned)["questions"] == {"logic": PROMPTS, "answers": PROMPTS}
    assert last_line(planned)["seconds"] > 0
    found = last_line(done)["answers"]
    assert found["prompts"] == PROMPTS
    assert found["all"]["answers_excess_copy"] == 0
    assert found["all"]["answers_student"] > found["all"]["answers_teacher"]
    assert found["all"]["endless_student"] == 100
    assert set(found) == {"prompts", "all", "English", "Polish"}
    page = (tmp_path / "out" / "recovery.md").read_text()
    assert "| | teacher | copy | student |" in page
    assert page.partition("\n\n![")[0] in done.stdout
    assert json.loads((tmp_path / "out" / "recovery.json").read_text())["answers"] == found
    rows = run_folder.records(tmp_path / "out" / run_folder.ANSWERS)
    assert len(rows) == 3 * PROMPTS
    assert {row["model"] for row in rows} == {"teacher", "copy", "student"}
    assert last_line(again)["answers"]["all"] == pytest.approx(found["all"], abs=1e-3)
    assert "4 of 4" in again.stderr and "4 of 4" not in done.stderr


def test_the_teacher_alone(chat: Path, in_process: Callable[..., Done]) -> None:
    """Few prompts: one table for both languages."""
    done = in_process("evaluate", "--teacher", chat, "--tasks", "answers", "--num-questions", 4)

    assert done.returncode == 0, done.stderr
    assert "Answers in all languages to 4 held-out prompts" in done.stdout
    assert set(last_line(done)["answers"]) == {"prompts", "all"}


@pytest.mark.thorough
@pytest.mark.usefixtures("cpu_policy")  # its budget is for float32
def test_memory_stays_under_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that do not fit are streamed, and say the same."""
    few = asked("If", "Why is the sky blue?", "And then?")
    monkeypatch.setattr(answers, "prompts", lambda _: few)
    deep = tiny.chatting(tiny.make(tmp_path / "deep", num_hidden_layers=24), tmp_path / "teacher")
    small = tiny.chatting(
        tiny.make(tmp_path / "small", num_hidden_layers=20, seed=1), tmp_path / "student"
    )
    settings = evaluate.Settings(str(deep), (str(small),), tasks=("answers",), budget="24MiB")

    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()

    found = evaluate.run(settings)["answers"]

    assert mx.get_peak_memory() - before_bytes < 24 * 2**20 - memory.process_bytes(24 * 2**20)
    assert found["prompts"] == len(few)


def test_a_stopped_student_goes_on(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a line: only what is missing is asked, and the figures are the
    same.
    """
    teacher = load.open_checkpoint(chat)
    other = tiny.chatting(tiny.make(tmp_path / "other", seed=3), tmp_path / "student")
    student = load.open_checkpoint(other)
    prompts = asked("What is a for statement?", "If", "Why is the sky blue?")
    models = {"teacher": teacher, "student": student}
    limit = memory.budget(None)
    whole = answers.judged(models, prompts, limit)
    kept = answers._kept_of_student(student, None)
    for path in (kept.answers_path, kept.costs_path):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        assert len(lines) == 3
        path.write_text(lines[0] + lines[1][: len(lines[1]) // 2], "utf-8")
    missing = list[int]()
    real = answers.greedy

    def watched(
        model: Checkpoint, left: list[Prompt], *rest: object, **more: object
    ) -> list[Answer]:
        missing.append(len(left))
        return real(model, left, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "greedy", watched)

    again = answers.judged(models, prompts, limit)
    third = answers.judged(models, prompts, limit)

    assert whole is not None
    assert again is not None
    assert third is not None
    assert missing == [2, 0]
    assert again.greedy == third.greedy == whole.greedy
    for one, two in zip(whole.rows, third.rows, strict=True):
        assert one.value == pytest.approx(two.value, abs=1e-3)
    assert answers.plan(models, prompts, limit) is None
    assert answers.plan(models, [*prompts, *asked("And why?")], limit) is not None


def test_foreign_lines_are_passed_over() -> None:
    """No JSON, no object, an answer that is none, a cost that is no number; the later of two
    records counts.
    """
    (prompt,) = asked("If")
    kept = Kept("a" * 64, "b" * 64)
    kept.keep_answer(prompt, Answer("one", ended=False))
    kept.keep_answer(prompt, Answer("zwei – ż", ended=True))
    lines = [
        "[1, 2]",
        '{"prompt_sha256": "x", "greedy": 3}',
        '{"nats": "1", "tokens": 2}',
        '{"nats": NaN, "tokens": 1}',
    ]
    for path in (kept.answers_path, kept.costs_path):
        DISK.append(path, "\n".join(lines))
    key = keep.cost_key(prompt, Answer("If", ended=True))
    DISK.append(
        kept.costs_path,
        json.dumps({"prompt_sha256": key[0], "answer_sha256": key[1], "nats": 2.5}),
    )

    assert kept.answers() == {prompt.sha256: Answer("zwei – ż", ended=True)}
    assert kept.costs() == {key: 2.5}
    assert keep.cost_key(prompt, Answer("If", ended=False)) != key


def test_no_prompt_for_all_is_a_sentence(llama: Checkpoint, chat: Path, tmp_path: Path) -> None:
    """A student whose template refuses everything."""
    refusing = shutil.copytree(llama.path, tmp_path / "refusing")
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('never') }}")

    settings = evaluate.Settings(str(chat), (str(refusing),), tasks=("answers",), num_questions=4)
    with pytest.raises(MisError):
        evaluate.run(settings)
