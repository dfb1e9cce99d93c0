"""Models answer prompts that no training text holds: the first thing a student is judged by.

A student may predict a manual well, in bits per byte, and still answer nonsense. So it is asked:

    answers                cost of the teacher's own sampled answers under a model, in bits per byte
    loops, empty, endless  share of a model's greedy answers that go wrong, in percent

Every model reads a prompt through its own chat template and an answer with its own tokenizer. Bytes
are those of the answer's text, so models with different tokenizers compare. A model without a chat
template is not judged.

Answers are written once and kept: the teacher's (judge/prompts; those of the default
teacher come with the package) and its students' (judge/keep)."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import rows, token_windows
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge import keep, write
from mis_mlx.judge.answer_figures import AnswerBits
from mis_mlx.judge.judgement import (
    Judgement,
    ModelAnswers,
    TeacherAnswers,
    text_bytes,
)
from mis_mlx.judge.keep import Kept, all_kept
from mis_mlx.judge.prompts import (
    Answer,
    AnswerPair,
    Prompt,
    journal_at,
    prompt_fault,
    prompt_of,
    read_header,
    read_pairs,
    record_of,
    rounded,
)
from mis_mlx.judge.score import has_template, log_probabilities, need_template
from mis_mlx.judge.tasks import answering
from mis_mlx.judge.write import (
    ANSWER_TOKENS,
    ANSWERS_AT_ONCE,
    GREEDY_TOKENS,
    PAIRS_AT_ONCE,
    answered,
)
from mis_mlx.maths import stats
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing.draws import Draws, Sampling, half_version
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError

HERE = Path(__file__).parent
PROMPTS = HERE / "prompts.jsonl"
SHIPPED = HERE / "teacher_answers.jsonl"  # of the default teacher, to all of PROMPTS
VERSION = 1  # of the way answers are written: kept ones of another version are not used
TEMPERATURE = 0.8
TOP_P = 0.95
SEED = 0
KEPT_TOGETHER = 72  # prompts of the teacher whose answers are kept together
LONGEST = 512  # tokens of a prompt and its sampled answer; a longer prompt is left out


def prompts(count: int, path: Path = PROMPTS) -> list[Prompt]:
    """`count` prompts of a file, spread evenly over it, or all where there are fewer.

    MisError lists bad rows."""
    where = f"{path.name} line"
    good, problems = rows.judged(rows.parsed(path), where, prompt_fault)
    rows.refuse(problems)
    if not good:
        raise MisError(f"{path} holds 0 prompts: put one JSON object per line there")
    chosen = []
    for number in stats.spread(len(good), count):
        row, _ = good[number]
        chosen.append(prompt_of(row))
    return chosen


def accepted(models: Sequence[Checkpoint], asked: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that every model can take: its chat template renders them, and they are short.

    A prompt and its answer have LONGEST tokens at most. The number left out is said aloud."""
    left = _fitting(models, asked)
    if len(left) < len(asked):
        why = f"a chat template refuses them, or they and an answer take more than {LONGEST} tokens"
        cli.say(f"{len(asked) - len(left)} of {len(asked)} prompts are left out: {why}")
    return left


def _fitting(models: Sequence[Checkpoint], asked: Sequence[Prompt]) -> list[Prompt]:
    """As `accepted`, without a word."""
    left = list(asked)
    for model in models:
        tokenizer = load.tokenizer(model.path)
        left = [prompt for prompt in left if _fits(tokenizer, prompt)]
    return left


