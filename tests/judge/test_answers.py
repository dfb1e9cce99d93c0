"""The judge of answers, beside plain formulas: bits, verdicts, and answers that are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import precision
from mis_mlx.data import token_windows
from mis_mlx.hardware import memory
from mis_mlx.judge import answer_figures, answers, score, write
from mis_mlx.judge.answers import AnswerBits, TeacherAnswers
from mis_mlx.judge.prompts import Answer, AnswerPair, Prompt, read_pairs
from mis_mlx.judge.speed import rounds
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.writing import text_writer
from mis_mlx.models.writing.text_writer import Completion
from mis_mlx.planner import estimates
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line, near

MIB = 2**20
PROMPTS = 36  # of which six are Polish
STRICT = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"


@pytest.fixture(autouse=True)
def few_tokens(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own, and short answers: a random model does not stop."""
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 10)
    monkeypatch.setattr(answers, "GREEDY_TOKENS", 6)


def chatting(model: Checkpoint, folder: Path, template: str = tiny.CHAT_TEMPLATE) -> Checkpoint:
    """A copy of a model with a chat template."""
    return load.open_checkpoint(tiny.chatting(model.path, folder, template))


def stranger(folder: Path, seed: int = 1) -> Checkpoint:
    """A model of other random weights, with a chat template."""
    return chatting(load.open_checkpoint(tiny.make(folder / f"seed {seed}", seed)), folder / "chat")


