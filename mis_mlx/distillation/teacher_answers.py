"""Conversations to learn from: a teacher answers our prompts, and what it says well is kept.

A student that learns from a manual alone can read manuals; asked a question, it answers nonsense.
So a share of every training text is what the teacher itself says when it is asked (data/prompts).
Kept are answers that have ended, say something and do not repeat themselves. An answer depends on
the teacher, its prompt and the seed; not on the budget, nor on what is written beside it, except
for rounding.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.data.prompts import Prompt
from mis_mlx.data.rows import Row
from mis_mlx.evaluation import answer_figures, answers
from mis_mlx.evaluation.answer_records import Answer
from mis_mlx.hardware import memory
from mis_mlx.models import load, mlx_generate
from mis_mlx.models.text_writer import TextWriter
from mis_mlx.planner import estimates, writing
from mis_mlx.reporting import progress
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError

AT_ONCE = (64, 44, 24, 8, 1)  # answers written together, as many as fit
TYPICAL_TOKENS = 96  # of a prompt of ours, with a template around it
SENTENCE_END = re.compile(r"[.!?][\"”’)]*(?=\s|$)")
USABLE = 0.1  # of the answers; a teacher of which fewer are is none to learn answers from


@dataclass(frozen=True)
class Writing:
    """How a teacher is asked. temperature 0: it takes the likeliest token each time."""

    prompts: Sequence[Prompt]
    max_tokens: int = 192
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on beside the teacher."""
        asked = json_sha256(
            [[prompt.kind, prompt.language, *prompt.turns] for prompt in self.prompts]
        )
        return {
            "prompts": asked,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def plan(model: estimates.ModelSize, how: Writing, limit: Budget) -> writing.WritingPlan:
    """What the writing takes. MisError where the teacher does not fit the budget in any way."""
    answered = sum(len(prompt.turns) for prompt in how.prompts)
    return writing.plan_writing(
        model,
        answered,
        how.max_tokens,
        limit,
        prompt_tokens=TYPICAL_TOKENS,
        at_once=AT_ONCE,
        name="teacher's answers",
    )


def template_sha256(teacher: Checkpoint) -> str:
    """Of the chat template, in hex: another one gives other answers."""
    return hashlib.sha256(str(load.tokenizer(teacher.path).chat_template).encode()).hexdigest()


def kept_text(answer: Answer) -> str:
    """What is kept of an answer to learn from; '' where it says nothing or repeats itself."""
    found = answer_figures.verdict(answer)
    if found.loops or found.empty:
        return ""
    if answer.ended:
        return answer.text.strip()
    ends = [match.end() for match in SENTENCE_END.finditer(answer.text)]
    return answer.text[: ends[-1]].strip() if ends else answer.text.strip()


def write(teacher: Checkpoint, how: Writing, out: Path, limit: Budget) -> int:
    """Put the file `out` in place: a row {"messages": [...]} for every conversation that is kept;
    their number.

    What is written so far stands in a file beside it: a run that was stopped goes on there, with
    the batch that it was at. MisError where hardly any answer is usable.
    """
    found = plan(estimates.model_of(teacher), how, limit)
    part = out.with_name(f".{out.name}.part")
    header = {
        "teacher": run_folder.origin(teacher, "")["teacher"],
        "template": template_sha256(teacher),
        "at_once": found.at_once,
        **how.settings,
    }
    DISK.make_folder(out.parent)
    done = _done_before(part, header)
    tokenizer = load.tokenizer(teacher.path)
    with progress.bar("teacher's answers", len(how.prompts)) as show, memory.limited(limit):
        show(min(len(done) * found.at_once, len(how.prompts)))
        writer = TextWriter(teacher, found.room_bytes, found.direct)
        for start in range(0, len(how.prompts), found.at_once):
            if start in done:
                continue
            batch = how.prompts[start : start + found.at_once]
            samplers = [_sampler(how, start + number) for number in range(len(batch))]
            talks = _conversations(writer, tokenizer, batch, how.max_tokens, samplers)
            DISK.append(part, json.dumps({"start": start, "rows": talks}, ensure_ascii=False))
            done[start] = talks
            show(min(start + found.at_once, len(how.prompts)))
            mx.clear_cache()
    kept = [row for start in sorted(done) for row in done[start]]
    if len(kept) < USABLE * len(how.prompts):
        why = (
            f"of {len(how.prompts)} answers of this teacher {len(kept)} are neither empty nor loops"
        )
        raise MisError(f"{why}: give --conversations 0, or --data with conversations of your own")
    DISK.replace_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    DISK.discard(part)
    return len(kept)


def _done_before(part: Path, header: Mapping[str, Any]) -> dict[int, list[Row]]:
    """{number of its first prompt: its rows} of every batch that stands in `part`, if that was
    begun alike.
    """
    first, *batches = run_folder.records(part) or [{}]
    if first == header:
        return {batch["start"]: batch["rows"] for batch in batches if "start" in batch}
    DISK.replace_text(part, json.dumps(header) + "\n")
    return {}


def _sampler(how: Writing, number: int) -> mlx_generate.Sampler:
    """The random numbers of one prompt."""
    return mlx_generate.sampler(how.temperature, how.seed * len(how.prompts) + number, how.top_p)


def _conversations(
    writer: TextWriter,
    tokenizer: Any,
    batch: Sequence[Prompt],
    max_tokens: int,
    samplers: Sequence[mlx_generate.Sampler],
) -> list[Row]:
    """The conversations of a batch. A turn is answered once those before it are. An answer of which
    nothing is kept, or that was cut off, ends its conversation; what was said before it stays.
    """
    talks = [list[dict[str, str]]() for _ in batch]
    going_on = list(range(len(batch)))
    for turn in range(max(len(prompt.turns) for prompt in batch)):
        going_on = [number for number in going_on if len(batch[number].turns) > turn]
        if not going_on:
            break
        asked = [
            answers.Prompt(
                messages=(*talks[number], {"role": "user", "content": batch[number].turns[turn]}),
                kind=batch[number].kind,
                language=batch[number].language,
            )
            for number in going_on
        ]
        drawing = [samplers[number] for number in going_on]
        said = answers.answered(writer, tokenizer, asked, max_tokens, samplers=drawing)
        for number, prompt, answer in zip(list(going_on), asked, said, strict=True):
            text = kept_text(answer)
            if text:
                talks[number] = [*prompt.messages, {"role": "assistant", "content": text}]
            if not text or not answer.ended:
                going_on.remove(number)
    return [{"messages": talk} for talk in talks if talk]
