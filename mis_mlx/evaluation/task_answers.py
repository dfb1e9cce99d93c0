"""A model writes answers to a task's questions, and judges say how good they are.

The model is whole in memory where it fits, and many answers are written together. Otherwise it is
streamed from disk, and writes one answer after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.evaluation import instructions, rewards
from mis_mlx.evaluation.questions import Task
from mis_mlx.hardware import memory
from mis_mlx.models import distributed, load, mlx_generate, policy, streamed_decode
from mis_mlx.models.stream import Stream, load_checked
from mis_mlx.planner import estimates
from mis_mlx.types import Budget, Checkpoint

# Answers written together, as many as fit. In the same CPU time 48 have 1.3 times the tokens of 16,
# and 96 have fewer than 48 (SmolLM2-135M, float32, one thread).
AT_ONCE = (48, 32, 16, 4, 1)
CACHE_STEP = 256  # tokens by which mlx-lm's caches grow
Prompts = Sequence[list[int]]  # token ids
Writer = Callable[[Prompts], list[list[int]]]  # prompts -> their continuations
Record = dict[str, Any]  # of one question, as it is kept
# (task, numbers of questions, texts written) -> a verdict on each
Judge = Callable[[Task, Sequence[int], Sequence[str]], list[float]]


class Asking(NamedTuple):
    """How the questions of a task are asked within a budget.

    cost: what that takes. records: asks; gives a record for each question as it is answered.
    """

    cost: estimates.StageCost
    records: Callable[[], Iterator[Record]]


class _Plan(NamedTuple):
    """How a model writes.

    at_once: answers written together. in_memory: the model is whole in memory; otherwise it is
    streamed, with `headroom_bytes` bytes for blocks that stay.
    """

    cost: estimates.StageCost
    at_once: int
    in_memory: bool
    headroom_bytes: int


def asking(
    checkpoint: Checkpoint,
    tokenizer: Any,
    task: Task,
    *,
    left: Sequence[int],
    limit: Budget,
) -> Asking:
    """How a model writes answers, greedily, to the questions `left`, by number.

    MisError where the model does not fit the budget even streamed. Records hold the question's
    number "n", the "text" written and the judge's verdict.
    """
    prompts = [mlx_generate.encode(tokenizer, task.questions[n].context) for n in left]
    plan = _plan(estimates.model_of(checkpoint), task, prompts, limit)

    def records() -> Iterator[Record]:
        ends = tokenizer.eos_token_ids
        # Several machines write batches of one size, so that all make the same number of rounds:
        # each round ends with a gathering, which a machine that had stopped would block for ever.
        at_once = min(distributed.all_gather(plan.at_once))
        write = _writer(
            checkpoint,
            limit,
            plan._replace(at_once=at_once),
            ends=ends,
            max_tokens=task.max_tokens,
        )
        for first in range(0, len(left), at_once * distributed.size()):
            start = first + at_once * distributed.rank()
            batch = slice(start, start + at_once)
            own = list[Record]()
            if left[batch]:  # in the last round a machine may have nothing to write
                texts = _texts(tokenizer, write(prompts[batch]), ends)
                own = judged(task, left[batch], texts)
            for rows in distributed.all_gather(own):
                yield from rows

    return Asking(plan.cost, records)


def _plan(
    m: estimates.ModelSize,
    task: Task,
    prompts: Prompts,
    limit: Budget,
) -> _Plan:
    """The most answers together with which the whole model fits, or a streamed model."""
    most = task.max_tokens
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    written = len(prompts) * most
    flops = estimates.forward_flops(m, sum(lengths) + written, longest)
    one_token = estimates.token_cost(m, longest + most, limit.limit_bytes)
    for at_once in AT_ONCE:
        peak_bytes = resident_bytes(m, at_once, longest=longest, max_tokens=most, limit=limit)
        if peak_bytes <= limit.limit_bytes:
            # Every step of a batch fetches the weights once.
            steps = -(-len(prompts) // at_once) * most
            cost = estimates.StageCost(
                name=task.name,
                read_bytes=m.nbytes,
                written_bytes=0,
                peak_bytes=peak_bytes,
                flops=flops,
                touched_bytes=steps * one_token.touched_bytes,
            )
            return _Plan(cost, at_once, in_memory=True, headroom_bytes=0)
    estimates.require_fit(limit, one_token, other="")
    # Blocks that stay between tokens are in the peak; the room is what they may take.
    without_blocks = one_token.peak_bytes - one_token.pinned * m.block_work
    cost = replace(
        one_token,
        read_bytes=written * one_token.read_bytes,
        flops=flops,
        touched_bytes=written * one_token.touched_bytes,
    )
    headroom_bytes = estimates.headroom_bytes(limit.limit_bytes, without_blocks)
    return _Plan(cost, AT_ONCE[-1], in_memory=False, headroom_bytes=headroom_bytes)


def resident_bytes(
    m: estimates.ModelSize,
    at_once: int,
    *,
    longest: int,
    max_tokens: int,
    limit: Budget,
) -> int:
    """Memory of a model that is whole there and writes `at_once` answers.

    longest: tokens of the longest prompt. max_tokens: of an answer.
    """
    places = CACHE_STEP * -(-(longest + max_tokens) // CACHE_STEP)
    # Three times: of the prompts alone, of the batch, and of the batch once more while its cache
    # grows.
    keys = 3 * at_once * estimates.keys_bytes(m, places)
    logits = 8 * at_once * m.shape.vocab * 4
    weights = m.shape.layers * m.block_work + m.head_work
    reading = estimates.workspace_bytes(m, longest, longest)
    return weights + keys + logits + reading + memory.process_bytes(limit.limit_bytes)


def _writer(
    checkpoint: Checkpoint,
    limit: Budget,
    plan: _Plan,
    *,
    ends: set[int],
    max_tokens: int,
) -> Writer:
    """Open the model; the result writes up to `max_tokens` tokens after each prompt."""
    dtype = policy.compute_dtype(checkpoint)
    if plan.in_memory:
        model = load_checked(load.resident_model(checkpoint, dtype), f"{checkpoint.path}: ")
        draw = mlx_generate.sampler(0.0, 0)

        def write_together(prompts: Prompts) -> list[list[int]]:
            groups = mlx_generate.groups(
                model,
                prompts,
                count=1,
                max_tokens=max_tokens,
                stop=ends,
                draw=draw,
                at_once=plan.at_once,
            )
            return [completions[0] for completions in groups]

        return write_together
    direct = checkpoint.nbytes > limit.limit_bytes
    stream = Stream(checkpoint, dtype, plan.headroom_bytes, direct=direct)

    def write_in_turn(prompts: Prompts) -> list[list[int]]:
        continuations = []
        for prompt in prompts:
            tokens = streamed_decode.decode(stream, prompt, max_tokens, ends)
            continuations.append(list(chain.from_iterable(tokens)))
        return continuations

    return write_in_turn


def _texts(tokenizer: Any, written: Prompts, ends: set[int]) -> list[str]:
    """The texts of continuations, without their end tokens."""
    texts = []
    for ids in written:
        own = [token for token in ids if token not in ends]
        texts.append(tokenizer.decode(own))
    return texts


def judged(
    task: Task,
    numbers: Sequence[int],
    texts: Sequence[str],
) -> list[Record]:
    """The records of answers: the question's number, the text, and the verdict of its kind."""
    key, judge = JUDGES[task.kind]
    verdicts = judge(task, numbers, texts)
    records = []
    for number, text, verdict in zip(numbers, texts, verdicts, strict=True):
        records.append({"n": number, "text": text, key: verdict})
    return records


