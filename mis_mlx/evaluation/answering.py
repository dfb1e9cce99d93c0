"""One model, one task: the mark of every question, kept by (model, task), so that nothing is asked
twice.

lm-eval's own tasks go through mlx-lm's adapter (mlx_lm.evaluate). These need the extra `evaluate`,
data sets from the hub, and the whole model in memory.
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx import cli
from mis_mlx.evaluation import instructions, option_likelihood, questions, rewards
from mis_mlx.evaluation.questions import Task
from mis_mlx.hardware import memory
from mis_mlx.models import distributed, load, mlx_generate, policy, streamed_decode
from mis_mlx.models.stream import Stream, load_checked
from mis_mlx.planner import estimates, machines
from mis_mlx.reporting import progress
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import DISK, file_sha256
from mis_mlx.types import Budget, Checkpoint, MisError, grouped

VERSION = 2  # of how marks come about: kept ones of another version are not used
# tokens of questions between two looks at the disk, where the whole model stays in memory
PART = 4096
# Answers written together, as many as fit. In the same CPU time 48 have 1.3 times the tokens of 16,
# and 96 have fewer than 48 (SmolLM2-135M, float32, one thread).
AT_ONCE = (48, 32, 16, 4, 1)
CACHE_STEP = 256  # tokens by which mlx-lm's caches grow
METRICS = ("acc", "exact_match", "f1")  # of lm-eval; the first one that a task has is its mark
# lm-eval's record of one question: "doc_id", "filtered_resps", and its metrics by name
Sample = Mapping[str, Any]
Writer = Callable[[Sequence[list[int]]], list[list[int]]]  # prompts to their continuations
# question number: {"ll": [...]}, {"text", "mark"} or {"text", "followed"}
Asked = dict[int, dict[str, Any]]
# task, numbers of questions, the texts written
Judge = Callable[[Task, Sequence[int], Sequence[str]], list[float]]
# what it takes; what does it, in a budget
Asking = tuple[estimates.StageCost, Callable[[], Iterator[dict[str, Any]]]]


def sha256(checkpoint: Checkpoint) -> str:
    """Of config, tokenizer and weights, the type they compute in, and `VERSION`, in hex."""
    files = {t.file for t in checkpoint.tensors.values()} | {checkpoint.path / "config.json"}
    files |= {p for p in checkpoint.path.glob("tokenizer*") if p.is_file()} | set(
        checkpoint.path.glob("*.jinja")
    )
    known = sorted((f.name, file_sha256(f)) for f in cli.counted("hash: file", files, len(files)))
    return hashlib.sha256(
        json.dumps([VERSION, str(policy.compute_dtype(checkpoint)), known]).encode()
    ).hexdigest()


def kept(model_sha256: str, key: str) -> Path:
    """Where a model's answers to a task are kept."""
    return hub.cache_root() / "evaluations" / model_sha256[:32] / f"{key[:32]}.jsonl"


def read(path: Path) -> Asked:
    """What is kept there; a line that a crash tore is not."""
    return {row["n"]: row for row in run_folder.records(path) if isinstance(row.get("n"), int)}


def todo(model_sha256: str, task: Task) -> tuple[Path, Asked, list[int]]:
    """(where answers are kept, by the first of several machines; those that are there; numbers of
    questions left).
    """
    path = kept(model_sha256, task.sha256)
    answers = {
        row["n"]: row for row in distributed.broadcast_json(lambda: list(read(path).values()))
    }
    return path, answers, [n for n in range(len(task.questions)) if n not in answers]


def plan(
    checkpoint: Checkpoint, model_sha256: str, task: Task, limit: Budget
) -> estimates.StageCost | None:
    """What asking takes; None when all answers are kept. MisError where it cannot be done, before
    anything is asked.
    """
    left = todo(model_sha256, task)[2]
    return ASKING[task.kind](checkpoint, task, left, limit, False)[0] if left else None


