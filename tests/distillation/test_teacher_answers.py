"""A teacher answers prompts: what is usable is kept, a run that was stopped goes on, second turns
follow the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.data import prompts
from mis_mlx.data.prompts import Prompt
from mis_mlx.distillation import teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.judge import answers
from mis_mlx.judge.prompts import Answer
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.types import Budget, Checkpoint, MisError
from tests import tiny
from tests.conftest import mostly_thorough

MIB = 2**20


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny teacher whose answers end."""
    return load.open_checkpoint(tiny.talking(tmp_path_factory.mktemp("chat") / "teacher"))


@pytest.fixture(autouse=True)
def three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three."""
    monkeypatch.setattr(teacher_answers, "AT_ONCE", (3,))


ASKED = prompts.train(10)
HOW = teacher_answers.WritingSettings(ASKED, max_tokens=12)
TWO_TURNS = [
    Prompt("second turn", "en", (f"What is a {thing}?", "Why?"))
    for thing in ("cat", "dog", "fox", "cow")
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a file of conversations holds."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


Reply = tuple[answers.Prompt, Answer]


def watched(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**9) -> list[Reply]:
    """Every prompt that is answered from now on, and its answer; after so many a kill."""
    seen = list[Reply]()
    real = answers.answered

    def answered(
        writer: Any, tokenizer: Any, asked: Sequence[answers.Prompt], *rest: Any, **how: Any
    ) -> Iterator[tuple[int, Answer]]:
        for number, answer in real(writer, tokenizer, asked, *rest, **how):
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append((asked[number], answer))
            yield number, answer

    monkeypatch.setattr(answers, "answered", answered)
    return seen


def test_what_is_kept_is_what_says_something(
    chat: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row for every conversation that is kept, in the order of the prompts; nothing else is left
    in the folder.
    """
    said = watched(monkeypatch)
    one_turn = [prompt for prompt in prompts.train(30) if len(prompt.turns) == 1]
    out = tmp_path / "new" / "answers.jsonl"

    kept = teacher_answers.write(chat, replace(HOW, prompts=one_turn), out, memory.budget(None))

    texts = {
        prompt.messages[0]["content"]: (prompt, teacher_answers.kept_text(answer))
        for prompt, answer in said
    }
    in_order = [texts[prompt.turns[0]] for prompt in one_turn]
    good = [(prompt, text) for prompt, text in in_order if text]
    assert 0 < kept == len(good) <= len(said) == len(one_turn)
    wanted = [[*prompt.messages, {"role": "assistant", "content": text}] for prompt, text in good]
    assert [row["messages"] for row in rows_of(out)] == wanted
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]
    assert f"teacher's answers {len(one_turn)}/{len(one_turn)}" in capsys.readouterr().err


def test_what_is_kept_by_hand() -> None:
    """Nothing of loops and of what says nothing; of an answer that was cut off its whole sentences,
    or all of one.
    """
    assert (
        teacher_answers.kept_text(Answer(" A cat is an animal.\n", ended=True))
        == "A cat is an animal."
    )
    assert teacher_answers.kept_text(
        Answer("It is “big.” It eats 3.5 kg. And it", ended=False)
    ) == ("It is “big.” It eats 3.5 kg.")
    assert teacher_answers.kept_text(Answer("A cat is an", ended=False)) == "A cat is an"
    assert teacher_answers.kept_text(Answer(" …\n", ended=True)) == ""
    assert teacher_answers.kept_text(Answer("I'm not sure. " * 30, ended=True)) == ""