def marks_of_checked(
    task: Task,
    numbers: Sequence[int],
    texts: Sequence[str],
) -> list[float]:
    """1 where the last line is the right answer (evaluation/rewards), else 0.

    In a process that can be stopped: a text may break the verifier.
    """
    rows = []
    for number in numbers:
        question = task.questions[number]
        row = {
            "prompt": question.context,
            "answer": question.answer,
            "language": question.language,
        }
        rows.append(row)
    scored = rewards.score(rewards.functions("correct", None), rows, _groups(texts))
    return _totals(scored)


def count_followed(
    task: Task,
    numbers: Sequence[int],
    texts: Sequence[str],
) -> list[float]:
    """How many of its instructions each answer follows.

    An answer that breaks the checker follows none, and its question is named aloud.
    """
    rows = []
    for number in numbers:
        question = task.questions[number]
        rows.append({"prompt": question.context, "asked": question.instructions})
    checker = rewards.Function(
        name="if-verifiable",
        source=instructions.__name__,
        function=instructions.followed.__name__,
        seconds=instructions.SECONDS,
    )
    scored = rewards.score([checker], rows, _groups(texts))
    for number, score in zip(numbers, scored, strict=True):
        for note in score.notes:
            cli.say(
                f"{task.name} question {number + 1}: its answer counts as following nothing "
                f"({note})"
            )
    return _totals(scored)


def _groups(texts: Sequence[str]) -> list[list[str]]:
    """Each text as a group of its own: one completion of its prompt."""
    return [[text] for text in texts]


def _totals(scored: Sequence[rewards.Scores]) -> list[float]:
    """The reward of the one completion of each group; 0 where it could not be scored."""
    return [float(score.totals[0] or 0.0) for score in scored]


# {kind of a task: (key of the verdict in a record, who judges)}
JUDGES: dict[str, tuple[str, Judge]] = {
    "checked": ("mark", marks_of_checked),
    "instructions": ("followed", count_followed),
}