def scores(
    checkpoint: Checkpoint, model_sha256: str, task: Task, limit: Budget, layers: bool = False
) -> np.ndarray:
    """(n,) the mark of every question: 1 or 0 where an answer is right or wrong, otherwise from 0
    to 1, or, for instructions, as `instructions.marks`. Several machines ask together; layers: with
    the model's blocks shared out among them, where options are chosen.
    """
    path, answers, left = todo(model_sha256, task)
    if distributed.is_main():
        DISK.make_folder(path.parent)
    with (
        progress.bar(f"{checkpoint.path.name} {task.name}", len(task.questions)) as show,
        memory.limited(limit),
    ):
        for row in ASKING[task.kind](checkpoint, task, left, limit, layers)[1]() if left else ():
            answers[row["n"]] = row
            if distributed.is_main():
                DISK.append(path, json.dumps(row, ensure_ascii=False))
            show(len(answers))
    if task.kind == "checked":
        return np.array([float(answers[n]["mark"]) for n in range(len(task.questions))])
    if task.kind == "instructions":
        return np.array(instructions.marks(*_followed_of(task, answers)))
    # As lm-eval: of options that are equally likely the first one counts as chosen.
    chosen = [
        np.argmax(np.array(answers[n]["ll"]) / _lengths(task, n))
        for n in range(len(task.questions))
    ]
    return np.array([float(at == q.right) for at, q in zip(chosen, task.questions, strict=True)])


def levels(model_sha256: str, task: Task) -> instructions.Levels | None:
    """IFEval's two accuracies, out of answers that `scores` has kept; None for a task without
    instructions.
    """
    if task.kind != "instructions":
        return None
    _, answers, _ = todo(model_sha256, task)
    return instructions.levels(*_followed_of(task, answers))


def chance(task: Task) -> np.ndarray:
    """(n,) expected marks of somebody who cannot read: of instructions, those of the constant
    answer PLAIN.
    """
    if task.kind == "instructions":
        return _constant_marks(task, instructions.PLAIN)
    return np.array([question.chance for question in task.questions])


def best_constant(task: Task) -> tuple[float, str] | None:
    """(share, answer) of U Zośki: the best constant answer, and of instructions the constant
    DRESSED.
    """
    if task.kind == "instructions":
        return float(_constant_marks(task, instructions.DRESSED).mean()), instructions.DRESSED
    return questions.best_constant_answer(task)


def _constant_marks(task: Task, text: str) -> np.ndarray:
    """(n,) marks for one and the same answer to all questions."""
    count = len(task.questions)
    followed = [int(done) for done in _followed(task, range(count), [text] * count)]
    return np.array(
        instructions.marks(followed, [len(question.instructions) for question in task.questions])
    )


def _followed_of(task: Task, answers: Asked) -> tuple[list[int], list[int]]:
    """(n,) how many instructions of each question are followed, and (n,) how many it has."""
    followed = [int(answers[n]["followed"]) for n in range(len(task.questions))]
    return followed, [len(question.instructions) for question in task.questions]


@contextmanager
def _hushed() -> Iterator[None]:
    """lm-eval's and datasets' log off the user's screen; their errors still come."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@cache
def _manager() -> Any:
    """lm-eval's list of tasks, whose 14,000 files take 10 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_harness(ids: Sequence[str]) -> None:
    """MisError where lm-eval is not installed; and for ids that it does not have, with the nearest
    ones.
    """
    if find_spec("lm_eval") is None:
        raise MisError(
            "lm-eval's tasks need lm-eval, which is not here: pip install 'mis-mlx[evaluate]'"
        )
    with _hushed():
        known = _manager().all_tasks
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5) or known[:3]
            raise MisError(f"lm-eval has no task {name}: did you mean {' or '.join(near)}?")


