"""Train on answers that a program can check: GRPO with DAPO's loss."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, grpo_rollout
from mis_mlx.alignment.grpo_rollout import Settings
from mis_mlx.data import examples, rows
from mis_mlx.hardware import memory
from mis_mlx.hardware.memory import needed_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.tasks import rewards
from mis_mlx.models.architectures import block_state
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import pass_cost, residency, stream
from mis_mlx.models.writing.text_writer import Room
from mis_mlx.storage.files import DISK, file_sha256, json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError

Split = tuple[list[rows.Row], list[list[int]]]  # rows, and the token ids of their prompts


def _questions(
    s: Settings,
    checkpoint: Checkpoint,
    functions: Sequence[rewards.Function],
) -> tuple[Split, Split, dict[str, Any]]:
    """(questions to train on, held-out questions, facts about the data); every row is checked."""
    kinds = [name.strip() for name in s.tasks.split(",")]
    visited = s.iters * s.step_tokens
    data = examples.load(
        s.data, ("answer",), s.data_license, scrub=s.scrub_pii, kinds=kinds, tokens=visited
    )
    tokenizer = load.tokenizer(checkpoint.path)
    left = s.max_seq_length - s.max_completion_length
    limit = (
        f"--max-seq-length {s.max_seq_length} leaves it {left} next to --max-completion-length "
        f"{s.max_completion_length}"
    )
    room = left + 1  # with a token of the answer
    splits: list[Split] = []
    encoded = []
    for split in (data.train, data.valid[: s.eval_rows]):
        questions = [row for row, _ in split]
        places = [place for _, place in split]
        rows.refuse(rewards.unanswerable(functions, questions, places))
        sequences, _ = examples.encode(split, tokenizer, room, ("answer",), limit=limit)
        # A prompt ends where the answer, which is to be learned, begins.
        prompts = []
        for ((ids, loss_mask),) in sequences:
            prompts.append([int(token) for token in ids[: int(np.argmax(loss_mask))]])
        splits.append((questions, prompts))
        encoded += sequences
    cli.say(*data.notes)
    # Functions see the rows' other columns, too.
    fingerprint = json_sha256(
        [examples.fingerprint(encoded), [questions for questions, _ in splits]]
    )
    card = {**data.card, "fingerprint": fingerprint}
    train, valid = splits
    return train, valid, card


def _phases(
    s: Settings,
    checkpoint: Checkpoint,
    longest: int,
    at_once: int,
) -> tuple[StageCost, StageCost]:
    """The costs of (sampling, training), where `longest` is the tokens of the longest prompt.

    at_once: answers that are written together.
    """
    m = alignment_run.model_size(s, checkpoint)
    most = s.max_completion_length
    length = longest + most  # of a prompt with an answer
    micro_batches = s.grad_accumulation_steps * -(-s.group_size // s.batch_size)
    learning = replace(s, grad_accumulation_steps=micro_batches)
    updating = alignment_run.training_cost(learning, checkpoint, s.batch_size, length, name="learn")
    if s.beta:
        updating = updating.beside(m.slots_bytes)
    # Sampling has the training's weights and moments in memory, without its activations.
    single = replace(s, grad_accumulation_steps=1)
    state = alignment_run.training_cost(single, checkpoint, s.batch_size, length).peak_bytes
    state -= residency.activation_bytes(m, s.batch_size, length)
    return _sampling(s, m, longest, state, at_once=at_once), updating


def _together(s: Settings, checkpoint: Checkpoint, longest: int) -> int:
    """How many answers are written together: as many as fit beside the training's state."""
    limit_bytes = memory.budget(s.budget_bytes).limit_bytes
    for at_once in grpo_rollout.AT_ONCE:
        play, _ = _phases(s, checkpoint, longest, at_once)
        if needed_bytes(play.peak_bytes) <= limit_bytes:
            break
    return at_once


