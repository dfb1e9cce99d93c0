"""What models answer to prompts that no training knows: what a student is judged by first.

A student with fine bits per byte of a manual may still answer nonsense. So it is asked:

    answers                what the teacher's own sampled answers cost a model, in bits per byte
    loops, empty, endless  how many of a model's greedy answers go wrong, in percent
    teacher_logprob        what the teacher makes of these answers, in nats per token

Every model reads a prompt through its own chat template and an answer with its own tokenizer. Bytes
are those of the answer's text, so models with different tokenizers compare. A model without a chat
template is not judged. Answers are written once and kept: the teacher's (evaluation/answer_records;
those of the default teacher come with the package) and its students' (evaluation/kept_answers)."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data import rows
from mis_mlx.evaluation import answer_records, answer_writing, answering
from mis_mlx.evaluation.answer_figures import AnswerBits, rows_of
from mis_mlx.evaluation.answer_likelihood import has_template, log_probabilities, need_template
from mis_mlx.evaluation.answer_records import Answer, AnswerPair, Prompt
from mis_mlx.evaluation.answer_writing import answered
from mis_mlx.evaluation.kept_answers import Kept, all_kept
from mis_mlx.hardware import memory
from mis_mlx.models import distributed, load, mlx_generate
from mis_mlx.models.mlx_generate import Sampler
from mis_mlx.models.text_writer import TextWriter
from mis_mlx.planner import estimates, writing
from mis_mlx.planner.writing import ANSWER_TOKENS, ANSWERS_AT_ONCE, GREEDY_TOKENS
from mis_mlx.reporting import progress
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError, Row

SETS = Path(__file__).parent / "sets"
PROMPTS = SETS / "prompts.jsonl"
SHIPPED = SETS / "teacher_answers.jsonl"  # of the default teacher, to all of PROMPTS
VERSION = 1  # of how answers come about: kept ones of another version are not used
TEMPERATURE = 0.8
TOP_P = 0.95
SEED = 0
LONGEST = 512  # tokens of a prompt and its sampled answer; a longer prompt is left out


@dataclass(frozen=True)
class TeacherAnswers:
    """The teacher's answers to prompts, in their order, and what they cost under the teacher
    itself.
    """

    prompts: list[Prompt]
    pairs: list[AnswerPair]

    @property
    def sampled(self) -> list[Answer]:
        """Those by which models are judged in bits."""
        return [pair.sampled for pair in self.pairs]

    @property
    def greedy(self) -> list[Answer]:
        """Those that stand beside a student's own."""
        return [pair.greedy for pair in self.pairs]

    @property
    def said(self) -> "Said":
        """What is known of the teacher, as of any other model."""
        nats = [pair.nats or 0.0 for pair in self.pairs]
        tokens = [
            np.full(pair.greedy_tokens, -pair.greedy_nats / max(1, pair.greedy_tokens))
            for pair in self.pairs
        ]
        return Said(
            AnswerBits(np.array(nats, np.float64), _nbytes(self.sampled)), self.greedy, tokens
        )

    def part(self, chosen: Sequence[int]) -> "TeacherAnswers":
        """Those to some of the prompts, by their numbers."""
        return TeacherAnswers(
            prompts=[self.prompts[number] for number in chosen],
            pairs=[self.pairs[number] for number in chosen],
        )


@dataclass(frozen=True)
class Said:
    """What is known of one model.

    bits: of the teacher's sampled answers under it. greedy: its own answers; none, where it was not
    asked. logprobs: [(n,)], what the teacher gives to the tokens of each of these, in nats."""

    bits: AnswerBits
    greedy: list[Answer]
    logprobs: list[np.ndarray]

    @property
    def logprob(self) -> float:
        """Mean over the tokens of all greedy answers."""
        return _mean(self.logprobs)

    def part(self, chosen: Sequence[int]) -> "Said":
        """The same of some of the prompts, by their numbers."""
        return Said(
            bits=AnswerBits(self.bits.nats[chosen], self.bits.nbytes[chosen]),
            greedy=[self.greedy[number] for number in chosen if self.greedy],
            logprobs=[self.logprobs[number] for number in chosen if self.logprobs],
        )


