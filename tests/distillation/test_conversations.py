"""Where a run's conversations come from, and what it says of the students' answers at its end."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mis_mlx.data import preparation, prompts
from mis_mlx.distillation import conversations, teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.judge import answers, write
from mis_mlx.judge.answer_figures import AnswerBits
from mis_mlx.judge.answers import Judgement, ModelAnswers, TeacherAnswers
from mis_mlx.judge.prompts import Answer, AnswerPair, Prompt, read_header, read_pairs
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.types import Budget, Checkpoint
from tests import tiny

LOOP = Answer("I'm not sure. " * 30, ended=False)
FINE = Answer("A cat is an animal.", ended=True)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny teacher whose answers end."""
    return load.open_checkpoint(tiny.talking(tmp_path_factory.mktemp("chat") / "teacher"))


@pytest.fixture(autouse=True)
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and a cache of this test's own, few prompts and short answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversations, "FEWEST", 6)
    monkeypatch.setattr(conversations, "MOST", 9)
    monkeypatch.setattr(
        teacher_answers, "WritingSettings", partial(teacher_answers.WritingSettings, max_tokens=12)
    )


def wanted(
    data: str | None = None, share: float | None = None, tokens: int = 0
) -> preparation.Source:
    """What a run with these flags asks for."""
    return preparation.Source(data, share=share, tokens=tokens)


def source(
    teacher: Checkpoint, asked: preparation.Source, *, dry_run: bool = False
) -> preparation.Source:
    """The text of such a run."""
    return conversations.source(teacher, asked, memory.budget(None), dry_run=dry_run)