def _sampling(s: Settings, m: ModelSize, longest: int, state: int, *, at_once: int) -> StageCost:
    """The cost of sampling, and of the reference's pass where KL is asked for.

    longest: tokens of the longest prompt. state: bytes of the model and its optimizer.
    """
    most = s.max_completion_length
    answers = s.grad_accumulation_steps * s.group_size
    length = longest + most
    # Twice: the cache grows, and gets rid of finished answers, by being copied.
    cache = pass_cost.texts_bytes(m, 2 * at_once, length + block_state.STEP)
    work = pass_cost.workspace_bytes(m, max(longest, at_once), length)
    work += 8 * at_once * m.shape.vocab * 4
    measured = (s.iters // s.save_every + 3) * s.eval_rows  # held-out answers, the result's too
    tokens = s.iters * (s.grad_accumulation_steps * longest + answers * most) + measured * length
    batches = s.iters * -(-answers // at_once) + -(-measured // at_once)
    play = StageCost(
        name="sample",
        peak_bytes=state + cache + work,
        flops=pass_cost.forward_flops(m, tokens, length),
        touched_bytes=batches * most * (m.shape.layers * m.block_work + m.head_work),
    )
    if not s.beta:
        return play
    size = answers * length
    reference = pass_cost.streamed_pass(
        "",
        m,
        tokens=size,
        micro_tokens=size,
        length=length,
        spool=False,
        beside_bytes=3 * m.whole_work,  # moments too
    )
    return replace(
        play,
        read_bytes=s.iters * reference.read_bytes,
        flops=play.flops + s.iters * reference.flops,
        peak_bytes=max(reference.peak_bytes, play.peak_bytes + m.slots_bytes),
    )


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, check the data and the rewards, plan, sample and learn, write the best."""
    s, folder, checkpoint = alignment_run.open_run_model(settings)
    most = s.max_completion_length
    if most >= s.max_seq_length:
        why = (
            f"--max-completion-length {most} leaves no room for a prompt in --max-seq-length "
            f"{s.max_seq_length}"
        )
        raise MisError(f"{why}: lower the first or raise the second")
    functions = rewards.functions(s.reward_functions, s.reward_functions_file)
    (train, prompts), (valid, valid_prompts), card = _questions(s, checkpoint, functions)
    longest = max(map(len, [*prompts, *valid_prompts]))
    at_once = _together(s, checkpoint, longest)
    phases = _phases(s, checkpoint, longest, at_once)
    planned = alignment_run.report_plan(s, phases)
    if s.dry_run:
        return {"model": str(checkpoint.path), "questions": len(train), **planned}
    same = {}
    if s.reward_functions_file:
        same["rewards"] = file_sha256(Path(s.reward_functions_file))
    with alignment_run.start_run(
        s,
        folder,
        checkpoint,
        micro=s.batch_size,
        planned=planned,
        card=card,
        name="grpo",
        same=same,
    ) as alignment:
        reference = None
        if s.beta:
            reference = stream.Stream(
                checkpoint,
                dtype=alignment_run.dtype_of(s, checkpoint),
                headroom_bytes=0,
                direct=memory.crowds_page_cache(checkpoint.nbytes, Budget(alignment.budget_bytes)),
            )
        sampler = grpo_rollout.Sampler(
            settings=s,
            model=alignment.model,
            rows=train,
            prompts=prompts,
            tokenizer=load.tokenizer(checkpoint.path),
            functions=functions,
            reference=reference,
            room=Room(at_once, longest + most),
            log=partial(DISK.append, alignment.folder / grpo_rollout.SAMPLES),
        )

        def held_out(model: nn.Module) -> dict[str, float]:
            sampler.model = model
            return grpo_rollout.measure(sampler, valid, valid_prompts)

        return alignment.train(sampler, s.loss, held_out, grpo_rollout.steps_of)


if __name__ == "__main__":
    cli.main(Settings, run)