def _fits(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether one model can take a prompt."""
    try:
        ids = token_windows.prompt_ids(prompt.messages, tokenizer)
    except Exception:  # a template is a program that came with the model: it can raise anything
        return False
    return len(ids) + ANSWER_TOKENS <= LONGEST


def greedy(
    model: Checkpoint,
    asked: Sequence[Prompt],
    limit: Budget,
    *,
    keep: Callable[[Prompt, Answer], None] | None = None,
) -> list[Answer]:
    """A model's greedy answers to all prompts, of GREEDY_TOKENS tokens at most.

    keep: takes each answer as soon as it has ended. MisError where the model has no chat
    template, or does not fit the budget even streamed."""
    need_template(model)
    written = dict[int, Answer]()
    if not asked:
        return []
    tokenizer = load.tokenizer(model.path)
    writing_plan = write.plan(model, asked, GREEDY_TOKENS, limit, at_once=ANSWERS_AT_ONCE)
    label = f"answers of {model.path.name}"
    with progress.bar(label, len(asked)) as show, memory.limited(limit):
        show(0)
        writer = writing_plan.open(model)
        for number, answer in answered(writer, tokenizer, asked, GREEDY_TOKENS):
            written[number] = answer
            if keep is not None:
                keep(asked[number], answer)
            show(len(written))
    mx.clear_cache()
    return [written[number] for number in range(len(asked))]


def teacher_answers(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    limit: Budget,
    shipped: Path = SHIPPED,
) -> TeacherAnswers:
    """The teacher's answers to the prompts that it accepts: shipped, kept, or written now.

    Every prompt has random numbers of its own, so an answer does not depend on the others in its
    batch, nor on the budget, except for rounding. A run that was stopped continues here. MisError
    where the teacher has no chat template."""
    need_template(teacher)
    taken = accepted([teacher], asked)
    path = _kept_path(teacher)
    known = _known_pairs(teacher, shipped)
    # A prompt may stand there twice; it is answered once.
    missing = {prompt.sha256: prompt for prompt in taken if prompt.sha256 not in known}
    if missing:
        known |= _write_missing(teacher, list(missing.values()), limit, path)
    # Shipped answers come without their cost, and a run may have stopped before it was measured.
    unmeasured = [prompt for prompt in taken if known[prompt.sha256].nats is None]
    known |= _measured(teacher, unmeasured, known, path)
    return TeacherAnswers(taken, [known[prompt.sha256] for prompt in taken])


def known(teacher: Checkpoint, asked: Sequence[Prompt]) -> bool:
    """Whether the teacher's answers to all of these prompts are kept, or came with the package."""
    pairs = _known_pairs(teacher)
    return all(prompt.sha256 in pairs for prompt in asked)


def _known_pairs(teacher: Checkpoint, shipped: Path = SHIPPED) -> dict[str, AnswerPair]:
    """The teacher's answers that are kept, or came with the package, by a prompt's sha256."""
    header = _header(teacher)
    known = dict[str, AnswerPair]()
    # Shipped answers of another teacher, or of other settings, are of no use.
    if read_header(shipped) == header:
        known |= read_pairs(shipped)
    # The kept file comes second: it has the cost of shipped answers, once that is measured.
    known |= read_pairs(_kept_path(teacher))
    return known


def _measured(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    known: Mapping[str, AnswerPair],
    path: Path,
) -> dict[str, AnswerPair]:
    """The answers to these prompts with their cost under the teacher itself, which is kept."""
    pairs = [known[prompt.sha256] for prompt in asked]
    sampled = log_probabilities(teacher, asked, [pair.sampled for pair in pairs])
    measured = {}
    kept = journal_at(path)
    if asked:
        kept.begin()
    for prompt, pair, of_sampled in zip(asked, pairs, sampled, strict=True):
        with_cost = replace(pair, nats=rounded(-float(of_sampled.sum())))
        measured[prompt.sha256] = with_cost
        kept.add(record_of(prompt, with_cost))
    return measured


def _write_missing(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    limit: Budget,
    path: Path,
) -> dict[str, AnswerPair]:
    """The answers to these prompts, by a prompt's sha256. Both of a prompt are kept together.

    Each prompt has two: a sampled one, by which models are judged, and a greedy one, which is shown
    next to a student's own. They are written side by side, so that a teacher that is read from disk
    is read once for a token of both."""
    written = dict[str, AnswerPair]()
    writing_plan = write.plan(
        teacher, [*asked, *asked], ANSWER_TOKENS, limit, at_once=PAIRS_AT_ONCE
    )
    kept = journal_at(path)
    kept.begin()
    with progress.bar("answers of the teacher", len(asked)) as show, memory.limited(limit):
        show(0)
        writer = writing_plan.open(teacher)
        # In parts: what was said before a kill is kept where both answers are there.
        for start in range(0, len(asked), KEPT_TOGETHER):
            part = asked[start : start + KEPT_TOGETHER]
            for prompt, pair in _pairs(writer, load.tokenizer(teacher.path), part):
                written[prompt.sha256] = pair
                kept.add(record_of(prompt, pair))
                show(len(written))
            mx.clear_cache()
    return written


def _pairs(
    writer: TextWriter, tokenizer: Any, asked: Sequence[Prompt]
) -> Iterator[tuple[Prompt, AnswerPair]]:
    """Each prompt with its two answers, as soon as both have ended.

    A prompt is a seed itself, whatever else is asked.
    """
    count = len(asked)
    seeds = [SEED + int(prompt.sha256[:8], 16) for prompt in asked]
    draws = Draws(Sampling(TEMPERATURE, TOP_P), [*seeds, *([None] * count)])
    limits = [ANSWER_TOKENS] * count + [GREEDY_TOKENS] * count
    known = dict[int, Answer]()
    for number, answer in answered(writer, tokenizer, [*asked, *asked], limits, draws=draws):
        known[number] = answer
        place = number % count
        if place in known and place + count in known:
            pair = AnswerPair(sampled=known[place], greedy=known[place + count])
            yield asked[place], pair


def _header(teacher: Checkpoint) -> dict[str, Any]:
    """Everything that an answer depends on, apart from its prompt.

    Without the type that the teacher computes in, which changes roundings only."""
    settings = {
        "version": VERSION,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "seed": SEED,
        "answer_tokens": ANSWER_TOKENS,
        "greedy_tokens": GREEDY_TOKENS,
        "speech_sha256": keep.speech_sha256(teacher.path),
    }
    return {"teacher": run_folder.origin(teacher, "")["teacher"], "settings": settings}


def _kept_path(teacher: Checkpoint) -> Path:
    """The file of a teacher's answers."""
    header = _header(teacher)
    folder = hub.cache_root() / "evaluations" / header["teacher"][:32]
    settings = {**header["settings"], **half_version(precision.dtype_of(teacher))}
    return folder / f"answers-{json_sha256(settings)[:16]}.jsonl"


def _kept_of_student(student: Checkpoint, model_sha256: str | None) -> Kept:
    """The files of a student. model_sha256: its `answering.sha256`, where that is known."""
    settings = {
        "version": VERSION,
        "greedy_tokens": GREEDY_TOKENS,
    }
    return Kept(model_sha256 or answering.sha256(student), json_sha256(settings))


def shipped_for(teacher: Checkpoint, shipped: Path = SHIPPED) -> bool:
    """Whether the answers that come with the package are this teacher's."""
    header = read_header(shipped)
    if header.get("teacher") != run_folder.origin(teacher, "")["teacher"]:
        return False
    return bool(header["settings"]["speech_sha256"] == keep.speech_sha256(teacher.path))


def bits(model: Checkpoint, answers: TeacherAnswers) -> AnswerBits:
    """The cost of the teacher's sampled answers under a model, in one streamed pass.

    The end of the turn counts as a token where an answer has ended; one that was cut off has none.
    """
    logprobs = log_probabilities(model, answers.prompts, answers.sampled)
    nats = np.array([-values.sum() for values in logprobs], np.float64)
    return AnswerBits(nats, text_bytes(answers.sampled))


def judged(
    models: Mapping[str, Checkpoint],
    asked: Sequence[Prompt],
    limit: Budget,
    *,
    silent: Collection[str] = (),
    hashes: Mapping[str, str] | None = None,
) -> Judgement | None:
    """Judge all models, by name, by their answers; the first one is the teacher.

    silent: names of students that are judged by the teacher's answers alone and write none, since
    writing takes most of the time. hashes: `answering.sha256` of models, by name, as far as these
    are known; a student's kept answers are found by it.

    None where the teacher has no chat template. Another model without one is left out; both are
    said aloud. A prompt that one of them cannot take is left out for all.
    """
    teacher_name, teacher = next(iter(models.items()))
    judging = {}
    for name, model in models.items():
        if has_template(model):
            judging[name] = model
        else:
            cli.say(f"{model.path}: no chat template: its answers are not judged")
    if teacher_name not in judging:
        return None
    # All models get the same prompts, or their figures would not compare.
    taken = accepted(list(judging.values()), asked)
    answers = teacher_answers(teacher, taken, limit)
    if not answers.prompts:
        return None
    nats = np.array([pair.nats or 0.0 for pair in answers.pairs], np.float64)
    own_bits = AnswerBits(nats, text_bytes(answers.sampled))
    said = {teacher_name: ModelAnswers(own_bits, answers.greedy)}
    known_hashes = hashes or {}
    for name, model in judging.items():
        if name == teacher_name:
            continue
        said[name] = _student(
            model,
            answers,
            limit,
            kept=_kept_of_student(model, known_hashes.get(name)),
            writes=name not in silent,
        )
    return Judgement(answers, said)


def _student(
    student: Checkpoint,
    answers: TeacherAnswers,
    limit: Budget,
    *,
    kept: Kept,
    writes: bool,
) -> ModelAnswers:
    """One student, judged; whatever is not yet kept is asked now, and kept."""
    asked = answers.prompts
    written = list[Answer]()
    if writes:
        # The student writes only what it has not yet written.
        known = kept.answers()
        missing = [prompt for prompt in asked if prompt.sha256 not in known]
        new = greedy(student, missing, limit, keep=kept.keep_answer)
        for prompt, answer in zip(missing, new, strict=True):
            known[prompt.sha256] = answer
        written = [known[prompt.sha256] for prompt in asked]
    # The student reads the teacher's answers, in one streamed pass.
    nats = np.array(kept.measured(student, asked, answers.sampled), np.float64)
    return ModelAnswers(AnswerBits(nats, text_bytes(answers.sampled)), written)


def plan(
    models: Mapping[str, Checkpoint],
    asked: Sequence[Prompt],
    limit: Budget,
    hashes: Mapping[str, str] | None = None,
) -> StageCost | None:
    """The cost of `judged` for these models, the first of which is the teacher.

    hashes: as in `judged`. None where all answers and costs are kept. A student with all of its own
    kept costs nothing; any other one costs as if nothing were kept. MisError where the teacher has
    no template, or the budget is too small.
    """
    (_, teacher), *others = models.items()
    need_template(teacher)
    judging = {name: model for name, model in others if has_template(model)}
    taken = _fitting([teacher, *judging.values()], asked)
    pairs = _known_pairs(teacher)
    teacher_kept = all(prompt.sha256 in pairs for prompt in taken)
    known_hashes = hashes or {}
    students = []
    for name, model in judging.items():
        kept = _kept_of_student(model, known_hashes.get(name))
        # Costs are of the teacher's answers: without these none of a student's can be kept.
        if not teacher_kept or not all_kept(kept, taken, pairs):
            students.append(model)
    if not taken or (teacher_kept and not students):
        return None
    shapes = [model_of(model) for model in (teacher, *students)]
    cost = write.answers_cost(shapes, len(taken), limit, teacher_kept=teacher_kept)
    estimates.require_fit(limit, cost, other="")
    return cost