def as_shipped(teacher: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this teacher be the one whose answers come with the package."""
    file = folder / "shipped.jsonl"
    file.write_text(json.dumps(answers._header(teacher)) + "\n")
    monkeypatch.setattr(answers, "shipped_for", partial(answers.shipped_for, shipped=file))


def test_the_default_teachers_answers_come_with_the_package(
    chat: Checkpoint, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written: the built-in text has them, and beside another --data stands their
    file.
    """
    as_shipped(chat, tmp_path, monkeypatch)

    built_in = source(chat, wanted())
    beside = source(chat, wanted(str(text_folder), share=0.3))

    assert built_in == preparation.Source(None)
    assert beside == preparation.Source(str(text_folder), answers=preparation.ANSWERS, share=0.3)
    assert not Path("runs").exists()


def test_another_teacher_writes_its_own_once(
    chat: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At first it answers, which is said with its cost; then the file is used again, and another
    seed has another file.
    """
    first = source(chat, wanted())

    said = capsys.readouterr().err
    assert first.answers is not None
    assert first.answers.is_relative_to("runs/answers")
    rows = [json.loads(line) for line in first.answers.read_text("utf-8").splitlines()]
    assert 0 < len(rows) <= 6
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert "the teacher answers 6 prompts first" in said
    assert f"conversations: {len(rows)} of 6 answers are kept" in said
    monkeypatch.setattr(teacher_answers, "write", lambda *_: pytest.fail("written again"))
    assert source(chat, wanted()) == first
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    other = conversations.source(
        chat, preparation.Source(seed=1), memory.budget(None), dry_run=True
    )
    assert other.answers != first.answers
    ended = load.open_checkpoint(shutil.copytree(chat.path, tmp_path / "ended"))
    (ended.path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    others = conversations.source(ended, wanted(), memory.budget(None), dry_run=True)
    assert others.answers != first.answers


def test_two_runs_of_a_new_teacher_write_once(
    chat: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one waits for the first, says so, and takes what that wrote."""
    file = source(chat, wanted(), dry_run=True).answers
    assert file is not None
    said = list[str]()
    monkeypatch.setattr(conversations.cli, "say", lambda *lines: said.extend(lines))
    monkeypatch.setattr(teacher_answers, "write", lambda *_: pytest.fail("written twice"))
    with ThreadPoolExecutor(1) as pool:
        with protocol.only_maker(file, said.append) as missing:
            assert missing
            second = pool.submit(source, chat, wanted())
            while not any("waiting for it" in line for line in said):
                assert not second.done(), second.result()
                time.sleep(0.01)
            assert not second.done()
            file.write_text(json.dumps({"messages": []}) + "\n")
        assert second.result().answers == file
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_as_many_prompts_as_the_training_visits(
    chat: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for every TYPICAL_TOKENS, from the fewest to the most; a dry run says so and writes
    nothing.
    """
    for tokens, count in ((0, 6), (8 * teacher_answers.TYPICAL_TOKENS, 8), (10**9, 9)):
        source(chat, wanted(share=0.5, tokens=2 * tokens), dry_run=True)
        assert f"the teacher answers {count} prompts first" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_none_are_asked_for(chat: Checkpoint, llama: Checkpoint, text_folder: Path) -> None:
    """--conversations 0; a teacher without a chat template, whatever the share is."""
    for teacher, asked in (
        (chat, wanted(share=0.0)),
        (llama, wanted()),
        (llama, wanted(share=0.5)),
    ):
        assert source(teacher, asked) == preparation.Source(None, share=0.0)
    assert source(chat, wanted(str(text_folder), share=0.0)) == preparation.Source(
        str(text_folder), share=0.0
    )
    assert not Path("runs").exists()


def test_data_with_conversations_of_its_own(
    chat: Checkpoint, text_folder: Path, tmp_path: Path
) -> None:
    """They are enough, unless a share is asked for."""
    folder = Path(shutil.copytree(text_folder, tmp_path / "text"))
    row = {"prompt": "Who are you?", "completion": "A model."}
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")

    assert source(chat, wanted(str(folder))) == preparation.Source(str(folder))
    beside = source(chat, wanted(str(folder), share=0.5), dry_run=True)
    assert beside.answers is not None
    assert beside.share == 0.5


def test_a_teacher_that_would_be_streamed_reads_the_shipped_answers(chat: Checkpoint) -> None:
    """It writes nothing, unless its answers are there already."""
    asked = teacher_answers.settings_of(6)
    m = model_of(chat)
    assert teacher_answers.is_whole(m, asked, Budget(2**30))
    assert not teacher_answers.is_whole(m, asked, Budget(2**20))
    tight = conversations.source(chat, wanted(), Budget(2**20))
    assert tight == preparation.Source(None)
    assert not Path("runs").exists()
    own = source(chat, wanted())
    assert own.answers is not None
    assert conversations.source(chat, wanted(), Budget(2**20)) == own
    # A run that began without them goes on without them.
    assert conversations.source(chat, wanted(), Budget(2**30), writes=False) == tight


def test_a_teacher_that_answers_nonsense_is_none_to_learn_answers_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said, with both numbers; the run goes on without."""
    silent = load.open_checkpoint(tiny.talking(tmp_path / "silent", ending=50.0))

    assert source(silent, wanted()) == preparation.Source(None, share=0.0)

    said = capsys.readouterr().err
    why = "of 6 teacher's answers only 0 are neither empty nor loops"
    assert f"conversations are left out of the training text: {why}" in said
    assert not list(Path("runs").rglob("answers*.jsonl"))  # which a later run would take


def test_what_is_shipped_is_of_these_settings() -> None:
    """The default teacher's answers to all held-out prompts; its answers to learn from are to
    prompts of training.
    """
    header = read_header(answers.SHIPPED)
    pairs = read_pairs(answers.SHIPPED)
    asked = answers.prompts(10_000)

    settings = {key: value for key, value in header["settings"].items() if key != "speech_sha256"}
    assert settings == {
        "version": answers.VERSION,
        "temperature": answers.TEMPERATURE,
        "top_p": answers.TOP_P,
        "seed": answers.SEED,
        "answer_tokens": write.ANSWER_TOKENS,
        "greedy_tokens": write.GREEDY_TOKENS,
    }
    assert pairs.keys() == {prompt.sha256 for prompt in asked}
    firsts = {prompt.turns[0] for prompt in prompts.train()}
    for row in preparation.read(preparation.ANSWERS).rows:
        first, *rest = row["messages"]
        assert first["content"] in firsts
        assert rest[-1]["role"] == "assistant"
        said = [
            Answer(message["content"], ended=True)
            for message in rest
            if message["role"] == "assistant"
        ]
        assert all(teacher_answers.kept_text(answer) == answer.text for answer in said)


def judged(languages: str, greedy: dict[str, Sequence[Answer]]) -> Judgement:
    """What such answers to prompts in these languages (e: English, p: Polish) come to. Of the
    teacher's sampled answers the n-th model has n + 1 bits a byte.
    """
    asked = list[Prompt]()
    for number, letter in enumerate(languages):
        message = {"role": "user", "content": f"Question {number}?"}
        asked.append(Prompt((message,), "explain", {"e": "en", "p": "pl"}[letter]))
    nbytes = np.full(len(asked), 10)
    said = dict[str, ModelAnswers]()
    for number, (name, own) in enumerate(greedy.items()):
        bits = AnswerBits(math.log(2) * (number + 1.0) * nbytes, nbytes)
        said[name] = ModelAnswers(bits, list(own))
    pairs = [
        AnswerPair(sampled=FINE, greedy=answer, nats=1.0) for answer in next(iter(greedy.values()))
    ]
    return Judgement(TeacherAnswers(asked, pairs), said)


def answers_with(loops: int, count: int) -> list[Answer]:
    """So many loops, then answers without a fault."""
    return [LOOP] * loops + [FINE] * (count - loops)


@pytest.mark.parametrize(
    ("of_teacher", "of_student", "said"), [(0, 2, True), (1, 2, False), (4, 6, True), (5, 0, False)]
)
def test_a_student_that_repeats_itself_is_named(
    of_teacher: int, of_student: int, said: bool
) -> None:
    """Of ten answers two more than the teacher's; one more, 10 percent, is not enough. Both counts,
    and what to do.
    """
    found = judged(
        "e" * 10,
        {
            "teacher": answers_with(of_teacher, 10),
            "distilled": [],
            "4-bit": answers_with(of_student, 10),
        },
    )

    sentence = conversations.loop_warning(found)

    assert bool(sentence) == said
    if said:
        counts = f"{of_student} of its 10 answers are loops; the teacher has {of_teacher}."
        assert sentence.startswith(
            f"**The student repeats itself**: {counts} Allow less loss: --lose 0.05"
        )


def test_a_table_for_each_language_with_enough_prompts() -> None:
    """Eight in English, two of them loops, and four in Polish, all loops; of three there is no
    table.
    """
    models = {"teacher": [FINE] * 12, "student": [*answers_with(2, 8), *[LOOP] * 4]}

    both = conversations.tables(judged("eeeeeeeepppp", models))
    one = conversations.tables(judged("eeeeeeeeeppp", models))

    assert list(both) == ["English", "Polish"]
    assert list(one) == ["English"]
    loops = {}
    for language, rows in both.items():
        chosen = [row for row in rows if (row.model, row.metric) == ("student", "loops")]
        loops[language] = [(row.value, row.n) for row in chosen]
    assert loops == {"English": [(25.0, 8)], "Polish": [(100.0, 4)]}


def test_a_dialogue_shows_the_teacher_and_the_last_student() -> None:
    """Three prompts in English, spread over all; an answer that was cut off goes on in dots."""
    teacher = [Answer(f" T{number}.", True) for number in range(8)]
    last = [Answer(f"S{number}", number != 3) for number in range(8)]
    found = judged("eepeeepe", {"teacher": teacher, "distilled": [], "4-bit": last})

    lines = [line for line in conversations.dialogue(found).splitlines() if line]

    assert lines == [
        *("> Question 0?", "teacher: T0.", "student: S0"),
        *("> Question 3?", "teacher: T3.", "student: S3 …"),
        *("> Question 5?", "teacher: T5.", "student: S5"),
    ]


def test_all_answers_are_kept(tmp_path: Path) -> None:
    """A row for each prompt and each model that was asked, as `report` reads them; figures of all
    for the result.
    """
    found = judged("ep", {"teacher": [FINE, LOOP], "distilled": [], "4-bit": [LOOP, FINE]})

    conversations.write_answers(found, tmp_path)
    figures = conversations.figures(found)

    rows = [
        json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    ]
    assert [(row["prompt"], row["model"], row["ended"]) for row in rows] == [
        ("Question 0?", "teacher", True),
        ("Question 0?", "4-bit", False),
        ("Question 1?", "teacher", False),
        ("Question 1?", "4-bit", True),
    ]
    assert rows[0] == {
        "prompt": "Question 0?",
        "language": "en",
        "kind": "explain",
        "model": "teacher",
        "text": FINE.text,
        "ended": True,
    }
    assert figures["answers_prompts"] == 2
    assert (figures["answers_teacher"], figures["answers_distilled"], figures["answers_4-bit"]) == (
        1.0,
        2.0,
        3.0,
    )
    assert figures["answers_excess_4-bit"] == 2.0
    assert figures["loops_4-bit"] == figures["loops_teacher"] == 50.0
    assert "loops_distilled" not in figures
    json.dumps(figures, allow_nan=False)


def test_a_student_without_a_template_is_not_judged(
    chat: Checkpoint,
    llama: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor a teacher without: the run has no such figures, and says why."""
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 10)
    monkeypatch.setattr(answers, "GREEDY_TOKENS", 6)
    limit = memory.budget(None)

    for models in ({"teacher": chat, "distilled": llama}, {"teacher": llama, "distilled": chat}):
        assert conversations.judged_answers(models, 2, limit) is None
        assert (
            f"{llama.path}: no chat template: its answers are not judged" in capsys.readouterr().err
        )
    found = conversations.judged_answers(
        {"teacher": chat, "distilled": chat, "4-bit": chat}, 2, limit
    )
    assert found is not None
    assert [len(said.greedy) for said in found.models.values()] == [2, 0, 2]