@dataclass(frozen=True)
class Judgement:
    """What was found of all models that were judged, by name; the first one is the teacher."""

    answers: TeacherAnswers
    said: dict[str, Said]

    @property
    def greedy(self) -> dict[str, list[Answer]]:
        """By name, a model's greedy answers to `answers.prompts`."""
        return {name: said.greedy for name, said in self.said.items()}

    @property
    def rows(self) -> list[Row]:
        """The figures of all models, as `rows_of` has them."""
        teacher_name = next(iter(self.said))
        found = list[Row]()
        for name, said in self.said.items():
            teacher_bits = None if name == teacher_name else self.said[teacher_name].bits
            found += rows_of(name, said.bits, said.greedy, said.logprob, teacher_bits=teacher_bits)
        return found

    def part(self, chosen: Sequence[int]) -> "Judgement":
        """The same of some of the prompts, by their numbers: those in one language, perhaps."""
        said = {name: of_model.part(chosen) for name, of_model in self.said.items()}
        return Judgement(self.answers.part(chosen), said)


def prompts(count: int, path: Path = PROMPTS) -> list[Prompt]:
    """`count` prompts of a file, spread evenly over it, or all where there are fewer.

    MisError lists bad rows."""
    good, problems = rows.judged(
        rows.parsed(path), f"{path.name} line", answer_records.prompt_fault
    )
    rows.refuse(problems)
    if not good:
        raise MisError(f"{path} holds 0 prompts: put one JSON object per line there")
    chosen = np.linspace(0, len(good) - 1, min(count, len(good))).round().astype(int)
    return [answer_records.prompt_of(good[number][0]) for number in np.unique(chosen)]


