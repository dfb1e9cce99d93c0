"""One model, one task: the mark of every question, kept by (model, task), so that nothing is asked twice.

What was asked before a stop is on disk when it goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx import cli
from mis_mlx.evaluation import lm_eval_tasks, option_likelihood, rewards
from mis_mlx.evaluation.questions import Task
from mis_mlx.hardware import memory
from mis_mlx.models import batch_sampling, distributed, load, mlx_generate, policy, streamed_decode
from mis_mlx.models.stream import Stream, load_checked
from mis_mlx.planner import estimates, machines
from mis_mlx.reporting import progress
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Budget, Checkpoint, MisError

VERSION = 2  # of how marks come about: kept ones of another version are not used
PART = 4096  # tokens of questions between two looks at the disk, where the whole model stays in memory
AT_ONCE = 16  # answers written together
Asked = dict[int, dict[str, Any]]  # question number: {"ll": [...]} or {"text", "mark"}


def sha256(checkpoint: Checkpoint) -> str:
    """Of config, tokenizer and weights, the type they compute in, and `VERSION`, in hex."""
    files = {t.file for t in checkpoint.tensors.values()} | {checkpoint.path / "config.json"}
    files |= {p for p in checkpoint.path.glob("tokenizer*") if p.is_file()} | set(checkpoint.path.glob("*.jinja"))
    known = sorted((f.name, hub.sha256(f)) for f in cli.counted("hash: file", files, len(files)))
    return hashlib.sha256(json.dumps([VERSION, str(policy.compute_dtype(checkpoint)), known]).encode()).hexdigest()


def kept(model_sha256: str, key: str) -> Path:
    """Where the answers of a model to a task are kept."""
    return hub.cache_root() / "evaluations" / model_sha256[:32] / f"{key[:32]}.jsonl"


def read(path: Path) -> Asked:
    """What is kept there; a line that a crash tore is not."""
    return {row["n"]: row for row in run_folder.records(path) if isinstance(row.get("n"), int)}


def todo(model_sha256: str, task: Task) -> tuple[Path, Asked, list[int]]:
    """(where answers are kept, those that are there, numbers of the questions still to be asked).

    Of several machines the first one keeps them.
    """
    path = kept(model_sha256, task.sha256)
    answers = {row["n"]: row for row in distributed.broadcast_json(lambda: list(read(path).values()))}
    return path, answers, [n for n in range(len(task.questions)) if n not in answers]


def plan(checkpoint: Checkpoint, model_sha256: str, task: Task, limit: Budget) -> estimates.StageCost | None:
    """What asking takes; None when all answers are kept. MisError where it cannot be done, before anything is asked."""
    left = todo(model_sha256, task)[2]
    if not left:
        return None
    return (_choosing if task.kind == "choice" else _writing)(checkpoint, task, left, limit).phase


def scores(checkpoint: Checkpoint, model_sha256: str, task: Task, limit: Budget, layers: bool = False) -> np.ndarray:
    """(n,) the mark of every question: 1 or 0 where an answer is right or wrong, else from 0 to 1.

    Several machines ask together; layers: with the model's blocks shared out among them, where options are chosen.
    """
    path, answers, left = todo(model_sha256, task)
    if distributed.is_main():
        DISK.make_folder(path.parent)
    choices = task.kind == "choice"
    ask = _choices(checkpoint, task, left, limit, layers) if choices else _texts(checkpoint, task, left, limit)
    with progress.bar(f"{checkpoint.path.name} {task.name}", len(task.questions)) as show:
        for row in ask if left else ():
            answers[row["n"]] = row
            if distributed.is_main():
                DISK.append(path, json.dumps(row, ensure_ascii=False))
            show(len(answers), "")
    return np.array([_mark(task, n, answers[n]) for n in range(len(task.questions))])


def by_harness(checkpoint: Checkpoint, ids: Sequence[str], count: int) -> dict[str, lm_eval_tasks.Marks]:
    """{task: marks} of the first `count` questions of lm-eval's tasks; a group gives several. One machine asks."""
    model = sha256(checkpoint)

    def rows_of(name: str) -> list[dict[str, Any]]:
        path = kept(model, hashlib.sha256(f"lm_eval {lm_eval_tasks.version()} {name} {count}".encode()).hexdigest())
        if not path.is_file():
            by_task = lm_eval_tasks.run(checkpoint.path, [name], count)
            rows = [{"task": t, "marks": m.marks.tolist(), "chance": m.chance.tolist(), "metric": m.metric}
                    for t, m in by_task.items()]  # fmt: skip
            DISK.make_folder(path.parent)
            DISK.replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return run_folder.records(path)

    rows = distributed.broadcast_json(lambda: [row for name in ids for row in rows_of(name)])
    return {r["task"]: lm_eval_tasks.Marks(np.array(r["marks"]), np.array(r["chance"]), r["metric"]) for r in rows}


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    """Opened once for all tasks: models come one after the other, in planning and in asking."""
    return load.tokenizer(folder)