def samples(folder: Path, name: str, count: int) -> dict[str, list[Sample]]:
    """{task: lm-eval's own records} of `count` questions, greedy; a group gives its tasks.
    MisError: no data came.
    """
    with _hushed():
        import lm_eval

        adapter = load.mlx_lm("evaluate").MLXLM(
            str(folder), use_chat_template=False, trust_remote_code=False
        )
        adapter._model.set_dtype(policy.compute_dtype(load.open_checkpoint(folder)))
        how: dict[str, Any] = {"limit": count, "log_samples": True, "bootstrap_iters": 0}
        how |= {
            f"{kind}_seed": 0
            for kind in ("random", "numpy_random", "torch_random", "fewshot_random")
        }
        try:
            found = lm_eval.simple_evaluate(adapter, tasks=[name], task_manager=_manager(), **how)
        # as hub, datasets and requests say that nothing comes
        except (OSError, ValueError, RuntimeError) as error:
            why = f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            remedy = "check the network, for the hub's data, or take --tasks polish-offline"
            raise MisError(f"lm-eval could not run {why}: {remedy}") from None
    return found["samples"]


def marks(name: str, found: Sequence[Sample]) -> dict[str, Any]:
    """Of a task, for JSON: its name; marks, 0 to 1, and chance of all questions; metric. Of one
    filter of several.
    """
    ordered = sorted(
        (s for s in found if s.get("filter") == found[0].get("filter")), key=lambda s: s["doc_id"]
    )
    metric = next((m for m in METRICS if m in ordered[0]), None)
    if metric is None:
        raise MisError(f"{name} is scored by none of {', '.join(METRICS)}: take a task that is")
    choice = ordered[0].get("resps") and metric == "acc"
    chance = [1 / len(s["resps"]) if choice and len(s["resps"]) > 1 else 0.0 for s in ordered]
    return {
        "task": name,
        "marks": [float(np.mean(s[metric])) for s in ordered],
        "chance": chance,
        "metric": metric,
    }