@pytest.fixture
def chat(llama: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The tiny llama with a chat template."""
    return chatting(llama, tmp_path / "chat")


def asked(*texts: str) -> list[Prompt]:
    """Prompts of one turn each."""
    return [Prompt(({"role": "user", "content": text},), "explain", "en") for text in texts]


THREE = asked("What is a for statement?", "If", "Why is the sky blue, and when is it not?")
LATER = Prompt(
    (
        {"role": "user", "content": "Is it true?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ),
    "second turn",
    "en",
)


def fixed(*given: Answer) -> TeacherAnswers:
    """These sampled answers to the first prompts of THREE."""
    return TeacherAnswers(
        THREE[: len(given)], [AnswerPair(sampled=answer, greedy=answer) for answer in given]
    )


def plain_log_probabilities(model: Checkpoint, ids: list[int], count: int) -> np.ndarray:
    """(count,) of the last tokens, by the resident model and float64."""
    z = np.array(load.resident_model(model, mx.float32)(mx.array([ids]))[0], np.float64)
    z -= z.max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return np.array([log_p[place - 1, ids[place]] for place in range(len(ids) - count, len(ids))])


def test_prompts_are_read_and_spread_evenly(tmp_path: Path) -> None:
    """First and last among them; bad rows are named; ours are good."""
    rows = []
    for number in range(9):
        messages = [{"role": "user", "content": f"Pytanie {number}"}]
        rows.append({"kind": "list", "language": "pl", "messages": messages})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    three = answers.prompts(3, path)

    texts = [prompt.messages[0]["content"] for prompt in three]
    assert texts == ["Pytanie 0", "Pytanie 4", "Pytanie 8"]
    assert (three[0].kind, three[0].language) == ("list", "pl")
    assert len({prompt.sha256 for prompt in answers.prompts(99, path)}) == 9
    rows[1]["messages"] = [*messages, {"role": "assistant", "content": "Tak."}]
    rows[3]["language"] = "de"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MisError, match=r"2 rows .* line 2.*'de'"):
        answers.prompts(3, path)
    ours = answers.prompts(10_000)
    assert len({prompt.sha256 for prompt in ours}) == len(ours) >= 120
    assert {prompt.language for prompt in ours} == {"en", "pl"}


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("llama", "cpu"), ("llama", "metal"), ("untied", "cpu"), ("fewer tokens", "cpu")],
)
def test_bits_are_the_plain_formula(
    models: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    brief_look: None,
    kind: str,
    policy: str,
) -> None:
    """log-softmax at the answer's tokens and its end, of the model's own ids, whichever part of the
    head they are in; bytes of its text.
    """
    monkeypatch.setenv(precision.POLICY, policy)
    monkeypatch.setattr(stream, "HEAD_PART", 100 * 64)
    if kind == "fewer tokens":
        made = tiny.make(tmp_path / "small", vocab_size=300)
        tiny.write_tokenizer(made, 300)
        chat = chatting(load.open_checkpoint(made), tmp_path / "chat")
    else:
        chat = chatting(models(kind), tmp_path / "chat")
    tokenizer = load.tokenizer(chat.path)
    said = Answer("A statement that repeats; zażółć.", ended=True)

    found = answers.bits(chat, fixed(said))

    before = token_windows.prompt_ids(THREE[0].messages, tokenizer)
    own = [*tokenizer.encode(said.text, add_special_tokens=False), tokenizer.eos_token_id]
    wanted = plain_log_probabilities(chat, [*before, *own], len(own))
    assert found.nats[0] == pytest.approx(-wanted.sum(), rel=near(1e-5, 2e-3))
    assert found.nbytes.tolist() == [len(said.text.encode())] == [len(said.text) + 4]
    assert found.per_byte == pytest.approx(found.nats[0] / math.log(2) / found.nbytes[0])


def test_these_ids_are_those_that_training_learns(chat: Checkpoint) -> None:
    """The learned part of the rendered conversation, up to its end token."""
    tokenizer = load.tokenizer(chat.path)
    said = Answer("A statement.", ended=True)
    row = {"messages": [*LATER.messages, {"role": "assistant", "content": said.text}]}
    ids, loss_mask = token_windows.conversation(row, tokenizer, mask_prompt=True)
    last = max(place for place, token in enumerate(ids) if token == tokenizer.eos_token_id)

    before, own = score._tokens_of(tokenizer, LATER, said, score._end_of_turn(tokenizer))

    assert [*before, *own] == ids[: last + 1]
    assert loss_mask[len(before) : last + 1] == [1] * len(own)
    assert loss_mask[len(before) - 1] == 0


def test_an_answer_that_was_cut_off_has_no_end(chat: Checkpoint) -> None:
    """Its end token is not counted: the difference is that token's nats, no byte. An empty answer
    is its end, or nothing.
    """
    tokenizer = load.tokenizer(chat.path)
    said = [Answer("If so", True), Answer("If so", False), Answer("", True), Answer("", False)]
    pairs = [AnswerPair(sampled=answer, greedy=answer) for answer in said]

    found = answers.bits(chat, TeacherAnswers([THREE[0]] * 4, pairs))

    before = token_windows.prompt_ids(THREE[0].messages, tokenizer)
    ids = [*before, *tokenizer.encode("If so"), tokenizer.eos_token_id]
    end = plain_log_probabilities(chat, ids, 1)
    assert found.nats[0] - found.nats[1] == pytest.approx(-end[0], abs=near(1e-4, 5e-2))
    assert found.nats[2] > 0 == found.nats[3]
    assert found.nbytes.tolist() == [5, 5, 0, 0]
    nothing = AnswerBits(found.nats[2:], found.nbytes[2:])
    assert answer_figures.rows_of("m", nothing) == []
    assert len(answers.log_probabilities(chat, [], [])) == 0


def test_greedy_answers_are_mlx_lms(chat: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model writes one token at a time, through the template; prompts of several turns,
    too. A stop token is no part of the text.
    """
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(chat.path))

    said = answers.greedy(chat, [*THREE, LATER], memory.budget(None))

    for prompt, answer in zip([*THREE, LATER], said, strict=True):
        ids = token_windows.prompt_ids(prompt.messages, tokenizer)
        wanted = list(rounds.greedy(model, ids, answers.GREEDY_TOKENS))
        assert answer == Answer(tokenizer.decode(wanted).rstrip("\ufffd"), ended=False)
    assert answers.greedy(chat, [], memory.budget(None)) == []
    written = [[*tokenizer.encode("If so"), tokenizer.eos_token_id], tokenizer.encode("If so")]
    ends = [Completion(number, ids) for number, ids in enumerate(written)]
    monkeypatch.setattr(text_writer.TextWriter, "completions", lambda *_, **__: iter(ends[::-1]))
    said = answers.greedy(chat, THREE[:2], memory.budget(None))
    assert said == [Answer("If so", ended=True), Answer("If so", ended=False)]


