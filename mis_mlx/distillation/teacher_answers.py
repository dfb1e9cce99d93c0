"""Conversations to learn from: a teacher answers our prompts, and its usable answers are kept.

A student that learns from a manual alone can read manuals; asked a question, it answers nonsense.
So a share of every training text is the teacher's own answers to prompts (data/prompts). An answer
is kept if it has ended, says something and does not repeat itself. It depends on the teacher, its
prompt and the seed; not on the budget, nor on the answers written together with it, except for
rounding.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.data import chat_template
from mis_mlx.data.prompts import Prompt
from mis_mlx.data.rows import Row
from mis_mlx.evaluation import answer_figures, answers, repetition, writing_cost
from mis_mlx.evaluation.answer_records import Answer
from mis_mlx.hardware import memory
from mis_mlx.models import load, mlx_generate
from mis_mlx.models.model_size import ModelSize, model_of
from mis_mlx.models.text_writer import TextWriter
from mis_mlx.reporting import progress
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError

AT_ONCE = (64, 44, 24, 8, 1)  # answers written together, as many as fit
TYPICAL_TOKENS = 96  # of a prompt of ours, with a template around it
SENTENCE_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")
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
        asked = [[prompt.kind, prompt.language, *prompt.turns] for prompt in self.prompts]
        return {
            "prompts": json_sha256(asked),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def plan(model: ModelSize, settings: WritingSettings, limit: Budget) -> writing_cost.WritingPlan:
    """Memory and time of the writing. MisError where the teacher does not fit the budget."""
    answered = sum(len(prompt.turns) for prompt in settings.prompts)
    return writing_cost.plan_writing(
        model,
        answered,
        settings.max_tokens,
        limit,
        prompt_tokens=TYPICAL_TOKENS,
        at_once=AT_ONCE,
        name="teacher's answers",
    )


def template_sha256(teacher: Checkpoint) -> str:
    """Of the chat template and what it is told, in hex: others give other answers."""
    return chat_template.identity(load.tokenizer(teacher.path))


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
            kept.append({"messages": messages})
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


def write(teacher: Checkpoint, settings: WritingSettings, out: Path, limit: Budget) -> int:
    """Write the file `out`: a row {"messages": [...]} for each conversation; return their number.

    Until it is complete, batches are kept in a file next to it: a run that was stopped goes on with
    the batch that it was at. MisError where too few answers are usable.
    """
    planned = plan(model_of(teacher), settings, limit)
    size = planned.at_once
    total = len(settings.prompts)
    part = out.with_name(f".{out.name}.part")
    header = {
        "teacher": run_folder.origin(teacher, "")["teacher"],
        "template": template_sha256(teacher),
        "at_once": size,
        **settings.settings,
    }
    DISK.make_folder(out.parent)
    done = _done_before(part, header)
    tokenizer = load.tokenizer(teacher.path)
    with progress.bar("teacher's answers", total) as show, memory.limited(limit):
        show(min(len(done) * size, total))
        writer = TextWriter(teacher, planned.headroom_bytes, planned.direct)
        for start in range(0, total, size):
            if start in done:
                continue
            batch = settings.prompts[start : start + size]
            samplers = [_sampler(settings, start + number) for number in range(len(batch))]
            talks = _conversations(writer, tokenizer, batch, settings.max_tokens, samplers=samplers)
            record = {"start": start, "rows": talks}
            DISK.append(part, json.dumps(record, ensure_ascii=False))
            done[start] = talks
            show(min(start + size, total))
            mx.clear_cache()
    kept = []
    for start in sorted(done):
        kept += without_loops(done[start])
    if len(kept) < USABLE * total:
        why = f"only {len(kept)} of this teacher's {total} answers are neither empty nor loops"
        raise MisError(f"{why}: give --conversations 0, or --data with conversations of your own")
    write_rows(out, kept)
    DISK.discard(part)
    return len(kept)


def _done_before(part: Path, header: Mapping[str, Any]) -> dict[int, list[Row]]:
    """{number of its first prompt: its rows} of every batch in `part`, if its header is the same.

    Otherwise the file is begun anew.
    """
    first, *batches = run_folder.records(part) or [{}]
    if first == header:
        return {batch["start"]: batch["rows"] for batch in batches if "start" in batch}
    DISK.replace_text(part, json.dumps(header) + "\n")
    return {}


def _sampler(settings: WritingSettings, number: int) -> mlx_generate.Sampler:
    """Draws the tokens of one prompt, with random numbers of its own."""
    seed = settings.seed * len(settings.prompts) + number
    return mlx_generate.sampler(settings.temperature, seed, settings.top_p)


def _conversations(
    writer: TextWriter,
    tokenizer: Any,
    batch: Sequence[Prompt],
    max_tokens: int,
    *,
    samplers: Sequence[mlx_generate.Sampler],
) -> list[Row]:
    """The conversations of a batch.

    A turn is answered once those before it are. An answer of which nothing is kept, or that was cut
    off, ends its conversation; the turns before it stay.
    """
    talks: list[list[dict[str, str]]] = [[] for _ in batch]
    going_on = list(range(len(batch)))
    for turn in range(max(len(prompt.turns) for prompt in batch)):
        going_on = [number for number in going_on if len(batch[number].turns) > turn]
        if not going_on:
            break
        asked = []
        for number in going_on:
            prompt = batch[number]
            question = {"role": "user", "content": prompt.turns[turn]}
            asked.append(
                answers.Prompt(
                    messages=(*talks[number], question),
                    kind=prompt.kind,
                    language=prompt.language,
                )
            )
        drawing = [samplers[number] for number in going_on]
        replies = answers.answered(writer, tokenizer, asked, max_tokens, samplers=drawing)
        for number, asked_prompt, answer in zip(list(going_on), asked, replies, strict=True):
            text = kept_text(answer)
            if text:
                reply = {"role": "assistant", "content": text}
                talks[number] = [*asked_prompt.messages, reply]
            if not text or not answer.ended:
                going_on.remove(number)
    return [{"messages": talk} for talk in talks if talk]
