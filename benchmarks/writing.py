"""What writing takes where the model exceeds the budget: prompts block by block, or token by token.

    scripts/mis benchmarks/writing.py        # about 10 minutes on 2 cores

64 held-out prompts are answered under three budgets, none of which holds the model as it computes.
`after`: the writer as it is. `before`: every prompt is read a token a pass, in room for twice 256
tokens, as this program did once; one batch is measured, and counted as often as there are batches.
Seconds are of this run. All must say the same, and so must a model that is whole in memory, and
some prompts without the others: `parted` counts answers that differ, and says how far from the
border between two tokens the draw was there, as a share of all probability. Writes
benchmarks/results/<machine>/writing.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from laboratory import start, write

from mis_mlx import cli
from mis_mlx.data import token_windows
from mis_mlx.hardware import memory
from mis_mlx.judge import answers
from mis_mlx.judge import write as writing
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.writing import draws, text_writer
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.streamed_batch import Batch
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Budget, Checkpoint

AT_ONCE = (64, 32, 16, 8, 4, 1)
SAMPLING = Sampling(0.8, 0.95)
CACHE_STEP = 256  # tokens by which room grew before, and one step more
ALONE = 8  # prompts that are answered without the others


@dataclass(frozen=True)
class Settings:
    """What is written, and under which budgets."""

    model: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    count: int = 64
    """prompts"""
    max_tokens: int = 24
    """tokens of an answer"""
    budgets: tuple[int, ...] = (300, 450, 560)
    """MiB"""


@dataclass(frozen=True)
class Job:
    """A model and what it is asked: token ids of prompts; each has a seed of its own."""

    checkpoint: Checkpoint
    prompts: Sequence[list[int]]
    max_tokens: int
    stop: frozenset[int]

    def draws(self, numbers: Sequence[int]) -> Draws:
        """The random numbers of the prompts of these numbers."""
        return Draws(SAMPLING, [1000 + number for number in numbers])

    def write(self, writer: TextWriter, numbers: Sequence[int]) -> dict[int, list[int]]:
        """The answers to the prompts of these numbers."""
        asked = [self.prompts[number] for number in numbers]
        written = writer.write(asked, self.max_tokens, self.stop, self.draws(numbers))
        return dict(zip(numbers, written, strict=True))


def token_by_token(job: Job, model: Stream, numbers: Sequence[int]) -> dict[int, list[int]]:
    """As `Job.write`: every pass reads one more token of each text, of its prompt or its own."""
    draw = job.draws(numbers)
    texts = [list(job.prompts[number]) for number in numbers]
    ends = [len(text) + job.max_tokens for text in texts]
    batch = Batch(model)
    found = batch.read([], [text[:1] for text in texts])
    for position in range(1, max(ends)):
        drawing = [place for place, text in enumerate(texts) if len(text) == position]
        going_on = [place for place in drawing if position < ends[place]]
        if going_on:
            tokens = np.array(draw(found[mx.array(going_on)], going_on))
            for place, token in zip(going_on, tokens.tolist(), strict=True):
                if position > len(job.prompts[numbers[place]]) and texts[place][-1] in job.stop:
                    continue
                texts[place].append(token)
        if all(len(text) <= position for text in texts):
            break
        found = batch.read([[text[min(position, len(text) - 1)]] for text in texts], [])
    written = {}
    for number, text in zip(numbers, texts, strict=True):
        written[number] = text[len(job.prompts[number]) :]
    return written


def room_before(job: Job, limit: Budget) -> int:
    """How many texts fitted side by side in room for 256 tokens more than the longest one needs."""
    m = model_of(job.checkpoint)
    length = max(map(len, job.prompts)) + job.max_tokens
    places = CACHE_STEP * (1 + -(-length // CACHE_STEP))
    for at_once in AT_ONCE:
        cost = pass_cost.streamed_pass(
            "",
            m,
            tokens=at_once,
            micro_tokens=at_once,
            length=length,
            spool=False,
            beside_bytes=at_once * pass_cost.keys_bytes(m, places),
        )
        if memory.needed_bytes(cost.peak_bytes) <= limit.limit_bytes:
            return at_once
    raise AssertionError("nothing fits")


def to_the_border(job: Job, number: int, own: Sequence[int], other: Sequence[int]) -> float:
    """How far two answers' first different token was from being the other one.

    As a share of all probability, between the text's random number and the border of its token.
    """
    same = next(n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b)
    model = load.resident_model(job.checkpoint, mx.float32)
    text = [*job.prompts[number], *own[:same]]
    logits = model(mx.array([text]))[0, -1:]
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    kept = draws.nucleus(log_probs, SAMPLING.top_p) / SAMPLING.temperature
    below = np.array(mx.cumsum(mx.softmax(kept, axis=-1), axis=-1))[0]
    key = mx.random.key(1000 + number)
    for _ in range(same + 1):
        now, key = mx.random.split(key)
    share = mx.random.uniform(key=now).item()
    return float(np.abs(below - share).min())


def compared(
    job: Job, one: dict[int, list[int]], other: dict[int, list[int]]
) -> list[dict[str, float]]:
    """The answers that differ, of those that both have."""
    parted = []
    for number in sorted(one.keys() & other.keys()):
        if one[number] != other[number]:
            distance = to_the_border(job, number, one[number], other[number])
            parted.append({"prompt": number, "border": distance})
    return parted


def before(job: Job, limit: Budget) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """One batch, token by token, and what all of them take."""
    at_once = room_before(job, limit)
    model = Stream(job.checkpoint, headroom_bytes=0)
    batches = -(-len(job.prompts) // at_once)
    began = time.monotonic()
    written = token_by_token(job, model, range(min(at_once, len(job.prompts))))
    seconds = time.monotonic() - began
    return {
        "at_once": at_once,
        "batches": batches,
        "seconds": round(batches * seconds, 1),
        "read_bytes": batches * model.reader.nbytes,
    }, written


def after(job: Job, limit: Budget, asked: Any) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """All prompts by the writer, with what was planned for it."""
    plan = writing.plan(job.checkpoint, asked, job.max_tokens, limit, at_once=AT_ONCE)
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    began = time.monotonic()
    with memory.limited(limit):
        writer = plan.open(job.checkpoint)
        written = job.write(writer, range(len(job.prompts)))
    return {
        "at_once": plan.at_once,
        "seconds": round(time.monotonic() - began, 1),
        "read_bytes": writer.read_bytes,
        "planned_read_bytes": plan.cost.read_bytes,
        "peak_bytes": mx.get_peak_memory() - held,
        "planned_peak_bytes": plan.cost.peak_bytes + (plan.headroom_bytes or 0),
    }, written


def main(s: Settings) -> None:
    """Write, compare, print, store."""
    checkpoint = compute_type.open_to_compute(resolve.resolve_model(s.model).path)
    tokenizer = load.tokenizer(checkpoint.path)
    asked = answers.prompts(s.count)
    prompts = [token_windows.prompt_ids(prompt.messages, tokenizer) for prompt in asked]
    job = Job(checkpoint, prompts, s.max_tokens, frozenset(tokenizer.eos_token_ids))
    whole = job.write(text_writer.opened(checkpoint, None), range(len(prompts)))
    rows = list[dict[str, Any]]()
    said = [whole]
    for mib in s.budgets:
        limit = Budget(mib * 2**20)
        figures, written = after(job, limit, asked)
        said.append(written)
        rows.append({"budget": mib, "after": figures})
        cli.say(f"{mib} MiB: {figures}")
    alone = text_writer.opened(checkpoint, 0)
    few = range(0, len(prompts), max(1, len(prompts) // ALONE))
    said.append(job.write(alone, few[::-1]))
    rows[-1]["before"], written = before(job, Budget(s.budgets[-1] * 2**20))
    said.append(written)
    parted = []
    for one, other in pairwise(said):
        parted += compared(job, one, other)
    found = {
        "model": checkpoint.path.name,
        "prompts": len(prompts),
        "max_tokens": s.max_tokens,
        "model_bytes": model_of(checkpoint).whole_work,
        "budgets": rows,
        "answers_compared": sum(len(a.keys() & b.keys()) for a, b in pairwise(said)),
        "parted": parted,
    }
    table = list[list[str]]()
    for row in rows:
        for way in ("before", "after"):
            if way in row:
                v = row[way]
                read = f"{v['read_bytes'] / 1e9:.1f}"
                table.append([f"{row['budget']}", way, f"{v['at_once']}", read, f"{v['seconds']}"])
    head = ["budget, MiB", "", "at once", "GB read", "seconds"]
    print(markdown_table(head, table, words=2))
    print(f"{len(parted)} of {found['answers_compared']} answers part")
    write("writing", "scripts/mis benchmarks/writing.py", found)


if __name__ == "__main__":
    start(Settings, main)
