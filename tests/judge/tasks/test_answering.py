"""One model, one task: marks that are kept, go on after a stop, and do not depend on the budget."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.judge.tasks import answering, questions, task_answers
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.types import Budget, Checkpoint, MisError
from tests import tiny

MIB = 2**20


pytestmark = pytest.mark.usefixtures("cache")


def quiz(count: int, **more: Any) -> questions.Task:
    """Sums with two to four options; some are longer than others."""
    rng = random.Random(0)
    rows = []
    for n in range(count):
        options = rng.sample([str(k) for k in range(10, 1000, 7)], 2 + n % 3)
        rows.append(
            {
                "question": f"How much is {n} plus {'1 + ' * (n % 20)}1?",
                "options": options,
                "answer": options[n % 2],
            }
        )
    return questions.task("quiz", rows, "", **more)


def likelihoods(checkpoint: Checkpoint, task: questions.Task) -> list[list[float]]:
    """What is kept for it."""
    found = answering.read(answering.answers_path(answering.sha256(checkpoint), task.sha256))
    return [found[n]["ll"] for n in range(len(task.questions))]


def test_answers_are_kept_and_used(llama: Checkpoint) -> None:
    """A second look asks nothing; a mark is of the likeliest option, as it is kept. Killed after
    ten answers, in the middle of a line, a run asks the others, and nothing is lost.
    """
    task = quiz(30)
    sha256 = answering.sha256(llama)
    limit = memory.budget(None)
    path = answering.answers_path(sha256, task.sha256)
    assert answering.plan(llama, sha256, task, limit) is not None
    first = answering.scores(llama, sha256, task, limit)
    kept = likelihoods(llama, task)
    pairs = zip(kept, task.questions, strict=True)
    right = [float(np.argmax(ll) == question.right) for ll, question in pairs]
    assert first.tolist() == right
    assert 0 < sum(right) < 30
    assert answering.plan(llama, sha256, task, limit) is None
    before = path.read_bytes()
    assert answering.scores(llama, sha256, task, limit).tolist() == right
    assert path.read_bytes() == before

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:10]) + lines[10][: len(lines[10]) // 2])
    assert len(answering.unanswered(sha256, task)[2]) == 20
    assert answering.scores(llama, sha256, task, limit).tolist() == right
    asked_again = {json.loads(line)["n"] for line in path.read_text().splitlines()[11:]}
    assert asked_again == set(range(30)) - {json.loads(line)["n"] for line in lines[:10]}
    for one, other in zip(likelihoods(llama, task), kept, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    odd = {"n": 0, "text": "one\u2028two\x85three"}  # U+2028 ends a line for Python, not for JSON
    path.write_text(json.dumps(odd, ensure_ascii=False) + "\n", "utf-8")
    assert answering.read(path) == {0: odd}


@pytest.mark.usefixtures("cpu_policy")  # its budgets are for float32
def test_a_small_budget_gives_the_same_marks(llama: Checkpoint) -> None:
    """Blocks are read again for every part where they do not fit; the numbers stay."""
    task = quiz(40)
    sha256 = answering.sha256(llama)
    text = model_of(llama).text_bytes
    little = Budget(memory.needed_bytes(int(6.48 * MIB) + text))
    much = Budget(1000 * MIB)
    poor = answering.plan(llama, sha256, task, little)
    rich = answering.plan(llama, sha256, task, much)
    assert poor
    assert rich
    assert poor.peak_bytes <= memory.needed_bytes(7 * MIB + text)
    assert poor.read_bytes > 5 * rich.read_bytes == 5 * llama.nbytes
    marks = answering.scores(llama, sha256, task, little)
    exact = likelihoods(llama, task)
    answering.answers_path(sha256, task.sha256).unlink()
    assert answering.scores(llama, sha256, task, much).tolist() == marks.tolist()
    for one, other in zip(likelihoods(llama, task), exact, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    with pytest.raises(MisError, match="1 MiB"):
        answering.plan(llama, "0" * 64, task, Budget(MIB))


def test_another_model_task_version_or_type_has_answers_of_its_own(
    tmp_path: Path, llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight, the tokenizer, a question, code or type changed: another place. A copy: none."""
    one = load.open_checkpoint(tiny.make(tmp_path / "one"))
    other = load.open_checkpoint(tiny.make(tmp_path / "other", seed=1))
    assert answering.sha256(one) == answering.sha256(llama) != answering.sha256(other)
    (one.path / "tokenizer.json").write_text((one.path / "tokenizer.json").read_text() + " ")
    assert answering.sha256(load.open_checkpoint(one.path)) != answering.sha256(llama)
    ended = load.open_checkpoint(tiny.make(tmp_path / "ended"))
    (ended.path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert answering.sha256(ended) != answering.sha256(llama)
    assert quiz(30).sha256 != quiz(31).sha256
    before = answering.sha256(llama)
    monkeypatch.setattr(answering, "VERSION", 1)
    assert answering.sha256(llama) != before
    monkeypatch.setattr(answering, "VERSION", 2)
    monkeypatch.setenv(precision.POLICY, {"cpu": "metal", "metal": "cpu"}[precision.policy()])
    assert answering.sha256(llama) != before


@pytest.mark.usefixtures("cpu_policy")
def test_a_chat_model_is_asked_through_its_template(tmp_path: Path, llama: Checkpoint) -> None:
    """An option is the reply to the question as a user's turn; as text it is what base models get,
    and both are kept side by side.
    """
    chat = load.open_checkpoint(tiny.talking(tmp_path / "chat"))
    task = quiz(12)
    limit = memory.budget(None)
    answering.scores(chat, answering.sha256(chat), task, limit)
    asked = likelihoods(chat, task)
    answering.scores(chat, answering.sha256(chat), task.as_text(), limit)
    as_text = likelihoods(chat, task.as_text())

    model = load.resident_model(chat, mx.float32)
    tokenizer = load.tokenizer(chat.path)
    question = task.questions[3]
    turn = tokenizer.encode(f"user\n{question.asked}<|endoftext|>\nassistant\n")
    reply = tokenizer.encode(question.options[1].strip())
    logits = np.array(model(mx.array([[*turn, *reply]]))[0], np.float64)
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    places = np.arange(len(reply)) + len(turn) - 1
    assert asked[3][1] == pytest.approx(logps[places, reply].sum(), abs=1e-3)
    assert asked[3][1] != pytest.approx(as_text[3][1], abs=1e-3)

    assert answering.way_of(chat, task) == answering.CHAT
    assert answering.way_of(llama, task) == answering.PLAIN
    assert answering.way_of(chat, task.as_text()) is None
    _, option_ids = answering._encoded_question(load.tokenizer(llama.path), question)
    plain = task.as_text().questions[3]
    assert answering._encoded_question(load.tokenizer(llama.path), plain)[1] == option_ids


def test_options_of_unlike_length_are_compared_per_character(llama: Checkpoint) -> None:
    """lm-eval's acc_norm: the space before an option is none of its characters."""
    task = quiz(30, per_character=True)
    found = answering.scores(llama, "0" * 64, task, memory.budget(None))
    kept = answering.read(answering.answers_path("0" * 64, task.sha256))
    for n, question in enumerate(task.questions):
        characters = np.array([len(option.strip()) for option in question.options])
        per_character = np.array(kept[n]["ll"]) / characters
        likeliest = int(np.argmax(per_character))
        assert found[n] == (likeliest == question.right)


def test_a_uniform_model_takes_the_option_of_fewest_tokens(llama: Checkpoint) -> None:
    """Two tokens against one, a tie; per character, one of two letters against one of more."""
    asked = [
        ("the", ("if if", "if"), 1),
        ("the", ("if if", "if"), 0),
        ("the", ("if", "is", "if if"), 0),
    ]
    made = []
    for context, words, right in asked:
        options = tuple(f" {word}" for word in words)
        made.append(questions.Question(context, options[right], options, right))
    found = answering.uniform(llama, questions.Task("t", "choice", tuple(made), ""))
    assert found is not None
    assert found.tolist() == [1.0, 0.0, 0.5]
    vocabulary = json.loads((llama.path / "tokenizer.json").read_text())["model"]["vocab"]
    begins_with_space = [token[1:] for token in vocabulary if token[0] == "Ġ"]
    word = max(filter(str.isalpha, begins_with_space), key=len)
    long = questions.Question("the", f" {word}", (" if", f" {word}"), 1)
    per_character = questions.Task("t", "choice", (long,), "", per_character=True)
    by_letter = answering.uniform(llama, per_character)
    assert by_letter is not None
    assert by_letter.tolist() == [1.0]
    checked = questions.Task("t", "checked", (questions.Question("1?", "1"),), "")
    assert answering.uniform(llama, checked) is None


def test_a_question_that_cannot_be_asked_is_named_before_any_is(
    llama: Checkpoint, tmp_path: Path
) -> None:
    """The model reads 512 tokens; nor one that the chat template refuses."""
    task = quiz(4)
    long = task.questions[2]._replace(context="if the loop is true " * 300)
    task = replace(task, questions=(*task.questions[:2], long, task.questions[3]))
    with pytest.raises(MisError, match=r"quiz question 3 takes \d+ tokens, .* 512"):
        answering.plan(llama, "0" * 64, task, memory.budget(None))
    refusal = "{{ raise_exception('no users here') }}"
    strict = load.open_checkpoint(tiny.chatting(llama.path, tmp_path / "strict", refusal))
    with pytest.raises(MisError, match="quiz question 1: .*no users here"):
        answering.plan(strict, "0" * 64, quiz(4), memory.budget(None))


def test_written_answers_are_judged_by_their_last_line(llama: Checkpoint) -> None:
    """Right, wrong and none, by the verifier that training uses; a model that babbles has 0."""
    rows = [{"prompt": "How much is 2 + 2?", "answer": "4", "language": "en"}] * 3
    task = replace(questions.task("written", rows, ""), max_tokens=8)
    texts = ["2 + 2 = 4\nAnswer: 4", "Answer: 5", "who knows"]
    assert task_answers.marks_of_checked(task, range(3), texts) == [1.0, 0.0, 0.0]
    marks = answering.scores(llama, "0" * 64, task, memory.budget(None))
    assert marks.tolist() == [0, 0, 0]
    kept = answering.read(answering.answers_path("0" * 64, task.sha256))
    assert len({row["text"] for row in kept.values()}) == 1
    assert kept[0]["text"]