def by_harness(
    checkpoint: Checkpoint, model_sha256: str, ids: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """`marks` of the first `count` questions of each; a group gives several. One machine asks."""

    def rows_of(name: str) -> list[dict[str, Any]]:
        key = f"lm_eval {importlib.metadata.version('lm_eval')} {name} {count}"
        path = kept(model_sha256, hashlib.sha256(key.encode()).hexdigest())
        if not path.is_file():
            by_task = samples(checkpoint.path, name, count)
            DISK.make_folder(path.parent)
            DISK.replace_text(
                path, "".join(json.dumps(marks(t, found)) + "\n" for t, found in by_task.items())
            )
        return run_folder.records(path)

    return distributed.broadcast_json(lambda: [row for name in ids for row in rows_of(name)])


# Opened once for all tasks: models come one after the other, in planning and in asking.
_tokenizer = lru_cache(maxsize=1)(load.tokenizer)


def _lengths(task: Task, number: int) -> list[int]:
    """What log-likelihoods of the options are divided by."""
    options = task.questions[number].options
    return (
        [len(option.lstrip()) for option in options] if task.per_character else [1] * len(options)
    )


def uniform(checkpoint: Checkpoint, task: Task) -> np.ndarray | None:
    """(n,) expected marks of a model to which all tokens are equally likely: the option of the
    fewest tokens is its answer, one of these where several are. Random weights do much the same.
    None where options are not chosen.
    """
    if task.kind != "choice":
        return None
    expected = np.zeros(len(task.questions))
    tokenizer = _tokenizer(checkpoint.path)
    for n, q in enumerate(task.questions):
        tokens = list(map(len, option_likelihood.encode(tokenizer, q.context, q.options)[1]))
        rate = np.array(tokens) / _lengths(task, n)
        chosen = np.isclose(rate, rate.min())
        expected[n] = chosen[q.right] / chosen.sum()
    return expected


def _choosing(
    checkpoint: Checkpoint, task: Task, left: Sequence[int], limit: Budget, layers: bool
) -> Asking:
    """Log-likelihoods of the options, part by part; a part is one pass of the weights."""
    tokenizer = _tokenizer(checkpoint.path)
    m = estimates.model_of(checkpoint)
    encoded = []
    for n in left:
        try:
            encoded.append(
                option_likelihood.encode(
                    tokenizer, task.questions[n].context, task.questions[n].options
                )
            )
        except MisError as error:
            raise MisError(f"{task.name} question {n + 1}: {error}") from None
    lengths = list(map(option_likelihood.length, encoded))
    longest = max(lengths)
    total = sum(lengths)
    if longest > (most := checkpoint.config.get("max_position_embeddings") or longest):
        which = f"{task.name} question {left[lengths.index(longest)] + 1}"
        raise MisError(
            f"{which} takes {longest} tokens, {checkpoint.path} reads {most}: shorten or remove it"
        )
    rows = max(longest, option_likelihood.ROWS)
    how: dict[str, Any] = {
        "micro_tokens": rows,
        "length": rows,
        "limit_bytes": limit.limit_bytes,
        "spool": False,
    }
    phase = partial(estimates.streamed_pass, task.name, m, **how)
    least = phase(tokens=rows)
    estimates.fit(limit, least, other="")
    whole = phase(tokens=min(total, PART), again=True).pinned == m.shape.layers
    spare = estimates.room(limit.limit_bytes, least.peak_bytes) // (2 * m.shape.hidden * m.item)
    part = PART if whole else max(rows, min(total, spare))
    one = phase(tokens=min(total, part), again=whole or part < total)
    room = estimates.room(
        limit.limit_bytes, one.peak_bytes - one.pinned * m.block_work - m.head_work
    )
    read = m.nbytes + (-(-total // part) - 1) * one.read_bytes

    def ask() -> Iterator[dict[str, Any]]:
        tokens = min(distributed.all_gather(part))
        stream = machines.opened(checkpoint, limit, room, tokens, option_likelihood.ROWS, layers)
        for at in grouped(range(len(lengths)), lengths.__getitem__, tokens):
            for i, values in zip(
                at, option_likelihood.score(stream, [encoded[i] for i in at]), strict=True
            ):
                yield {"n": left[i], "ll": values}

    return replace(one, read_bytes=read, flops=estimates.forward_flops(m, total, rows)), ask


def _writing(
    checkpoint: Checkpoint, task: Task, left: Sequence[int], limit: Budget, _: bool
) -> Asking:
    """What the model writes, greedily, and its mark: many together if it is whole in memory, else
    streamed, in turn.
    """
    m = estimates.model_of(checkpoint)
    tokenizer = _tokenizer(checkpoint.path)
    most = task.max_tokens
    prompts = [mlx_generate.encode(tokenizer, task.questions[n].context) for n in left]
    longest = max(map(len, prompts))
    count = len(left) * most
    flops = estimates.forward_flops(m, sum(map(len, prompts)) + count, longest)
    one = estimates.token(m, longest + most, limit.limit_bytes)
    room = 0
    fitting = [
        size
        for size in AT_ONCE
        if _resident_bytes(m, size, longest, most, limit) <= limit.limit_bytes
    ]
    at_once = fitting[0] if fitting else AT_ONCE[-1]
    if fitting:
        phase = estimates.StageCost(
            task.name,
            read_bytes=m.nbytes,
            written_bytes=0,
            peak_bytes=_resident_bytes(m, at_once, longest, most, limit),
            flops=flops,
            touched_bytes=-(-len(left) // at_once) * most * one.touched_bytes,
        )
    else:
        estimates.fit(limit, one, other="")
        room = estimates.room(limit.limit_bytes, one.peak_bytes - one.pinned * m.block_work)
        phase = replace(
            one,
            read_bytes=count * one.read_bytes,
            flops=flops,
            touched_bytes=count * one.touched_bytes,
        )

    def ask() -> Iterator[dict[str, Any]]:
        ends = tokenizer.eos_token_ids
        together = min(distributed.all_gather(at_once))  # of several machines, the smallest one's
        write = _writer(
            checkpoint,
            limit,
            whole=bool(fitting),
            room=room,
            ends=ends,
            count=most,
            at_once=together,
        )
        for begin in range(0, len(left), together * distributed.size()):
            few = slice(start := begin + together * distributed.rank(), start + together)
            written = write(prompts[few]) if left[few] else []
            texts = [tokenizer.decode([t for t in ids if t not in ends]) for ids in written]
            mine = _judged(task, left[few], texts) if texts else []
            for rows in distributed.all_gather(mine):
                yield from rows

    return phase, ask


def _resident_bytes(
    m: estimates.ModelSize, at_once: int, longest: int, most: int, limit: Budget
) -> int:
    """Memory of a model that is whole there and writes `at_once` answers of `most` tokens after
    `longest`.
    """
    places = CACHE_STEP * -(-(longest + most) // CACHE_STEP)
    # Keys and values of the prompts alone, of the batch, and of the batch once more while its cache
    # grows.
    keys = 3 * at_once * estimates.keys_bytes(m, places)
    logits = 8 * at_once * m.shape.vocab * 4
    weights = m.shape.layers * m.block_work + m.head_work
    reading = estimates.workspace_bytes(m, longest, longest)
    return weights + keys + logits + reading + memory.process_bytes(limit.limit_bytes)


def _writer(
    checkpoint: Checkpoint,
    limit: Budget,
    *,
    whole: bool,
    room: int,
    ends: set[int],
    count: int,
    at_once: int,
) -> Writer:
    """What writes up to `count` tokens after each prompt. whole: the model is whole in memory,
    `at_once` answers are written together; otherwise it is streamed, with `room` bytes for blocks
    that stay.
    """
    dtype = policy.compute_dtype(checkpoint)
    if whole:
        model = load_checked(load.resident(checkpoint, dtype), f"{checkpoint.path}: ")
        draw = mlx_generate.sampler(0.0, 0)
        return lambda prompts: [
            g[0] for g in mlx_generate.groups(model, prompts, 1, count, ends, draw, at_once)
        ]
    stream = Stream(checkpoint, dtype, room, checkpoint.nbytes > limit.limit_bytes)
    return lambda prompts: [
        list(chain.from_iterable(streamed_decode.decode(stream, p, count, ends))) for p in prompts
    ]


def _judged(task: Task, at: Sequence[int], texts: Sequence[str]) -> list[dict[str, Any]]:
    """What is kept of each answer: its question's number, its text, and what the judge of its kind
    says.
    """
    key, judge = JUDGES[task.kind]
    verdicts = judge(task, at, texts)
    return [
        {"n": n, "text": text, key: verdict}
        for n, text, verdict in zip(at, texts, verdicts, strict=True)
    ]


def _checked(task: Task, at: Sequence[int], texts: Sequence[str]) -> list[float]:
    """1 where the last line is the right answer (evaluation/rewards), in a process that can be
    stopped.
    """
    asked = [task.questions[n] for n in at]
    rows = [{"prompt": q.context, "answer": q.answer, "language": q.language} for q in asked]
    scored = rewards.score(rewards.functions("correct", None), rows, [[text] for text in texts])
    return [float(s.totals[0] or 0.0) for s in scored]


def _followed(task: Task, at: Sequence[int], texts: Sequence[str]) -> list[float]:
    """How many of its instructions each answer follows. One that the checker cannot read follows
    none, and is named.
    """
    rows = [
        {"prompt": task.questions[n].context, "asked": task.questions[n].instructions} for n in at
    ]
    checker = rewards.Function(
        name="if-verifiable",
        source=instructions.__name__,
        function=instructions.followed.__name__,
        seconds=instructions.SECONDS,
    )
    scored = rewards.score([checker], rows, [[text] for text in texts])
    for n, score in zip(at, scored, strict=True):
        for note in score.notes:
            cli.say(
                f"{task.name} question {n + 1}: its answer counts as following nothing ({note})"
            )
    return [float(score.totals[0] or 0.0) for score in scored]


# By the kind of a task: the key of what is kept, and who judges.
JUDGES: dict[str, tuple[str, Judge]] = {
    "checked": ("mark", _checked),
    "instructions": ("followed", _followed),
}
# By the kind of a task; MisError: it cannot be done.
ASKING: dict[str, Callable[..., Asking]] = {
    "choice": _choosing,
    "checked": _writing,
    "instructions": _writing,
}
