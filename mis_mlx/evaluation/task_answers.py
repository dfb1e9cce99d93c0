"""A model writes answers to a task's questions, and judges say how good they are.

The model is whole in memory where it fits, and many answers are written together. Otherwise it is
streamed from disk, and writes one answer after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.evaluation import instructions, rewards
from mis_mlx.evaluation.questions import Task
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models import (
    continuous_batch,
    distributed,
    load,
    mlx_generate,
    pass_cost,
    streamed_decode,
)
from mis_mlx.models.continuous_batch import Completion
from mis_mlx.models.model_size import ModelSize, model_of
from mis_mlx.models.stream import Stream, load_checked
from mis_mlx.planner import estimates
from mis_mlx.types import Budget, Checkpoint

# Answers written together, as many as fit. In the same CPU time 48 have 1.3 times the tokens of 16,
# and 96 have fewer than 48 (SmolLM2-135M, float32, one thread).
AT_ONCE = (48, 32, 16, 4, 1)
# Answers that are judged together, and then kept: a judge is a process of its own, which imports
# for 2 s. A streamed model takes longer than that for one answer, so these are judged one by one.
JUDGED_AT_ONCE = 32
CACHE_STEP = 256  # tokens by which mlx-lm's caches grow
Prompts = Sequence[list[int]]  # token ids
Writer = Callable[[Prompts], Iterator[Completion]]  # prompts -> completions, as these end
Record = dict[str, Any]  # of one question, as it is kept
# (task, numbers of questions, texts written) -> a verdict on each
Judge = Callable[[Task, Sequence[int], Sequence[str]], list[float]]


class Asking(NamedTuple):
    """How the questions of a task are asked within a budget.

    cost: what that takes. records: asks; gives a record for each question as it is answered.
    """

    cost: StageCost
    records: Callable[[], Iterator[Record]]


class _Plan(NamedTuple):
    """How a model writes.

    at_once: answers written together. in_memory: the model is whole in memory; otherwise it is
    streamed, with `headroom_bytes` bytes for blocks that stay.
    """

    cost: StageCost
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
    plan = _plan(model_of(checkpoint), task, prompts, limit)

    def records() -> Iterator[Record]:
        ends = tokenizer.eos_token_ids
        write = _writer(checkpoint, limit, plan, ends=ends, max_tokens=task.max_tokens)
        own = slice(distributed.rank(), None, distributed.size())
        texts = _texts(tokenizer, left[own], write(prompts[own]), ends)
        judged_at_once = JUDGED_AT_ONCE if plan.in_memory else 1
        written = _judged_parts(task, texts, judged_at_once)
        # Every round ends with a gathering, which a machine that had stopped would block for ever.
        # So all machines make rounds until the last one has nothing more.
        while True:
            parts = distributed.all_gather(next(written, None))
            if not any(parts):
                return
            for part in parts:
                yield from part or ()

    return Asking(plan.cost, records)


def _plan(
    m: ModelSize,
    task: Task,
    prompts: Prompts,
    limit: Budget,
) -> _Plan:
    """The most answers together with which the whole model fits, or a streamed model."""
    most = task.max_tokens
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    written = len(prompts) * most
    flops = pass_cost.forward_flops(m, sum(lengths) + written, longest)
    one_token = pass_cost.token_cost(m, longest + most, limit.limit_bytes)
    for at_once in AT_ONCE:
        peak_bytes = resident_bytes(m, at_once, longest=longest, max_tokens=most)
        if peak_bytes + memory.process_bytes(limit.limit_bytes) <= limit.limit_bytes:
            # Every step of a batch fetches the weights once.
            steps = -(-len(prompts) // at_once) * most
            cost = StageCost(
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
    headroom_bytes = pass_cost.headroom_bytes(limit.limit_bytes, without_blocks)
    return _Plan(cost, AT_ONCE[-1], in_memory=False, headroom_bytes=headroom_bytes)


def resident_bytes(
    m: ModelSize,
    at_once: int,
    *,
    longest: int,
    max_tokens: int,
) -> int:
    """Memory of a model that is whole there and writes `at_once` answers, without the process.

    longest: tokens of the longest prompt. max_tokens: of an answer.
    """
    places = CACHE_STEP * -(-(longest + max_tokens) // CACHE_STEP)
    # Three times: of the prompts alone, of the batch, and of the batch once more while its cache
    # grows.
    keys = 3 * at_once * pass_cost.keys_bytes(m, places)
    logits = 8 * at_once * m.shape.vocab * 4
    reading = pass_cost.workspace_bytes(m, longest, longest)
    return pass_cost.whole_bytes(m) + keys + logits + reading


def _writer(
    checkpoint: Checkpoint,
    limit: Budget,
    plan: _Plan,
    *,
    ends: set[int],
    max_tokens: int,
) -> Writer:
    """Open the model; the result writes up to `max_tokens` tokens after each prompt."""
    dtype = precision.dtype_of(checkpoint)
    if plan.in_memory:
        model = load_checked(load.resident_model(checkpoint, dtype), f"{checkpoint.path}: ")

        def write_together(prompts: Prompts) -> Iterator[Completion]:
            return continuous_batch.completions(
                model,
                prompts,
                max_tokens=max_tokens,
                stop=ends,
                at_once=plan.at_once,
            )

        return write_together
    direct = memory.crowds_page_cache(checkpoint.nbytes, limit)
    stream = Stream(checkpoint, dtype, plan.headroom_bytes, direct=direct)

    def write_in_turn(prompts: Prompts) -> Iterator[Completion]:
        for number, prompt in enumerate(prompts):
            tokens = streamed_decode.decode(stream, prompt, max_tokens, ends)
            yield Completion(number, list(chain.from_iterable(tokens)))

    return write_in_turn


def _texts(
    tokenizer: Any,
    asked: Sequence[int],
    completions: Iterator[Completion],
    ends: set[int],
) -> Iterator[tuple[int, str]]:
    """(question's number, its answer without the end token), as the answers end.

    asked: numbers of the questions, in the order of their prompts.
    """
    for completion in completions:
        own = [token for token in completion.ids if token not in ends]
        yield asked[completion.number], tokenizer.decode(own)


def _judged_parts(
    task: Task,
    texts: Iterator[tuple[int, str]],
    judged_at_once: int,
) -> Iterator[list[Record]]:
    """The records of answers, `judged_at_once` together, none of them empty."""
    while part := list(islice(texts, judged_at_once)):
        numbers = [number for number, _ in part]
        yield judged(task, numbers, [text for _, text in part])


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
    *,
    loosely: bool = False,
) -> list[float]:
    """How many of its instructions each answer follows.

    loosely: as `instructions.followed_loosely`. An answer that breaks the checker follows none, and
    its question is named aloud.
    """
    function = instructions.followed_loosely if loosely else instructions.followed
    rows = []
    for number in numbers:
        question = task.questions[number]
        rows.append({"prompt": question.context, "asked": question.instructions})
    checker = rewards.Function(
        name="if-verifiable",
        source=instructions.__name__,
        function=function.__name__,
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