@pytest.mark.parametrize("done", mostly_thorough([0, 1, 8], 1))
def test_a_killed_run_goes_on(
    chat: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """After so many answers, and in the middle of the next one's line, with another budget: no
    prompt is answered twice, and the file is the same to the byte.
    """
    limit = memory.budget(None)
    with monkeypatch.context() as patch:
        wanted = watched(patch)
        teacher_answers.write(chat, HOW, tmp_path / "whole.jsonl", limit)
    out = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before = watched(patch, stop_after=done)
        teacher_answers.write(chat, HOW, out, limit)
    part = tmp_path / ".answers.jsonl.part"
    assert part.exists()
    assert not out.exists()
    with part.open("a") as file:
        file.write('{"turn": 0, "nu')
    monkeypatch.setattr(teacher_answers, "AT_ONCE", (2,))
    seen = watched(monkeypatch)

    teacher_answers.write(chat, HOW, out, limit)

    assert len(before) == done
    asked = [prompt.messages for prompt, _ in [*before, *seen]]
    assert sorted(map(str, asked)) == sorted(str(prompt.messages) for prompt, _ in wanted)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_what_was_begun_otherwise_begins_anew(
    chat: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed, other prompts, another teacher or another template of the same one: nothing of
    the part that is there is used.
    """
    limit = memory.budget(None)
    out = tmp_path / "answers.jsonl"
    other = load.open_checkpoint(tiny.talking(tmp_path / "other", seed=1))
    spoken = load.open_checkpoint(tiny.talking(tmp_path / "spoken"))
    (spoken.path / "chat_template.jinja").write_text(f"{tiny.CHAT_TEMPLATE} ")
    cases = [
        (spoken, HOW),
        (chat, replace(HOW, seed=1)),
        (chat, replace(HOW, prompts=ASKED[1:])),
        (chat, replace(HOW, temperature=0.5)),
        (other, HOW),
    ]
    for teacher, how in cases:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            watched(patch, stop_after=2)
            teacher_answers.write(chat, HOW, out, limit)
        with monkeypatch.context() as patch:
            seen = watched(patch)
            teacher_answers.write(teacher, how, out, limit)
        firsts = [prompt for prompt, _ in seen if len(prompt.messages) == 1]
        assert len(firsts) == len(how.prompts)


def smallest(teacher: Checkpoint, how: teacher_answers.WritingSettings) -> Budget:
    """The smallest budget in which this teacher writes."""
    m = model_of(teacher)
    for nbytes in range(memory.PROCESS_BYTES, 2**30, 2**14):
        try:
            teacher_answers.plan(m, how, Budget(nbytes))
        except MisError:
            continue
        return Budget(nbytes)
    raise AssertionError


@pytest.mark.thorough
@pytest.mark.usefixtures("cpu_policy")
def test_later_turns_do_not_depend_on_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole in memory or read from disk, alone or beside others whose answers end earlier: what a
    turn draws is decided by its prompt and its number.
    """
    deep = load.open_checkpoint(tiny.talking(tmp_path / "deep", num_hidden_layers=16))
    many = [
        Prompt("second turn", "en", (f"What is {number}?", "Why?", "Really?"))
        for number in range(6)
    ]
    how = replace(HOW, prompts=many)
    files = list[bytes]()
    for at_once, is_streamed in ((6, False), (4, False), (1, False), (4, True)):
        monkeypatch.setattr(teacher_answers, "AT_ONCE", (at_once,))
        limit = smallest(deep, how) if is_streamed else memory.budget(None)
        plan = teacher_answers.plan(model_of(deep), how, limit)
        assert is_streamed == (plan.headroom_bytes is not None)
        out = tmp_path / f"{len(files)}.jsonl"
        teacher_answers.write(deep, how, out, limit)
        files.append(out.read_bytes())

    assert len(set(files)) == 1
    assert max(len(row["messages"]) for row in rows_of(out)) >= 4


def test_a_second_turn_follows_the_teachers_own_first_answer(
    chat: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the conversation so far; where its first answer says nothing it is not asked again;
    where the second says nothing, the first stays; one that was cut off ends the conversation.
    """
    said = {
        "What is a cat?": "An animal.",
        "What is a dog?": "",
        "What is a fox?": "Red.",
        "What is a cow?": "Big.",
    }
    second = {
        "An animal.": Answer("It eats mice.", True),
        "Red.": Answer("…", False),
        "Big.": Answer("Milk", True),
    }
    seen = list[list[tuple[dict[str, str], ...]]]()

    def answered(
        writer: Any, tokenizer: Any, asked: Sequence[answers.Prompt], *rest: Any, **how: Any
    ) -> Iterator[tuple[int, Answer]]:
        seen.append([prompt.messages for prompt in asked])
        for number, prompt in reversed(list(enumerate(asked))):
            if len(prompt.messages) == 1:
                yield number, Answer(f" {said[prompt.messages[0]['content']]}\n", True)
            else:
                yield number, second[prompt.messages[1]["content"]]

    monkeypatch.setattr(answers, "answered", answered)
    monkeypatch.setattr(teacher_answers, "AT_ONCE", (4,))

    kept = teacher_answers.write(
        chat, replace(HOW, prompts=TWO_TURNS), tmp_path / "a.jsonl", memory.budget(None)
    )

    assert kept == 3
    assert len(seen) == 2
    cat, fox, cow = (row["messages"] for row in rows_of(tmp_path / "a.jsonl"))
    assert [message["content"] for message in cat] == [
        "What is a cat?",
        "An animal.",
        "Why?",
        "It eats mice.",
    ]
    assert [message["role"] for message in cat] == ["user", "assistant"] * 2
    assert [message["content"] for message in fox] == ["What is a fox?", "Red."]
    assert [message["content"] for message in cow] == ["What is a cow?", "Big.", "Why?", "Milk"]
    assert seen[1] == [tuple(cat[:3]), (*fox, {"role": "user", "content": "Why?"}), tuple(cow[:3])]


def test_second_turns_of_a_real_teacher(
    chat: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anything made up: what it is asked in the end is its own answer, and the user's next
    turn.
    """
    seen = watched(monkeypatch)
    many = [
        Prompt("second turn", "en", (f"What is {number}?", "Why?", "Really?"))
        for number in range(20)
    ]

    teacher_answers.write(
        chat, replace(HOW, prompts=many), tmp_path / "a.jsonl", memory.budget(None)
    )

    rows = [row["messages"] for row in rows_of(tmp_path / "a.jsonl")]
    asked = [list(prompt.messages) for prompt, _ in seen]
    assert {len(row) for row in rows} == {2, 4, 6}
    for row in rows:
        assert all(row[:end] in asked for end in range(1, len(row), 2))


@pytest.mark.usefixtures("cpu_policy")
def test_within_the_budget_or_a_sentence(chat: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as fit; turns count as answers; too little is refused with both numbers."""
    monkeypatch.setattr(teacher_answers, "AT_ONCE", (64, 24, 8, 1))
    m = model_of(chat)

    much = teacher_answers.plan(m, HOW, Budget(4000 * MIB))
    turns = teacher_answers.plan(m, replace(HOW, prompts=TWO_TURNS * 2), Budget(4000 * MIB))
    one_turn = [replace_turns(prompt) for prompt in TWO_TURNS * 2]
    single = teacher_answers.plan(m, replace(HOW, prompts=one_turn), Budget(4000 * MIB))

    assert much.at_once == len(HOW.prompts)
    assert much.headroom_bytes is None
    assert 0 < much.peak_bytes < 4000 * MIB
    assert turns.cost.flops == pytest.approx(2 * single.cost.flops)
    less = teacher_answers.plan(m, HOW, Budget(memory.needed_bytes(4 * MIB)))
    assert less.at_once < much.at_once
    assert less.peak_bytes < much.peak_bytes
    with pytest.raises(MisError, match="the budget is 1 MiB: give --budget"):
        teacher_answers.plan(m, HOW, Budget(MIB))


def replace_turns(prompt: Prompt) -> Prompt:
    """The same with its first turn alone."""
    return prompt._replace(turns=prompt.turns[:1])


def test_our_prompts_come_in_turn() -> None:
    """In both languages; a count takes the first ones; of every kind some among the fewest
    that are asked.
    """
    everything = prompts.train()

    assert prompts.train(7) == everything[:7]
    assert {prompt.language for prompt in everything} == {"en", "pl"}
    assert {prompt.kind for prompt in everything[:240]} == {prompt.kind for prompt in everything}
    assert len({prompt.turns for prompt in everything}) == len(everything) == 2800
    assert any(len(prompt.turns) > 1 for prompt in everything[:240])


def test_kept_answers_are_filtered_again(tmp_path: Path) -> None:
    """What was no loop when it was written goes, with its question; the turns before it stay."""

    def talk(*turns: str) -> dict[str, Any]:
        roles = ("user", "assistant") * len(turns)
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, turns, strict=False)
        ]
        return {"messages": messages}

    late = "Dear Ann, thank you for the letter that came on Monday. " + "I am glad to hear it. " * 6
    good = talk("Who are you?", "A model.")
    file = tmp_path / "answers.jsonl"
    rows = [good, talk("Write.", late), talk("Who are you?", "A model.", "And?", "呵呵" * 90)]
    teacher_answers.write_rows(file, rows)

    assert teacher_answers.filter_again(file) == 1
    assert rows_of(file) == [good, good]
    before = file.stat().st_mtime_ns
    assert teacher_answers.filter_again(file) == 0
    assert file.stat().st_mtime_ns == before