def accepted(models: Sequence[Checkpoint], asked: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that the chat templates of all these models render, short enough to be answered.

    A prompt and its answer have LONGEST tokens at most. What is left out is said."""
    left = _fitting(models, asked)
    if len(left) < len(asked):
        why = f"a chat template refuses them, or they and an answer take more than {LONGEST} tokens"
        cli.say(f"{len(asked) - len(left)} of {len(asked)} prompts are left out: {why}")
    return left


def _fitting(models: Sequence[Checkpoint], asked: Sequence[Prompt]) -> list[Prompt]:
    left = list(asked)
    for model in models:
        tokenizer = load.tokenizer(model.path)
        left = [prompt for prompt in left if _fits(tokenizer, prompt)]
    return left


def _fits(tokenizer: Any, prompt: Prompt) -> bool:
    try:
        ids = mlx_generate.chat_ids(tokenizer, prompt.messages)
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
    """A model's greedy answers, of GREEDY_TOKENS tokens at most.

    keep: takes each answer as soon as its batch is written. MisError where the model has no chat
    template, or does not fit the budget even streamed."""
    need_template(model)
    written = list[Answer]()
    if not asked:
        return written
    tokenizer = load.tokenizer(model.path)
    way = answer_writing.plan(model, asked, GREEDY_TOKENS, limit, at_once=ANSWERS_AT_ONCE)
    label = f"answers of {model.path.name}"
    with progress.bar(label, len(asked)) as show, memory.limited(limit):
        show(0)
        writer = TextWriter(model, way.room_bytes, way.direct)
        for start in range(0, len(asked), way.at_once):
            batch = asked[start : start + way.at_once]
            of_batch = answered(writer, tokenizer, batch, GREEDY_TOKENS)
            written += of_batch
            for prompt, answer in zip(batch, of_batch, strict=True):
                if keep is not None:
                    keep(prompt, answer)
            show(len(written))
            mx.clear_cache()
    return written


def teacher_answers(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    limit: Budget,
    shipped: Path = SHIPPED,
) -> TeacherAnswers:
    """The teacher's answers to those of the prompts that it accepts: shipped, kept, or written now.

    Every prompt has random numbers of its own: an answer does not depend on what is written beside
    it, nor on the budget, except for rounding. A run that was stopped goes on here.
    MisError: there is no chat template."""
    need_template(teacher)
    taken = accepted([teacher], asked)
    path = _kept_path(_header(teacher))
    known = _known_pairs(teacher, shipped)
    missing = {prompt.sha256: prompt for prompt in taken if prompt.sha256 not in known}
    if missing:
        known |= _write_missing(teacher, list(missing.values()), limit, path)
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
    if answer_records.read_header(shipped) == header:
        known |= answer_records.read_pairs(shipped)
    # which has what shipped ones cost, once that is measured
    known |= answer_records.read_pairs(_kept_path(header))
    return known


def _measured(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    known: Mapping[str, AnswerPair],
    path: Path,
) -> dict[str, AnswerPair]:
    """The answers to these prompts with what they cost under the teacher itself, which is kept."""
    pairs = [known[prompt.sha256] for prompt in asked]
    sampled = log_probabilities(teacher, asked, [pair.sampled for pair in pairs])
    greedy = log_probabilities(teacher, asked, [pair.greedy for pair in pairs])
    measured = dict[str, AnswerPair]()
    if distributed.is_main() and asked:
        DISK.make_folder(path.parent)
    for prompt, pair, of_sampled, of_greedy in zip(asked, pairs, sampled, greedy, strict=True):
        measured[prompt.sha256] = replace(
            pair,
            nats=answer_records.rounded(-float(of_sampled.sum())),
            greedy_nats=answer_records.rounded(-float(of_greedy.sum())),
            greedy_tokens=len(of_greedy),
        )
        if distributed.is_main():
            DISK.append(path, answer_records.line_of(prompt, measured[prompt.sha256]))
    return measured


def _write_missing(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    limit: Budget,
    path: Path,
) -> dict[str, AnswerPair]:
    """The answers to these prompts, by a prompt's sha256. Those of a batch are kept at once."""
    written = dict[str, AnswerPair]()
    tokenizer = load.tokenizer(teacher.path)
    way = answer_writing.plan(teacher, asked, ANSWER_TOKENS, limit, at_once=ANSWERS_AT_ONCE)
    if distributed.is_main():
        DISK.make_folder(path.parent)
    with progress.bar("answers of the teacher", len(asked)) as show, memory.limited(limit):
        show(0)
        writer = TextWriter(teacher, way.room_bytes, way.direct)
        for start in range(0, len(asked), way.at_once):
            batch = asked[start : start + way.at_once]
            samplers = [_sampler_of(prompt) for prompt in batch]
            sampled = answered(writer, tokenizer, batch, ANSWER_TOKENS, samplers=samplers)
            greedily = answered(writer, tokenizer, batch, GREEDY_TOKENS)
            for prompt, one, other in zip(batch, sampled, greedily, strict=True):
                written[prompt.sha256] = AnswerPair(sampled=one, greedy=other)
                if distributed.is_main():
                    DISK.append(path, answer_records.line_of(prompt, written[prompt.sha256]))
            show(len(written))
            mx.clear_cache()
    return written


def _sampler_of(prompt: Prompt) -> Sampler:
    """The random numbers of one prompt, whatever else is asked."""
    return mlx_generate.sampler(TEMPERATURE, SEED + int(prompt.sha256[:8], 16), TOP_P)


def _header(teacher: Checkpoint) -> dict[str, Any]:
    """What an answer depends on beside its prompt.

    Not the type that the teacher computes in: that changes roundings only."""
    template = str(load.tokenizer(teacher.path).chat_template)
    settings = {
        "version": VERSION,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "seed": SEED,
        "answer_tokens": ANSWER_TOKENS,
        "greedy_tokens": GREEDY_TOKENS,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    return {"teacher": _identity(teacher), "settings": settings}


def _identity(teacher: Checkpoint) -> str:
    return run_folder.origin(teacher, "")["teacher"]


def _kept_path(header: Mapping[str, Any]) -> Path:
    """Where a teacher's answers are kept."""
    folder = hub.cache_root() / "evaluations" / header["teacher"][:32]
    return folder / f"answers-{json_sha256(header['settings'])[:16]}.jsonl"


def _kept_of_student(student: Checkpoint, model_sha256: str | None) -> Kept:
    """What is kept of a student. model_sha256: answering.sha256 of it, where that is known."""
    settings = {
        "version": VERSION,
        "greedy_tokens": GREEDY_TOKENS,
        "stops": sorted(load.tokenizer(student.path).eos_token_ids),
    }
    return Kept(model_sha256 or answering.sha256(student), json_sha256(settings))


def _kept_of_teacher(teacher: Checkpoint) -> Kept:
    """What is kept of how likely the teacher finds its students' answers."""
    header = _header(teacher)
    return Kept(header["teacher"], json_sha256(header["settings"]))


def shipped_for(teacher: Checkpoint, shipped: Path = SHIPPED) -> bool:
    """Whether the answers that come with the package are this teacher's."""
    return answer_records.read_header(shipped).get("teacher") == _identity(teacher)


def ship(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    limit: Budget,
    path: Path = SHIPPED,
) -> TeacherAnswers:
    """Write the file of a teacher's answers that comes with the package."""
    found = teacher_answers(teacher, asked, limit, shipped=path)
    lines = [json.dumps(_header(teacher))]
    for prompt, pair in zip(found.prompts, found.pairs, strict=True):
        lines.append(answer_records.line_of(prompt, pair))
    DISK.replace_text(path, "".join(f"{line}\n" for line in lines))
    return found


def bits(model: Checkpoint, answers: TeacherAnswers) -> AnswerBits:
    """What the teacher's sampled answers cost under a model, in one streamed pass.

    The end of the turn counts as a token where an answer has ended; cut off, it has no end."""
    logprobs = log_probabilities(model, answers.prompts, answers.sampled)
    nats = [-values.sum() for values in logprobs]
    return AnswerBits(np.array(nats, np.float64), _nbytes(answers.sampled))


def _nbytes(answers: Sequence[Answer]) -> np.ndarray:
    """(N,) bytes of the texts."""
    return np.array([len(answer.text.encode()) for answer in answers], np.int64)


def teacher_logprob(
    teacher: Checkpoint,
    asked: Sequence[Prompt],
    answers: Sequence[Answer],
) -> float:
    """Mean log-probability per token, in nats, that the teacher gives to a student's answers.

    NaN where these hold no token. Low for nonsense; high for loops, too: every model expects that
    they go on."""
    return _mean(log_probabilities(teacher, asked, answers))


def _mean(logprobs: Sequence[np.ndarray]) -> float:
    count = sum(len(values) for values in logprobs)
    return float(np.concatenate(logprobs).mean()) if count else math.nan


def judged(
    models: Mapping[str, Checkpoint],
    asked: Sequence[Prompt],
    limit: Budget,
    *,
    silent: Collection[str] = (),
    hashes: Mapping[str, str] | None = None,
) -> Judgement | None:
    """What all models answer, by name; the first one is the teacher.

    silent: names of students that are judged by the teacher's answers alone, and write none: that
    takes most of the time. hashes: `answering.sha256` of models, by name, as far as these are
    known; what is kept of a student is found by it. None where the teacher has no chat template;
    another model without one is left out; both are said. A prompt that one of them cannot take is
    left out for all.
    """
    teacher_name, teacher = next(iter(models.items()))
    judging = dict[str, Checkpoint]()
    for name, model in models.items():
        if has_template(model):
            judging[name] = model
        else:
            cli.say(f"{model.path}: no chat template: its answers are not judged")
    if teacher_name not in judging:
        return None
    answers = teacher_answers(teacher, accepted(list(judging.values()), asked), limit)
    if not answers.prompts:
        return None
    said = {teacher_name: answers.said}
    for name, model in judging.items():
        if name != teacher_name:
            kept = _kept_of_student(model, (hashes or {}).get(name))
            said[name] = _student(
                model, teacher, answers, limit, kept=kept, writes=name not in silent
            )
    return Judgement(answers, said)


def _student(
    student: Checkpoint,
    teacher: Checkpoint,
    answers: TeacherAnswers,
    limit: Budget,
    *,
    kept: Kept,
    writes: bool,
) -> Said:
    """What is known of a student; what is not yet kept is asked, and kept."""
    asked = answers.prompts
    written = list[Answer]()
    logprobs = list[np.ndarray]()
    if writes:
        known = kept.answers()
        missing = [prompt for prompt in asked if prompt.sha256 not in known]
        new = greedy(student, missing, limit, keep=kept.keep_answer)
        known |= {prompt.sha256: answer for prompt, answer in zip(missing, new, strict=True)}
        written = [known[prompt.sha256] for prompt in asked]
        of_written = _kept_of_teacher(teacher).measured(teacher, asked, written)
        logprobs = [cost.logprobs for cost in of_written]
    nats = [cost.nats for cost in kept.measured(student, asked, answers.sampled)]
    return Said(AnswerBits(np.array(nats, np.float64), _nbytes(answers.sampled)), written, logprobs)


def plan(
    models: Mapping[str, Checkpoint],
    asked: Sequence[Prompt],
    limit: Budget,
    hashes: Mapping[str, str] | None = None,
) -> estimates.StageCost | None:
    """What it takes to judge these models, the first of which is the teacher, by their answers.

    hashes: as of `judged`. None where all of it is kept. A student of which all is kept costs
    nothing, any other one as if nothing was. MisError: the teacher has no template, or the budget
    is too small.
    """
    (_, teacher), *others = models.items()
    need_template(teacher)
    judging = {name: model for name, model in others if has_template(model)}
    taken = _fitting([teacher, *judging.values()], asked)
    pairs = _known_pairs(teacher)
    teacher_kept = all(prompt.sha256 in pairs for prompt in taken)
    students = list[Checkpoint]()
    for name, model in judging.items():
        kept = _kept_of_student(model, (hashes or {}).get(name))
        if not (teacher_kept and all_kept(kept, _kept_of_teacher(teacher), taken, pairs)):
            students.append(model)
    if not taken or (teacher_kept and not students):
        return None
    shapes = [estimates.model_of(model) for model in (teacher, *students)]
    cost = writing.answers(shapes, len(taken), limit, teacher_kept=teacher_kept)
    estimates.fit(limit, cost, other="")
    return cost
