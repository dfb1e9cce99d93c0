"""Reinforcement from checked answers (GRPO, Dr. GRPO, DAPO): of a group of answers the better ones
become likelier.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, grpo_rollout
from mis_mlx.alignment.grpo_rollout import Settings
from mis_mlx.data import examples, rows
from mis_mlx.evaluation import rewards
from mis_mlx.models import distributed, load, stream
from mis_mlx.planner import estimates
from mis_mlx.types import Checkpoint, MisError

CACHE_STEP = 256  # tokens by which mlx-lm's cache grows
# Rows to train on, token ids of their prompts, held-out rows, theirs, what is known of the data.
Questions = tuple[list[rows.Row], list[list[int]], list[rows.Row], list[list[int]], dict[str, Any]]


def _questions(
    s: Settings, checkpoint: Checkpoint, functions: Sequence[rewards.Function]
) -> Questions:
    kinds = [name.strip() for name in s.tasks.split(",")]
    data = examples.load(s.data, ("answer",), s.data_licence, s.scrub_pii, kinds)
    tokenizer = load.tokenizer(checkpoint.path)
    room = s.max_seq_length - s.max_completion_length + 1
    splits = list[Any]()
    encoded = []
    for split in (data.train, data.valid[: s.eval_rows]):
        questions = [row for row, _ in split]
        where = [at for _, at in split]
        rows.refuse(rewards.unanswerable(functions, questions, where))
        sequences, _ = examples.encode(split, tokenizer, room, ("answer",))
        splits += [
            questions,
            [[int(t) for t in ids[: int(np.argmax(learn))]] for ((ids, learn),) in sequences],
        ]
        encoded += sequences
    cli.say(*data.notes)
    return (*splits, {**data.card, "fingerprint": examples.fingerprint(encoded)})


def _phases(
    s: Settings, checkpoint: Checkpoint, longest: int
) -> tuple[estimates.StageCost, estimates.StageCost]:
    """(sampling, training), where `longest` is of the prompts."""
    m = alignment_run.sizes(s, checkpoint)
    most = s.max_completion_length
    answers = s.grad_accumulation_steps * s.group_size
    length = longest + most
    branched = replace(
        s, grad_accumulation_steps=s.grad_accumulation_steps * -(-s.group_size // s.batch_size)
    )
    learn = alignment_run.training(branched, checkpoint, 1, longest + s.batch_size * most, "learn")
    alone = alignment_run.training(
        replace(s, grad_accumulation_steps=1), checkpoint, 1, longest + s.batch_size * most
    )
    state = alone.peak_bytes - estimates.activation_bytes(
        m.config, 1, longest + s.batch_size * most
    )
    # Twice: the cache grows, and gets rid of finished answers, by being copied.
    cache = estimates.keys_bytes(m, 2 * s.at_once * (longest + CACHE_STEP * -(-most // CACHE_STEP)))
    work = (
        estimates.workspace_bytes(m, max(longest, s.at_once), length)
        + 8 * s.at_once * m.shape.vocab * 4
    )
    measured = (s.iters // s.save_every + 2) * s.eval_rows  # held-out answers
    tokens = s.iters * (s.grad_accumulation_steps * longest + answers * most) + measured * length
    batches = s.iters * -(-answers // s.at_once) + -(-measured // s.at_once)
    touched = batches * most * (m.shape.layers * m.block_work + m.head_work)
    flops = estimates.forward_flops(m, tokens, length)
    play = estimates.StageCost("sample", 0, 0, state + cache + work, flops, touched_bytes=touched)
    if s.beta:
        beside = 3 * alignment_run.weight_bytes(m)  # moments too
        size = answers * length
        one = estimates.streamed_pass("", m, size, size, length, spool=False, beside_bytes=beside)
        read = s.iters * one.read_bytes
        peak = max(one.peak_bytes, play.peak_bytes + m.slots_bytes)
        play = replace(play, read_bytes=read, flops=flops + s.iters * one.flops, peak_bytes=peak)
        learn = replace(learn, peak_bytes=learn.peak_bytes + m.slots_bytes)
    return play, learn


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data and the reward functions, plan, sample and learn,
    write the best.
    """
    s, folder, checkpoint = alignment_run.opened(settings)
    most = s.max_completion_length
    if most >= s.max_seq_length:
        why = (
            f"--max-completion-length {most} leaves no room for a prompt in --max-seq-length "
            f"{s.max_seq_length}"
        )
        raise MisError(f"{why}: lower the one or raise the other")
    functions = rewards.functions(s.reward_functions, s.reward_functions_file, s.reward_timeout)
    train, prompts, valid, valid_prompts, card = _questions(s, checkpoint, functions)
    phases = _phases(s, checkpoint, max(map(len, [*prompts, *valid_prompts])))
    planned = alignment_run.planned(s, phases)
    if (n := distributed.size()) > 1 and (s.num_iterations > 1 or n > s.grad_accumulation_steps):
        what = (
            f"{n} machines share {s.grad_accumulation_steps} questions, and --num-iterations "
            f"is "
            f"{s.num_iterations}"
        )
        remedy = (
            f"give --grad-accumulation-steps {n} or more and --num-iterations 1, or use "
            f"fewer "
            f"machines"
        )
        raise MisError(f"{what}: {remedy}")
    if s.dry_run:
        return {"model": str(checkpoint.path), "questions": len(train), **planned}
    with alignment_run.running(s, folder, checkpoint, s.batch_size, phases, card, "grpo") as r:
        dtype = alignment_run.dtype_of(s, checkpoint)
        reference = (
            stream.Stream(checkpoint, dtype, 0, checkpoint.nbytes > r.budget_bytes)
            if s.beta
            else None
        )
        log = partial(r.files.append, r.folder / grpo_rollout.SAMPLES)
        tokenizer = load.tokenizer(checkpoint.path)
        sampler = grpo_rollout.Sampler(
            s, r.model, train, prompts, tokenizer, functions, reference, log
        )
        held_out = partial(grpo_rollout.measure, sampler, valid, valid_prompts)
        return r.train(sampler, s.loss, held_out, grpo_rollout.train)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
