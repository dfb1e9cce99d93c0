"""Conversations to learn from: a teacher answers our prompts, and its usable answers are kept.

A student that learns from a manual alone can read manuals; asked a question, it answers nonsense.
So a share of every training text is the teacher's own answers to prompts (data/prompts). An answer
is kept if it has ended, says something and does not repeat itself. It depends on the teacher, its
prompt and the seed; not on the budget, nor on the answers written together with it, except for
rounding.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.compute import precision
from mis_mlx.data import prompts as our_prompts
from mis_mlx.data.prompts import Prompt
from mis_mlx.data.rows import Row
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge import answer_figures, answers, keep, repetition
from mis_mlx.judge.prompts import Answer
from mis_mlx.judge.write import WritingPlan, plan_writing
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.passing.pass_cost import TENSOR_BYTES
from mis_mlx.models.writing import tool_calls
from mis_mlx.models.writing.draws import Draws, Sampling, half_version
from mis_mlx.models.writing.streamed_batch import Texts
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.reporting import progress
from mis_mlx.settings.recipe import EVAL_PROMPTS, EVAL_PROMPTS_STREAMED
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.storage.journal import Journal
from mis_mlx.types import Budget, Checkpoint, MisError

PHASE = "teacher's answers"
AT_ONCE = (64, 44, 24, 8, 1)  # answers written together, as many as fit
TYPICAL_TOKENS = 96  # of a prompt of ours, with a template around it
TOOLS_TOKENS = 512  # of one that tells of tools
SENTENCE_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")
SEED_BITS = 32  # of a seed that tell prompts apart; turns are told apart by those above
USABLE = 0.1  # share of the answers, below which a teacher is none to learn answers from


@dataclass(frozen=True)
class WritingSettings:
    """How a teacher is asked. temperature: 0 takes the likeliest token each time."""

    prompts: Sequence[Prompt]
    max_tokens: int = 192
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, apart from the teacher."""
        asked = [
            [prompt.kind, prompt.language, *prompt.turns, *prompt.tools] for prompt in self.prompts
        ]
        return {
            "prompts": json_sha256(asked),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def plan(model: ModelSize, settings: WritingSettings, limit: Budget) -> WritingPlan:
    """Memory and time of the writing. MisError where the teacher does not fit the budget."""
    answered = sum(len(prompt.turns) for prompt in settings.prompts)
    with_tools = any(prompt.tools for prompt in settings.prompts)
    before = TOOLS_TOKENS if with_tools else TYPICAL_TOKENS
    texts = Texts(answered, before, settings.max_tokens)
    return plan_writing(model, texts, limit, at_once=AT_ONCE)


def settings_of(count: int, seed: int = 0, *, tools: bool = False) -> WritingSettings:
    """How the first `count` of our prompts are answered. tools: as in `prompts.train`."""
    return WritingSettings(_prompts(count, tools), seed=seed)


@cache
def _prompts(count: int, tools: bool) -> tuple[Prompt, ...]:
    """The first ones, read once a process: a plan asks many times."""
    return tuple(our_prompts.train(count, tools=tools))


def is_whole(teacher: ModelSize, settings: WritingSettings, limit: Budget) -> bool:
    """Whether the teacher is whole in memory while it writes, in a plan of all phases."""
    left = limit.limit_bytes - TENSOR_BYTES * teacher.tensors
    try:
        return plan(teacher, settings, Budget(max(0, left))).headroom_bytes is None
    except MisError:
        return False


def answering_cost(job: DistillationSpec, limit: int) -> list[StageCost]:
    """[what the teacher takes to answer], [] where it is not asked or does not fit."""
    if not job.conversations:
        return []
    settings = settings_of(job.conversations, tools=job.asks_tools)
    try:
        cost = plan(job.whole_teacher, settings, Budget(limit)).cost
    except MisError:
        return []
    return [replace(cost, name=PHASE)]


def judging_prompts(teacher: ModelSize, limit: Budget) -> int:
    """How many held-out prompts teacher and student answer where nobody says a number."""
    if is_whole(teacher, settings_of(EVAL_PROMPTS_STREAMED), limit):
        return EVAL_PROMPTS
    return EVAL_PROMPTS_STREAMED


def kept_text(answer: Answer) -> str:
    """The part of an answer to learn from; '' where it says nothing or repeats itself.

    An answer that was cut off ends with its last whole sentence, if it has one.
    """
    verdict = answer_figures.verdict(answer)
    if verdict.loops or verdict.empty:
        return ""
    text = answer.text
    if not answer.ended:
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        if ends:
            text = text[: ends[-1]]
    return text.strip()


def without_loops(talks: Sequence[Row]) -> list[Row]:
    """Conversations up to the first answer that repeats itself; without one before it they go."""
    kept = []
    for talk in talks:
        messages = talk["messages"]
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and repetition.loops(message["content"]):
                messages = messages[: max(0, number - 1)]  # the question goes, too
                break
        if messages:
            kept.append({**talk, "messages": messages})
    return kept


def filter_again(file: Path) -> int:
    """Take loops out of a file that `write` made when others were known; return how many rows fell.

    Conversations are kept for years, and nobody wants to write them again for a better filter.
    """
    talks = run_folder.records(file)
    kept = without_loops(talks)
    if kept != talks:
        write_rows(file, kept)
    return len(talks) - len(kept)


def write_rows(file: Path, talks: Sequence[Row]) -> None:
    """The file of conversations, one a line."""
    lines = [json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks]
    DISK.replace_text(file, "".join(lines))


def write(
    teacher: Checkpoint,
    settings: WritingSettings,
    out: Path,
    limit: Budget,
) -> int:
    """Write the file `out`: a row {"messages": [...]} for each conversation; return their number.

    Until it is complete, answers are kept in a file next to it as they end: a run that was stopped
    goes on with those that are missing. MisError where too few answers are usable.
    """
    planned = plan(model_of(teacher), settings, limit)
    identity = {
        "teacher": run_folder.origin(teacher, "")["teacher"],
        "speech": keep.speech_sha256(teacher.path),
        **settings.settings,
        **half_version(precision.dtype_of(teacher)),
    }
    part = Journal(out.with_name(f".{out.name}.part"), ("turn", "number"), identity)
    said = dict[tuple[int, int], Answer]()
    for (turn, number), record in part.begin().items():
        said[turn, number] = Answer(record["text"], record["ended"])
    total = sum(len(prompt.turns) for prompt in settings.prompts)
    with progress.bar(PHASE, total) as show, memory.limited(limit):
        show(len(said))
        writer = planned.open(teacher)
        tokenizer = load.tokenizer(teacher.path)

        def ask(turn: int, asked: Mapping[int, answers.Prompt]) -> None:
            """Have the prompts answered, by number, whose answers are not there; keep them."""
            missing = [number for number in asked if (turn, number) not in said]
            replies = answers.answered(
                writer,
                tokenizer,
                [asked[number] for number in missing],
                settings.max_tokens,
                draws=_draws(settings, missing, turn),
            )
            for place, answer in replies:
                number = missing[place]
                said[turn, number] = answer
                part.add({"turn": turn, "number": number, **asdict(answer)})
                show(len(said))
            mx.clear_cache()

        kept = without_loops(_conversations(settings.prompts, said, ask, tokenizer))
        show(total)
    count = len(settings.prompts)
    if len(kept) < USABLE * count:
        why = f"of {count} {PHASE} only {len(kept)} are neither empty nor loops"
        raise MisError(f"{why}: give --conversations 0, or --data with conversations of your own")
    write_rows(out, kept)
    DISK.discard(part.path)
    return len(kept)


def _draws(settings: WritingSettings, numbers: Sequence[int], turn: int) -> Draws:
    """The random numbers of a turn's answers to the prompts of these numbers, each its own.

    They begin anew with every turn: how many a writer has taken is not the text's business.
    """
    first = settings.seed * len(settings.prompts) + (turn << SEED_BITS)
    sampling = Sampling(settings.temperature, settings.top_p)
    return Draws(sampling, [first + number for number in numbers])


def _conversations(
    prompts: Sequence[Prompt],
    said: Mapping[tuple[int, int], Answer],
    ask: Callable[[int, Mapping[int, answers.Prompt]], None],
    tokenizer: Any = None,
) -> list[Row]:
    """The conversations of all prompts, in their order.

    said: answers by turn and number of the prompt. ask(turn, prompts by number): puts their answers
    there. tokenizer: it knows how its model calls tools.

    A turn is answered once those before it are. An answer of which nothing is kept, or that was cut
    off, ends its conversation; the turns before it stay.
    """
    talks: list[list[dict[str, Any]]] = [[] for _ in prompts]
    going_on = list(range(len(prompts)))
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = dict[int, answers.Prompt]()
        for number in going_on:
            prompt = prompts[number]
            if len(prompt.turns) > turn:
                question = {"role": "user", "content": prompt.turns[turn]}
                asked[number] = answers.Prompt(
                    messages=(*talks[number], question),
                    kind=prompt.kind,
                    language=prompt.language,
                    tools=prompt.tools,
                )
        ask(turn, asked)
        going_on = []
        for number, question_of in asked.items():
            answer = said[turn, number]
            reply = _reply(answer, question_of, tokenizer)
            if reply is None:
                continue
            talks[number] = [*question_of.messages, reply]
            if answer.ended:
                going_on.append(number)
    rows = list[Row]()
    for prompt, talk in zip(prompts, talks, strict=True):
        if talk:
            tools = {"tools": list(prompt.tools)} if prompt.tools else {}
            rows.append({"messages": talk, **tools})
    return rows


def _reply(answer: Answer, question: answers.Prompt, tokenizer: Any) -> dict[str, Any] | None:
    """The message to learn from; None where nothing of an answer is kept."""
    text = kept_text(answer)
    if not text:
        return None
    if question.tools:
        return tool_calls.reply(text, tokenizer, question.tools)
    return {"role": "assistant", "content": text}