def _mark(task: Task, number: int, row: dict[str, Any]) -> float:
    """As lm-eval: of options that are equally likely the first one counts as chosen."""
    if task.kind != "choice":
        return float(row["mark"])
    return float(np.argmax(np.array(row["ll"]) / _lengths(task, number)) == task.questions[number].right)


def _lengths(task: Task, number: int) -> list[int]:
    """What log-likelihoods of the options are divided by."""
    options = task.questions[number].options
    return [len(option.lstrip()) for option in options] if task.per_character else [1] * len(options)


def uniform(checkpoint: Checkpoint, task: Task) -> np.ndarray | None:
    """(n,) expected marks of a model to which all tokens are equally likely: the option of the fewest tokens is its
    answer, one of these where several are. Random weights do much the same. None where options are not chosen."""
    if task.kind != "choice":
        return None
    expected, tokenizer = np.zeros(len(task.questions)), _tokenizer(checkpoint.path)
    for n, q in enumerate(task.questions):
        tokens = list(map(len, option_likelihood.encode(tokenizer, q.context, q.options)[1]))
        rate = np.array(tokens) / _lengths(task, n)
        chosen = np.isclose(rate, rate.min())
        expected[n] = chosen[q.right] / chosen.sum()
    return expected


@dataclass(frozen=True)
class _Choosing:
    """Encoded questions, asked `part` tokens at a time; room_bytes for blocks that stay in memory between parts."""

    encoded: Sequence[option_likelihood.Encoded]
    part: int
    phase: estimates.StageCost
    room_bytes: int