@pytest.mark.thorough
@pytest.mark.usefixtures("cpu_policy")  # its budget is for float32
def test_a_streamed_teacher_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily, and with each prompt's own random numbers, within the budget. It is read once for a
    token of all answers of both kinds, then once to read them.
    """
    passes = list[int]()
    blocks = Stream.blocks

    def counted(stream: Stream, *given: Any, **how: Any) -> Any:
        passes.append(1)
        return blocks(stream, *given, **how)

    monkeypatch.setattr(Stream, "blocks", counted)
    deep = load.open_checkpoint(tiny.make(tmp_path / "deep", num_hidden_layers=24))
    chat = chatting(deep, tmp_path / "chat")
    before = mx.get_active_memory()
    mx.reset_peak_memory()

    streamed = answers.teacher_answers(chat, THREE, Budget(memory.needed_bytes(14 * MIB)))

    assert mx.get_peak_memory() - before < 14 * MIB
    assert len(passes) == answers.ANSWER_TOKENS + 1
    shutil.rmtree(answers._kept_path(chat).parent)
    whole = answers.teacher_answers(chat, THREE, Budget(2000 * MIB))
    assert len(passes) < 2 * answers.ANSWER_TOKENS
    assert streamed == whole
    assert whole.sampled != whole.greedy


def asked_again(monkeypatch: pytest.MonkeyPatch) -> list[list[Prompt]]:
    """The prompts of every call that writes answers, from now on."""
    seen = list[list[Prompt]]()
    real = answers._write_missing

    def watched(teacher: Checkpoint, prompts: Sequence[Prompt], limit: Budget, path: Path) -> Any:
        seen.append(list(prompts))
        return real(teacher, prompts, limit, path)

    monkeypatch.setattr(answers, "_write_missing", watched)
    return seen


def torn(path: Path, records: int) -> str:
    """Leave the first record of a file and half of the second, as a kill does; the first one."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == records
    path.write_text(lines[0] + lines[1][: len(lines[1]) // 2], "utf-8")
    return lines[0]


def test_a_stopped_run_goes_on(
    chat: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a line, while the teacher writes and while a student does: only what
    is missing is asked, and the answers and figures are the same.
    """
    limit = memory.budget(None)
    models = {"teacher": chat, "student": stranger(tmp_path / "student")}
    whole = answers.judged(models, THREE, limit)
    path = answers._kept_path(chat)
    kept = answers._kept_of_student(models["student"], None)
    seen = asked_again(monkeypatch)
    missing = list[int]()
    real = answers.greedy

    def watched(model: Checkpoint, left: list[Prompt], *rest: Any, **more: Any) -> list[Answer]:
        missing.append(len(left))
        return real(model, left, *rest, **more)

    monkeypatch.setattr(answers, "greedy", watched)
    first = torn(path, 6)  # before anything was measured
    for each in (kept.answers_path, kept.costs_path):
        torn(each, 3)

    again = answers.judged(models, THREE, limit)
    third = answers.judged(models, [*THREE, THREE[0]], limit)

    assert whole and again and third
    left = [prompt for prompt in THREE if prompt.sha256 not in first]
    assert len(left) == 2
    assert seen == [left]
    assert missing == [2, 0]
    assert set(read_pairs(path)) == {prompt.sha256 for prompt in THREE}
    assert again.answers == whole.answers
    assert again.greedy == whole.greedy
    assert third.answers.sampled == [*whole.answers.sampled, whole.answers.sampled[0]]
    for one, two in zip(whole.rows, again.rows, strict=True):
        assert one.value == pytest.approx(two.value, abs=1e-3)
    assert answers.plan(models, THREE, limit) is None
    assert answers.plan(models, [*THREE, LATER], limit) is not None


def ship(teacher: Checkpoint, asked: Sequence[Prompt], limit: Budget, path: Path) -> TeacherAnswers:
    """Write a file of a teacher's answers such as the one that comes with the package."""
    whole = answers.teacher_answers(teacher, asked, limit, shipped=path)
    rows = [answers.record_of(*both) for both in zip(whole.prompts, whole.pairs, strict=True)]
    lines = [json.dumps(row) for row in (answers._header(teacher), *rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return whole


def test_shipped_answers_are_used_for_their_own_teacher(
    chat: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its tensors, wherever it lies; not for another model; missing prompts are written."""
    limit = memory.budget(None)
    shipped = tmp_path / "shipped.jsonl"
    whole = ship(chat, THREE[:2], limit, shipped)
    shutil.rmtree(tmp_path / "cache")
    copy = load.open_checkpoint(shutil.copytree(chat.path, tmp_path / "copy"))
    other = stranger(tmp_path / "other")
    same = load.open_checkpoint(tiny.make(tmp_path / "same"))
    worded = chatting(same, tmp_path / "worded", f"Hi. {tiny.CHAT_TEMPLATE}")
    seen = asked_again(monkeypatch)

    from_shipped = answers.teacher_answers(copy, THREE[:2], limit, shipped)
    assert from_shipped == whole
    assert seen == []
    assert answers.shipped_for(copy, shipped)
    assert not answers.shipped_for(other, shipped)
    assert not answers.shipped_for(copy, tmp_path / "none.jsonl")
    ended = load.open_checkpoint(shutil.copytree(chat.path, tmp_path / "ended"))
    (ended.path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert not answers.shipped_for(ended, shipped)
    spoken = load.open_checkpoint(shutil.copytree(chat.path, tmp_path / "spoken"))
    tokenizer = (spoken.path / "tokenizer.json").read_text()
    (spoken.path / "tokenizer.json").write_text(tokenizer + " ")
    assert not answers.shipped_for(spoken, shipped)
    answers.teacher_answers(copy, THREE, limit, shipped)
    assert seen == [THREE[2:]]
    for model in (other, worded):
        answers.teacher_answers(model, THREE[:2], limit, shipped)
        assert seen.pop() == THREE[:2]
    monkeypatch.setattr(answers, "TEMPERATURE", 0.7)
    answers.teacher_answers(copy, THREE[:2], limit, shipped)
    assert seen.pop() == THREE[:2]
    header, *rows = [json.loads(line) for line in shipped.read_text("utf-8").splitlines()]
    assert set(header) == {"teacher", "settings"}
    assert len(rows) == 2
    assert rows[0]["prompt_sha256"] == THREE[0].sha256
    assert set(rows[0]["greedy"]) == {"text", "ended"}


def test_answers_of_other_settings_are_kept_apart(
    chat: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a teacher draws in half precision, which never has rare tokens; a student's longer
    ones, or another one's.
    """
    monkeypatch.setenv(precision.POLICY, "cpu")
    drawn = answers._kept_path(chat)
    short = answers._kept_of_student(chat, None).answers_path
    another = answers._kept_of_student(chat, "0" * 64).answers_path
    monkeypatch.setenv(precision.POLICY, "metal")
    assert answers._kept_path(chat) != drawn
    monkeypatch.setenv(precision.POLICY, "cpu")
    monkeypatch.setattr(answers, "GREEDY_TOKENS", 7)
    longer = answers._kept_of_student(chat, None).answers_path
    assert len({short, another, longer}) == 3


def test_what_is_shipped_unmeasured_is_measured_once(
    chat: Checkpoint, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new machine: what the answers cost the teacher is found, and kept there."""
    limit = memory.budget(None)
    shipped = tmp_path / "shipped.jsonl"
    whole = ship(chat, THREE, limit, shipped)
    header, *records = [json.loads(line) for line in shipped.read_text("utf-8").splitlines()]
    bare = []
    for record in records:
        bare.append({key: record[key] for key in ("prompt_sha256", "sampled", "greedy")})
    shipped.write_text("".join(json.dumps(row) + "\n" for row in (header, *bare)))
    shutil.rmtree(cache)
    seen = asked_again(monkeypatch)

    measured = answers.teacher_answers(chat, THREE, limit, shipped)
    monkeypatch.setattr(
        answers, "log_probabilities", lambda _, asked, __: pytest.fail("again") if asked else []
    )
    kept = answers.teacher_answers(chat, THREE, limit, shipped)

    assert measured == whole
    assert kept == whole
    assert seen == []
    assert all(pair.nats for pair in kept.pairs)


def test_a_model_without_a_template_is_not_judged(llama: Checkpoint, chat: Checkpoint) -> None:
    """No figures of it, and none of anybody where it is the teacher; asked directly, a sentence."""
    limit = memory.budget(None)
    assert answers.judged({"teacher": llama, "student": chat}, THREE, limit) is None
    found = answers.judged({"teacher": chat, "student": llama}, THREE, limit)
    assert found is not None
    assert {row.model for row in found.rows} == {"teacher"}
    with pytest.raises(MisError):
        answers.greedy(llama, THREE, limit)
    with pytest.raises(MisError):
        answers.bits(llama, fixed(Answer("If", ended=True)))
    with pytest.raises(MisError):
        answers.teacher_answers(llama, THREE, limit)


def test_a_prompt_that_one_template_refuses_is_left_out_for_all(
    llama: Checkpoint, chat: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversation of three messages, and a prompt that leaves no room for its answer."""
    strict = chatting(llama, tmp_path / "strict", STRICT + tiny.CHAT_TEMPLATE)
    refusing = chatting(llama, tmp_path / "refusing", "{{ raise_exception('never') }}")
    long = asked("if the loop is true " * 200)[0]

    found = answers.judged(
        {"teacher": chat, "student": strict}, [THREE[0], LATER, long], memory.budget(None)
    )

    assert found is not None
    assert found.answers.prompts == [THREE[0]]
    assert "2 of 3 prompts" in capsys.readouterr().err
    nobody = {"teacher": chat, "student": refusing}
    assert answers.judged(nobody, THREE, memory.budget(None)) is None
    with pytest.raises(MisError, match=r"'Why\?' \(one turn only\)"):
        score.log_probabilities(strict, [LATER], [Answer("If", ended=True)])


def test_students_are_judged_beside_their_teacher(chat: Checkpoint, tmp_path: Path) -> None:
    """The teacher over itself: nothing; of few prompts there is no interval. Silent students are
    judged by the teacher's answers alone; a part is what a judgement of these prompts alone gives.
    """
    models = {"teacher": chat, "copy": chat, "student": stranger(tmp_path / "student")}
    limit = memory.budget(None)

    found = answers.judged(models, [*THREE, LATER], limit)
    some = answers.judged(models, [*THREE, LATER], limit, silent=["copy"])
    two = answers.judged(models, [THREE[1], LATER], limit)

    assert found and some and two
    value = {(row.model, row.metric): row for row in found.rows}
    excess = value["copy", "answers_excess"]
    assert (excess.value, excess.low, excess.high) == (0, -math.inf, math.inf)
    shared = {"answers", "loops", "empty", "endless"}
    assert {metric for name, metric in value if name == "teacher"} == shared
    assert {metric for name, metric in value if name == "student"} == {*shared, "answers_excess"}
    difference = value["student", "answers"].value - value["teacher", "answers"].value
    assert value["student", "answers_excess"].value == pytest.approx(difference)
    assert found.greedy["student"] != found.greedy["teacher"]
    assert some.greedy == {**found.greedy, "copy": []}
    quiet = {"answers", "answers_excess"}
    heard = [row for row in found.rows if row.model != "copy" or row.metric in quiet]
    assert some.rows == heard
    part = found.part([1, 3])
    assert part.answers.prompts == two.answers.prompts
    assert part.answers.sampled == two.answers.sampled
    assert part.greedy == two.greedy
    for one, wanted in zip(part.rows, two.rows, strict=True):
        assert (one.model, one.metric, one.n) == (wanted.model, wanted.metric, wanted.n)
        assert one.value == pytest.approx(wanted.value, abs=near(1e-5, 1e-2))


def test_rows_by_pencil() -> None:
    """3 and 5 bits over 2 and 2 bytes: 2 bits a byte; the teacher's 1 and 3: one less."""
    bits = AnswerBits(math.log(2) * np.array([3.0, 5.0]), np.array([2, 2]))
    teacher_bits = AnswerBits(math.log(2) * np.array([1.0, 3.0]), np.array([2, 2]))
    said = [
        Answer("no, " * 60, False),
        Answer(" …\n", True),
        Answer("ż", True),
        Answer("Well", False),
    ]

    rows = answer_figures.rows_of("m", bits, said, teacher_bits=teacher_bits)
    found = {row.metric: row for row in rows}

    assert (found["answers"].value, found["answers"].n) == (pytest.approx(2.0), 2)
    assert (found["answers"].low, found["answers"].high) == (-math.inf, math.inf)  # too few
    assert found["answers_excess"].value == pytest.approx(1.0)
    shares = {name: (found[name].value, found[name].n) for name in ("loops", "empty", "endless")}
    assert shares == {"loops": (25.0, 4), "empty": (25.0, 4), "endless": (50.0, 4)}
    assert [row.metric for row in answer_figures.rows_of("m", bits)] == ["answers"]


def test_planned_before_anything_is_asked(llama: Checkpoint) -> None:
    """More for more students; kept answers cost the teacher no writing."""
    m = model_of(llama)
    much = Budget(2000 * MIB)
    one = write.answers_cost([m, m], 8, much)
    two = write.answers_cost([m, m, m], 8, much)
    kept = write.answers_cost([m, m], 8, much, teacher_kept=True)
    assert one.flops < two.flops
    assert kept.flops < one.flops
    assert kept.peak_bytes <= one.peak_bytes
    assert one.seconds(estimates.machine_rates()) > 0
    with pytest.raises(MisError, match="1 MiB"):
        write.answers_cost([m], 8, Budget(MIB))


@pytest.mark.thorough
def test_evaluate_end_to_end(
    tmp_path: Path, chat: Checkpoint, command: Callable[..., Done]
) -> None:
    """Answers come first, beside another task; a copy costs nothing above its teacher; asked once
    only. Of few prompts there is one table for both languages.
    """
    copy = shutil.copytree(chat.path, tmp_path / "copy")
    other = stranger(tmp_path / "other").path.rename(tmp_path / "student")
    flags = ["--teacher", chat.path, "--students", copy, other, "--num-questions", PROMPTS]
    flags += ["--tasks", "logic", "answers", "--out", tmp_path / "out"]

    planned = command("evaluate", *flags[:-2], "--dry-run")
    done = command("evaluate", *flags)
    again = command("evaluate", *flags)
    few = ("--tasks", "answers", "--num-questions", 4)
    alone = command("evaluate", "--teacher", chat.path, *few)

    assert done.returncode == 0, done.stderr
    assert last_line(planned)["questions"] == {"logic": PROMPTS, "answers": PROMPTS}
    assert last_line(planned)["seconds"] > 0
    found = last_line(done)["answers"]
    assert found["prompts"] == PROMPTS
    assert found["all"]["answers_excess_copy"] == 0
    assert found["all"]["answers_student"] > found["all"]["answers_teacher"]
    assert found["all"]["endless_student"] > 90
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
    assert "Answers in all languages to 4 held-out prompts" in alone.stdout
    assert set(last_line(alone)["answers"]) == {"prompts", "all"}