def _choosing(checkpoint: Checkpoint, task: Task, left: Sequence[int], limit: Budget) -> _Choosing:
    tokenizer, m = _tokenizer(checkpoint.path), estimates.model_of(checkpoint)
    encoded = []
    for n in left:
        try:
            encoded.append(option_likelihood.encode(tokenizer, task.questions[n].context, task.questions[n].options))
        except MisError as error:
            raise MisError(f"{task.name} question {n + 1}: {error}") from None
    lengths = list(map(option_likelihood.length, encoded))
    longest, total = max(lengths), sum(lengths)
    if longest > (most := checkpoint.config.get("max_position_embeddings") or longest):
        which = f"{task.name} question {left[lengths.index(longest)] + 1}"
        raise MisError(f"{which} takes {longest} tokens, {checkpoint.path} reads {most}: shorten or remove it")
    rows = max(longest, option_likelihood.ROWS)

    def phase(tokens: int, again: bool = True) -> estimates.StageCost:
        one = dict(limit_bytes=limit.limit_bytes, spool=False, again=again)
        return estimates.streamed_pass(task.name, m, tokens, rows, rows, **one)  # type: ignore[arg-type]

    least = phase(rows, again=False)
    estimates.fit(limit, least, remedy=f"give --budget {estimates.flag(least.peak_bytes)} or more")
    whole = phase(min(total, PART)).pinned == m.shape.layers
    spare = estimates.room(limit.limit_bytes, least.peak_bytes) // (2 * m.shape.hidden * m.item)
    part = PART if whole else max(rows, min(total, spare))
    one = phase(min(total, part), again=whole or part < total)
    room = estimates.room(limit.limit_bytes, one.peak_bytes - one.pinned * m.block_work - m.head_work)
    passes = -(-total // part)
    read, flops = m.nbytes + (passes - 1) * one.read_bytes, estimates.forward_flops(m, total, rows)
    return _Choosing(encoded, part, replace(one, read_bytes=read, flops=flops), room)


def _choices(
    checkpoint: Checkpoint, task: Task, left: Sequence[int], limit: Budget, layers: bool
) -> Iterator[dict[str, Any]]:
    """Log-likelihoods of the options, part by part; a part is one pass of the weights."""
    c = _choosing(checkpoint, task, left, limit)
    part, rows = min(distributed.all_gather(c.part)), option_likelihood.ROWS
    with memory.limited(limit):
        stream = machines.opened(checkpoint, limit, c.room_bytes, part, rows, layers)
        lengths = list(map(option_likelihood.length, c.encoded))
        for at in option_likelihood.grouped(range(len(lengths)), lengths, part):
            for i, values in zip(at, option_likelihood.score(stream, [c.encoded[i] for i in at]), strict=True):
                yield {"n": left[i], "ll": values}


@dataclass(frozen=True)
class _Writing:
    """Prompts to continue: many at once where the model is `whole` in memory, else streamed, one by one."""

    prompts: Sequence[list[int]]
    ends: set[int]
    whole: bool
    phase: estimates.StageCost
    room_bytes: int = 0


def _writing(checkpoint: Checkpoint, task: Task, left: Sequence[int], limit: Budget) -> _Writing:
    m, tokenizer = estimates.model_of(checkpoint), _tokenizer(checkpoint.path)
    prompts = [mlx_generate.encode(tokenizer, task.questions[n].context) for n in left]
    longest, count = max(map(len, prompts)), len(left) * task.max_tokens
    flops = estimates.forward_flops(m, sum(map(len, prompts)) + count, longest)
    one = estimates.token(m, longest + task.max_tokens, limit.limit_bytes)
    keys = estimates.keys_bytes(m, 2 * AT_ONCE * (longest + task.max_tokens))
    work = keys + 8 * AT_ONCE * m.shape.vocab * 4 + estimates.workspace_bytes(m, longest, longest)
    peak = m.shape.layers * m.block_work + m.head_work + work + memory.process_bytes(limit.limit_bytes)
    if peak <= limit.limit_bytes:
        steps = -(-len(left) // AT_ONCE) * task.max_tokens
        phase = estimates.StageCost(task.name, m.nbytes, 0, peak, flops, touched_bytes=steps * one.touched_bytes)
        return _Writing(prompts, tokenizer.eos_token_ids, True, phase)
    estimates.fit(limit, one, remedy=f"give --budget {estimates.flag(one.peak_bytes)} or more")
    room = estimates.room(limit.limit_bytes, one.peak_bytes - one.pinned * m.block_work)
    phase = replace(one, read_bytes=count * one.read_bytes, flops=flops, touched_bytes=count * one.touched_bytes)
    return _Writing(prompts, tokenizer.eos_token_ids, False, phase, room)


def _texts(checkpoint: Checkpoint, task: Task, left: Sequence[int], limit: Budget) -> Iterator[dict[str, Any]]:
    """What the model writes, greedily, and its mark; a few at a time, of several machines by each."""
    tokenizer, w = _tokenizer(checkpoint.path), _writing(checkpoint, task, left, limit)
    with memory.limited(limit):
        write = _writer(checkpoint, w, task.max_tokens, limit)
        for begin in range(0, len(left), AT_ONCE * distributed.size()):
            few = slice(start := begin + AT_ONCE * distributed.rank(), start + AT_ONCE)
            written = [[t for t in ids if t not in w.ends] for ids in write(w.prompts[few])] if left[few] else []
            texts = [tokenizer.decode(ids) for ids in written]
            scores = _checked(task, left[few], texts) if texts else []
            mine = [
                {"n": n, "text": text, "mark": mark} for n, text, mark in zip(left[few], texts, scores, strict=True)
            ]
            for rows in distributed.all_gather(mine):
                yield from rows


def _writer(
    checkpoint: Checkpoint, w: _Writing, count: int, limit: Budget
) -> Callable[[Sequence[list[int]]], list[list[int]]]:
    """Greedy continuations of prompts."""
    dtype = policy.compute_dtype(checkpoint)
    if w.whole:
        model = load_checked(load.resident(checkpoint, dtype), f"{checkpoint.path}: ")
        draw = batch_sampling.sampler(0.0, 0)
        return lambda prompts: [g[0] for g in batch_sampling.groups(model, prompts, 1, count, w.ends, draw, AT_ONCE)]
    stream = Stream(checkpoint, dtype, w.room_bytes, checkpoint.nbytes > limit.limit_bytes)
    return lambda prompts: [
        [t for new in streamed_decode.decode(stream, p, count, w.ends) for t in new] for p in prompts
    ]


def _checked(task: Task, at: Sequence[int], texts: Sequence[str]) -> list[float]:
    """1 where the last line is the right answer (evaluation/rewards), in a process that can be stopped."""
    questions_ = [task.questions[n] for n in at]
    rows = [{"prompt": q.context, "answer": q.answer, "language": q.language} for q in questions_]
    scored = rewards.score(rewards.functions("correct", None), rows, [[text] for text in texts])
    return [float(s.totals[0] or 0.0) for s in scored]
